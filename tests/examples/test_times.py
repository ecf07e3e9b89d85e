"""The times and speeds that are reported, and when the device is waited for."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_series import Series, results

from trainer import training_loop
from trainer.kept_states import Keeper
from trainer.parallel import Parallel
from trainer.recorder import Recorder, Update
from trainer.step_log import read_log
from trainer.training_loop import Pace

TOKENS = 2 * 16  # a step of the small series


def lasts(step: int) -> float:
    return 0.2 + 0.1 * (step % 3)


def test_a_row_has_the_time_and_speed_of_its_own_step(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def slow(work: Any, seconds: Any) -> Any:
        def run(*given: Any, **named: Any) -> Any:
            nonlocal now
            now += seconds(*given)
            return work(*given, **named)

        return run

    clock = SimpleNamespace(perf_counter=lambda: now, monotonic=lambda: now)
    monkeypatch.setattr(training_loop, "time", clock)
    monkeypatch.setattr(
        training_loop, "step", slow(training_loop.step, lambda state, *_: lasts(state.step + 1))
    )
    monkeypatch.setattr(
        training_loop, "bits_per_byte", slow(training_loop.bits_per_byte, lambda *_: 5.0)
    )
    monkeypatch.setattr(Keeper, "save", slow(Keeper.save, lambda *_: 7.0))
    words = ("--checkpoint-seconds", "0", "--peak-flops", "1e9", "--curve-points", "3")
    series(tmp_path, None, *words)
    paths = list(tmp_path.glob("log_*.csv"))
    assert len(paths) == 4
    for path in paths:
        first, *rows = read_log(path)
        if "@" not in path.name:
            assert any(row["val_bpb"] is None for row in rows)  # both kinds of rows are there
            assert sum(row["val_bpb"] is not None for row in rows) > 2
        before = first
        for row in rows:
            spent = lasts(row["step"])
            assert row["seconds"] - before["seconds"] == pytest.approx(spent, abs=2e-3)
            assert row["tokens_per_second"] == pytest.approx(TOKENS / spent, rel=1e-3)
            flops = row["flops"] - before["flops"]
            assert row["mfu"] == pytest.approx(flops / spent / 1e9, abs=1e-5)
            before = row


def test_compiling_counts_as_no_time(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def slow(state: Any, *given: Any) -> Any:
        nonlocal now
        now += 1.0 if state.step else 100.0
        return step(state, *given)

    step = training_loop.step
    clock = SimpleNamespace(perf_counter=lambda: now, monotonic=lambda: now)
    monkeypatch.setattr(training_loop, "time", clock)
    monkeypatch.setattr(training_loop, "step", slow)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    series(tmp_path, None, "--arms", "scratch", "--compile")
    rows = read_log(tmp_path / "log_d1-scratch.csv")
    assert [row["seconds"] for row in rows] == [0.0, *map(float, range(len(rows) - 1))]
    assert rows[1]["tokens_per_second"] is None


def test_the_steps_between_two_reads_share_their_time() -> None:
    rows: list[dict[str, Any]] = []
    hears = SimpleNamespace(write=rows.append, show=lambda _: None)
    optimizer = SimpleNamespace(shown=dict)
    state: Any = SimpleNamespace(step=10, seconds=100.0, optimizer=optimizer)
    plan: Any = SimpleNamespace(
        settings=SimpleNamespace(batch_size=4), prior_tokens=0, prior_flops=0, flops_per_step=6
    )
    run: Any = SimpleNamespace(
        config=SimpleNamespace(sequence_len=8),
        machine=SimpleNamespace(peak_flops=2.0),
        parallel=SimpleNamespace(device=torch.device("cpu"), world_size=2),
    )
    recorder = Recorder(state, hears, hears, lambda _: None, plan, run)  # type: ignore[arg-type]
    for seconds in (100.1, 100.2, 104.0):  # the host runs ahead, and then waits
        state.step, state.seconds = state.step + 1, seconds
        recorder.add(state, Update(torch.ones(()), 0.1, None), None)
    assert rows == []
    recorder.read(state)
    assert [row["step"] for row in rows] == [11, 12, 13]
    assert [row["seconds"] for row in rows] == [101.333, 102.667, 104.0]
    assert {row["tokens_per_second"] for row in rows} == {24.0}
    assert {row["mfu"] for row in rows} == {6 * 0.75 / 4}


def test_waiting_seldom_changes_no_number_and_loses_no_row(
    series: Series, straight: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seldom(Pace):
        """As on a GPU."""

        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self._most = 20

    reads = 0
    read = Recorder.read

    def count(self: Recorder, state: Any) -> None:
        nonlocal reads
        reads += 1
        read(self, state)

    monkeypatch.setattr(training_loop, "Pace", Seldom)
    monkeypatch.setattr(Recorder, "read", count)
    words = ("--curve-points", "1")  # the device is waited for at each of these, too
    series(tmp_path / "seldom", None, *words)
    seldom, reads = reads, 0
    monkeypatch.setattr(training_loop, "Pace", Pace)
    series(tmp_path / "always", None, *words)
    assert seldom < reads
    assert results(tmp_path / "seldom") == results(tmp_path / "always")
    assert results(tmp_path / "seldom")["models"] == straight["models"]


class _Processes(Parallel):
    """This process beside another one, which needs a time of its own for a step."""

    def __init__(self, device: str, theirs: float) -> None:
        self.device, self.world_size, self.theirs = torch.device(device), 2, theirs
        self.waited = 0.0

    def any(self, flag: bool) -> bool:
        return flag or self.waited > 2.0


def waits(ours: float, theirs: float, device: str = "cuda") -> list[int]:
    """Steps of 100 that are waited for."""
    parallel = _Processes(device, theirs)
    state: Any = SimpleNamespace(step=0, seconds=0.0)
    plan: Any = SimpleNamespace(steps=100)
    pace = Pace(state, plan, parallel)
    found = [0]
    for step in range(1, 101):
        state.step, state.seconds = step, step * ours
        if pace.is_due(step):
            parallel.waited = (step - found[-1]) * theirs
            pace.waited(state)
            found.append(step)
    return found[1:]


def test_quick_steps_are_waited_for_every_twenty() -> None:
    assert waits(0.01, 0.01) == [1, 3, 7, 15, 31, 51, 71, 91, 100]


@pytest.mark.parametrize("seconds", [0.3, 0.9, 1.9, 10.0])
def test_a_signal_waits_some_seconds_or_one_step(seconds: float) -> None:
    found = waits(seconds, 0.0)
    stretches = [b - a for a, b in zip([0, *found], found, strict=False)]
    assert max(stretches) * seconds <= max(4.0, seconds)
    assert waits(0.0, seconds) == found  # the slowest process decides for all


def test_on_the_cpu_every_step_is_waited_for() -> None:
    assert waits(0.01, 0.01, "cpu") == list(range(1, 101))
