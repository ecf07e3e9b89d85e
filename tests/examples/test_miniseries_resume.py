"""Interrupted and resumed is the same, bit for bit, as never interrupted."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from small_series import Series, results

from trainer import train as train_module
from trainer.errors import RunInterruptedError, UsageError
from trainer.report import markdown_table
from trainer.signals import StopRequest


class _KilledError(BaseException):
    """Stands for a kill: nothing is saved on the way out."""


class _Stop(StopRequest):
    """Asks to stop, or kills, after a number of training steps."""

    def __init__(self, step: int, *, kill: bool = False) -> None:
        super().__init__()
        self._left = step
        self._kill = kill

    @property
    def requested(self) -> bool:
        """Read by the loop once a step."""
        self._left -= 1
        if self._left == 0 and not self._kill:
            self._handle(signal.SIGTERM, None)
        return super().requested

    def check(self) -> None:
        if self._kill and self._left <= 0:
            raise _KilledError
        super().check()


# d1 trains 10 steps and d2-inherited 10: within a trunk, at its end, at the end of a model, at the
# first step of the next one, at its end.
@pytest.mark.parametrize("step", [5, 8, 10, 11, 20])
def test_stopped_and_resumed(
    series: Series, straight: dict[str, Any], tmp_path: Path, step: int
) -> None:
    with pytest.raises(RunInterruptedError) as stopped:
        series(tmp_path, _Stop(step))
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
            series(tmp_path, _Stop(1))
            done = True
        except RunInterruptedError:
            stops += 1
    assert stops == sum(record["steps"] for record in straight["records"])
    assert results(tmp_path) == straight


@pytest.mark.parametrize("every", [0.0, 1e9], ids=["checkpoints each step", "none within a model"])
@pytest.mark.parametrize("step", [4, 9, 14])
def test_killed_and_resumed(
    series: Series,
    straight: dict[str, Any],
    tmp_path: Path,
    step: int,
    every: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train_module, "CHECKPOINT_SECONDS", every)
    with pytest.raises(_KilledError):
        series(tmp_path, _Stop(step, kill=True))
    series(tmp_path)
    assert results(tmp_path) == straight


@pytest.mark.parametrize(
    "choice", [("--ars", "off"), ("--ars", "paper"), ("--ewc-strength", "0")], ids=" ".join
)
def test_resuming_with_every_kind_of_state(
    series: Series, tmp_path: Path, choice: tuple[str, str]
) -> None:
    series(tmp_path / "straight", None, *choice)
    with pytest.raises(RunInterruptedError):
        series(tmp_path / "stopped", _Stop(14), *choice)
    series(tmp_path / "stopped", None, *choice)
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
    table, nothing_to_do = series(tmp_path, _Stop(1))
    assert nothing_to_do
    assert table == markdown_table(json.loads((tmp_path / "metrics.json").read_text()))
    (tmp_path / "metrics.json").unlink()
    series(tmp_path)
    assert results(tmp_path) == straight


def test_a_damaged_checkpoint_is_refused_and_the_remedy_works(
    series: Series, straight: dict[str, Any], tmp_path: Path
) -> None:
    series(tmp_path)
    for name in ("d1-scratch.pt", "d2-inherited.pt"):
        path = tmp_path / "checkpoints" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(UsageError, match=f"{name} is damaged .*delete it and run") as error:
            series(tmp_path)
        assert "\n" not in str(error.value)
        path.unlink()
        series(tmp_path)
        assert results(tmp_path) == straight


def test_a_damaged_or_missing_trunk(
    series: Series, straight: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(RunInterruptedError):
        series(tmp_path, _Stop(10))  # d1 is done, d2 has not begun
    trunk = tmp_path / "checkpoints/d1-scratch-trunk.pt"
    trunk.write_bytes(b"")
    with pytest.raises(UsageError, match=r"d1-scratch-trunk\.pt is damaged"):
        series(tmp_path)
    trunk.unlink()
    series(tmp_path)  # trains d1 again, since d2 has to grow out of it
    assert results(tmp_path) == straight
