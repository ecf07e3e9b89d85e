"""Interrupted and resumed is the same, bit for bit, as never interrupted."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from small_series import CHAIN, KilledError, Series, Stop, results

from common import checkpoint_file
from common.errors import RunInterruptedError, UsageError
from trainer.series_report import markdown_table


# Questions before each model and after each step: 1 to 11 of d1, to 22 of the d2 from scratch, to
# 31 of the grown one, to 34 of the branch beside it. Within a trunk, at its end, at the end of a
# model, before and at the first step of the next; before and after growing, where the branch
# begins, at the end; before, in and at the end of the branch.
@pytest.mark.parametrize("step", [6, 9, 11, 12, 13, 23, 24, 26, 31, 32, 33, 34])
def test_stopped_and_resumed(
    series: Series, straight: dict[str, Any], tmp_path: Path, step: int
) -> None:
    with pytest.raises(RunInterruptedError) as stopped:
        series(tmp_path, Stop(step))
    assert stopped.value.signum == signal.SIGTERM
    series(tmp_path)
    assert results(tmp_path) == straight


def test_stopping_at_every_step_gets_there_too(
    series: Series, straight: dict[str, Any], tmp_path: Path
) -> None:
    stops = 0
    done = False
    while not done:
        try:
            series(tmp_path, Stop(2))  # 1 is the question before the model
            done = True
        except RunInterruptedError:
            stops += 1
    assert stops == (10 + 10 + 8 + 2) + 4 - 1  # and before each model but the first one
    assert results(tmp_path) == straight


@pytest.mark.parametrize(
    "every", [0.0, 86400.0], ids=["checkpoints each step", "none within a model"]
)
@pytest.mark.parametrize(("step", "saved", "kept"), [(4, 3, 0), (9, 3, 1), (29, 3, 1), (33, 1, 0)])
def test_killed_and_resumed(
    series: Series,
    straight: dict[str, Any],
    tmp_path: Path,
    step: int,
    saved: int,
    kept: int,
    every: float,
) -> None:
    words = ("--checkpoint-seconds", str(every), "--keep", "3")
    with pytest.raises(KilledError):
        series(tmp_path, Stop(step, kill=True), *words)
    states = [path.stem for path in sorted(tmp_path.glob("checkpoints/*/*.pt"))]
    assert len(states) == (kept if every else saved)
    series(tmp_path, None, *words)
    assert results(tmp_path) == straight
    assert not list(tmp_path.glob("checkpoints/*/*.pt"))


@pytest.mark.parametrize(
    "words",
    [
        ("--arms", "grown+paper", "--grow-at", "0.5", "--blocks", "inserted"),
        ("--arms", "grown+ewc=0"),
        ("--arms", "grown+subspace=0.5"),
        ("--arms", "grown+ewc+subspace+distill"),
        ("--arms", "grown+muon"),
        ("--arms", "grown+muon+distill=0.5+ars", "--precision", "fp16"),
        ("--arms", "grown", "--precision", "bf16"),
        ("--arms", "grown+ewc+ars", "--precision", "fp16"),
        ("--arms", "grown", "--device-batch-size", "1", "--recompute"),
    ],
    ids=" ".join,
)
def test_resuming_with_every_kind_of_state(
    series: Series, tmp_path: Path, words: tuple[str, ...]
) -> None:
    series(tmp_path / "straight", None, *words)
    for step in (17, 6):  # within the grown model, and in the branch beside it
        with pytest.raises(RunInterruptedError):
            series(tmp_path / "stopped", Stop(step), *words)
    series(tmp_path / "stopped", None, *words)
    assert results(tmp_path / "stopped") == results(tmp_path / "straight")


def test_seeds_differ(series: Series, straight: dict[str, Any], tmp_path: Path) -> None:
    series(tmp_path, None, "--seed", "1")
    assert results(tmp_path)["models"].keys() == straight["models"].keys()
    for name, model in results(tmp_path)["models"].items():
        assert model != straight["models"][name]


def test_a_finished_series_is_left_as_it_is(
    series: Series, straight: dict[str, Any], tmp_path: Path
) -> None:
    assert series(tmp_path)[1] is False
    table, nothing_to_do = series(tmp_path, Stop(1))
    assert nothing_to_do
    assert table == markdown_table(json.loads((tmp_path / "metrics.json").read_text()))
    (tmp_path / "metrics.json").unlink()
    series(tmp_path)
    assert results(tmp_path) == straight


def _damage(path: Path) -> bytes:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return bytes(content)


@pytest.mark.parametrize("name", ["d1-scratch+ars", CHAIN, f"{CHAIN}@0.5"])
def test_a_damaged_model_is_put_aside_and_trained_again(
    series: Series,
    straight: dict[str, Any],
    tmp_path: Path,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    series(tmp_path)
    damaged = _damage(tmp_path / f"checkpoints/{name}.pt")
    series(tmp_path)
    assert results(tmp_path) == straight
    warning = next(w for w in capsys.readouterr().err.splitlines() if w.startswith("warning"))
    assert f"{name}.pt is damaged (its checksum does not match)" in warning
    assert (tmp_path / f"checkpoints/{name}.pt.damaged").read_bytes() == damaged


@pytest.mark.parametrize("how", ["damaged", "cut", "foreign"])
def test_the_state_before_a_damaged_one_is_used(
    series: Series,
    straight: dict[str, Any],
    tmp_path: Path,
    how: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--checkpoint-seconds", "0")
    with pytest.raises(RunInterruptedError):
        series(tmp_path, Stop(7), *words)
    folder = tmp_path / "checkpoints/d1-scratch+ars"
    assert [path.name for path in sorted(folder.iterdir())] == ["00000005.pt", "00000006.pt"]
    newest = folder / "00000006.pt"
    if how == "foreign":
        with pytest.raises(RunInterruptedError):
            series(tmp_path / "other", Stop(7), *words, "--seed", "5")
        newest.write_bytes((tmp_path / f"other/{newest.relative_to(tmp_path)}").read_bytes())
    elif how == "cut":
        newest.write_bytes(newest.read_bytes()[:1000])
    else:
        _damage(newest)
    bad = newest.read_bytes()
    capsys.readouterr()
    with pytest.raises(RunInterruptedError):
        series(tmp_path, Stop(2), *words)  # the step from 5 to 6, done again
    warning = next(w for w in capsys.readouterr().err.splitlines() if w.startswith("warning"))
    assert "00000006.pt" in warning
    assert ("another run" if how == "foreign" else "damaged") in warning
    assert (folder / "00000006.pt.damaged").read_bytes() == bad
    assert [p.name for p in sorted(folder.glob("*.pt"))] == ["00000005.pt", "00000006.pt"]
    series(tmp_path, None, *words)
    assert results(tmp_path) == straight
    assert (folder / "00000006.pt.damaged").read_bytes() == bad


def test_a_model_that_cannot_be_read_is_left_as_it_is(
    series: Series, straight: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series(tmp_path)
    before = sorted((tmp_path / "checkpoints").iterdir())

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_file.torch, "load", refuse)
        with pytest.raises(UsageError, match=r"d1-scratch\+ars\.pt cannot be read"):
            series(tmp_path)
    assert sorted((tmp_path / "checkpoints").iterdir()) == before
    assert series(tmp_path)[1]
    assert results(tmp_path) == straight


def test_what_a_killed_save_left_is_dropped(series: Series, tmp_path: Path) -> None:
    with pytest.raises(RunInterruptedError):
        series(tmp_path, Stop(4))
    folder = tmp_path / "checkpoints/d1-scratch+ars"
    (folder / "00000002.pt.tmp").write_bytes(b"cut")  # as earlier versions left it
    (folder / ".00000002.pt.0.unfinished").mkdir()
    (folder / ".00000002.pt.0.unfinished/file").write_bytes(b"cut")
    with pytest.raises(RunInterruptedError):
        series(tmp_path, Stop(2))
    assert [path.name for path in sorted(folder.iterdir())] == ["00000003.pt", "00000004.pt"]
    (folder / "00000005.pt.tmp").write_bytes(b"cut")
    (folder.parent / ".d1-scratch.pt.0.unfinished").mkdir()
    series(tmp_path)
    assert not folder.exists()
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_a_grown_model_inherits_the_scale_of_the_loss(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = torch.amp.GradScaler.__init__

    def start_high(self: Any, device: str) -> None:
        create(self, device, init_scale=2.0**40)  # overflows, and is halved at every step

    monkeypatch.setattr(torch.amp.GradScaler, "__init__", start_high)
    with pytest.raises(RunInterruptedError):
        series(tmp_path, Stop(13), "--arms", "grown", "--precision", "fp16")
    trunk, child = (
        torch.load(tmp_path / "checkpoints" / name, weights_only=True)
        for name in ("d1-scratch-trunk-00000008.pt", "d2-grown/00000001.pt")
    )
    assert trunk["scaler"]["scale"] == 2.0 ** (40 - 8)
    assert child["scaler"]["scale"] == 2.0 ** (40 - 9)


def test_a_warning_that_takes_several_looks_is_not_lost(series: Series, tmp_path: Path) -> None:
    words = ("--arms", "grown+distill=0", "--curve-points", "2")
    series(tmp_path / "straight", None, *words)
    expected = results(tmp_path / "straight")
    (warning,) = expected["records"][-1]["warnings"]
    assert "exactly 0 3 times" in warning
    with pytest.raises(RunInterruptedError):
        series(tmp_path / "stopped", Stop(18), *words)  # d2 is looked at twice before, and after
    series(tmp_path / "stopped", None, *words)
    assert results(tmp_path / "stopped") == expected
