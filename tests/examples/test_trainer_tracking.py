"""What is reported to TensorBoard and to Weights & Biases."""

import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from small_series import Series, Stop
from tensorboardX.proto.event_pb2 import Event

from trainer.errors import RunInterruptedError, UsageError
from trainer.log import read_log
from trainer.tracking import check_trackers

WORDS = ("--arms", "scratch+ars", "--tensorboard")


def scalars(folder: Path, tag: str) -> dict[int, float]:
    """Values of a scalar by step, as TensorBoard shows them: later files purge earlier steps."""
    found: dict[int, float] = {}
    for path in sorted(folder.glob("events.*")):
        content = path.read_bytes()
        at = 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4
            if event.HasField("session_log") and event.session_log.status == 1:  # START
                found = {step: value for step, value in found.items() if step < event.step}
            for value in event.summary.value:
                if value.tag == tag:
                    found[event.step] = value.simple_value
    return found


def test_tensorboard_shows_the_log(series: Series, tmp_path: Path) -> None:
    series(tmp_path, None, *WORDS)
    rows = read_log(tmp_path / "log_d1-scratch+ars.csv")
    folder = tmp_path / "tensorboard/d1-scratch+ars"
    for key in ("loss", "phi", "val_bpb", "tokens_per_second", "memory"):
        logged = {row["step"]: row[key] for row in rows if row[key] is not None}
        assert scalars(folder, key) == pytest.approx(logged, rel=1e-6), key
        assert logged


def test_a_resumed_run_goes_on_in_the_same_curve(series: Series, tmp_path: Path) -> None:
    with pytest.raises(RunInterruptedError):
        series(tmp_path, Stop(5), *WORDS)
    series(tmp_path, None, *WORDS)
    rows = read_log(tmp_path / "log_d1-scratch+ars.csv")
    shown = scalars(tmp_path / "tensorboard/d1-scratch+ars", "loss")
    assert shown == pytest.approx({r["step"]: r["loss"] for r in rows[1:]}, rel=1e-6)


class _FakeRun:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.finished = False

    def log(self, values: dict[str, Any], step: int) -> None:
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_weights_and_biases_gets_one_run_a_model(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[_FakeRun] = []
    fake = ModuleType("wandb")

    def init(**settings: Any) -> _FakeRun:
        runs.append(_FakeRun(settings))
        return runs[-1]

    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    series(tmp_path, None, "--arms", "scratch", "--wandb", "my-project")
    assert [run.settings["name"] for run in runs] == ["d1-scratch seed 0", "d2-scratch seed 0"]
    assert {run.settings["project"] for run in runs} == {"my-project"}
    assert runs[0].settings["id"] != runs[1].settings["id"]
    assert all(run.finished for run in runs)
    rows = read_log(tmp_path / "log_d1-scratch.csv")
    assert [step for step, _ in runs[0].rows] == [row["step"] for row in rows]
    assert runs[0].rows[3][1]["loss"] == rows[3]["loss"]

    # A model that is trained again in its folder goes on, as after an interruption; the same
    # settings in another folder are another run.
    (tmp_path / "checkpoints/d2-scratch.pt").unlink()
    series(tmp_path, None, "--arms", "scratch", "--wandb", "my-project")
    series(tmp_path / "other", None, "--arms", "scratch", "--wandb", "my-project")
    ids = [run.settings["id"] for run in runs]
    assert ids[2] == ids[1]
    assert len(set(ids)) == len(ids) - 1 == 4


def test_what_is_not_installed_is_said_before_anything_is_done(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_trackers(tensorboard=True, wandb=False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="--wandb needs the package wandb: pip install wandb"):
        series(tmp_path / "out", None, "--wandb", "my-project")
    assert not (tmp_path / "out").exists()
