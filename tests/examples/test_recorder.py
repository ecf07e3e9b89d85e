"""What a step reports: to TensorBoard, and as warnings that a stop does not repeat."""

import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_series import Series, Stop
from tensorboardX.proto.event_pb2 import Event
from torch import nn

from common.errors import RunInterruptedError, UsageError
from trainer.recorder import Health
from trainer.series_run import check_tensorboard
from trainer.step_log import read_log

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


def test_what_is_not_installed_is_said_before_anything_is_done(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_tensorboard(asked=True)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UsageError, match="--tensorboard needs the package tensorboardX: pip "):
        series(tmp_path / "out", None, "--tensorboard")
    assert not (tmp_path / "out").exists()


def state_of(warnings: list[str], penalty: float, seen: Any = None) -> Any:
    kept = SimpleNamespace(penalty=nn.Identity(), subspace_value=lambda: 0.0)
    optimizer = SimpleNamespace(shown=lambda: {"penalty": penalty})
    return SimpleNamespace(warnings=warnings, inheritance=kept, optimizer=optimizer, seen=seen)


def update_of(loss: float) -> Any:
    return SimpleNamespace(loss=torch.tensor(loss), distillation=None)


def test_a_warning_is_not_said_again_with_other_numbers_after_a_stop() -> None:
    state = state_of([], 5.0)
    (said,) = Health(state).look(state, update_of(1.0), 2.0)
    assert "the penalty, 5, exceeds the task loss, 1:" in said
    again = state_of(list(state.warnings), 7.5, state.seen)
    assert Health(again).look(again, update_of(2.0), 2.0) == []
    assert again.warnings == [said]


def test_another_kind_is_said_after_a_stop() -> None:
    state = state_of(["the penalty was exactly 0 3 times: it protects nothing"], 5.0)
    (said,) = Health(state).look(state, update_of(1.0), 2.0)
    assert "exceeds" in said
    assert len(state.warnings) == 2
