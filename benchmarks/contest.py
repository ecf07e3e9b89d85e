"""A contest: candidates found equal, timed in turns, and handed to pytest-benchmark one by one.

pytest-benchmark times one function to the end before the next, and what a shared machine does
meanwhile is more than the differences looked for. Here the first test of a contest times all of
its candidates in turns. The test of each candidate then plays its samples back: `clock` is the
timer of these tests, and stands still but for the samples. So pytest-benchmark's tables, JSON
files, groups and comparisons are of the samples that were taken in turns.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from counters import data_sheet_bandwidth, host_seconds, launches, peak_memory
from interleaved import time_all

Check = Callable[[], dict[str, Any]]


class Clock:
    """A clock that goes on by the samples of the candidate that is being played back."""

    __name__ = "taken in turns"  # what the JSON calls the timer

    def __init__(self) -> None:
        """Start at zero."""
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time, in seconds."""
        return self.now

    def reset(self) -> None:
        """Go back to zero, so that no sample is rounded by what stands before it."""
        self.now = 0.0


clock = Clock()
# Every file says `pytestmark = PLAYED_BACK`.
PLAYED_BACK = pytest.mark.benchmark(timer=clock)


@dataclass
class Candidate:
    """What is timed.

    Attributes:
        run: One round; None where the times come from other processes.
        prepare: What is done before each round, outside of its time.
        check: Takes a first round and compares its result with the baseline's, before anything is
            timed. It raises where they differ, and returns what the JSON says of the comparison.
        bytes_moved: Bytes a parameter that a round must move, where that is known.
    """

    run: Callable[[], object] | None
    prepare: Callable[[], object] | None = None
    check: Check | None = None
    bytes_moved: float | None = None


@dataclass
class Contest:
    """Candidates for one piece of work.

    Attributes:
        name: The group of pytest-benchmark.
        baseline: The candidate that the others are compared with.
        device: "cpu" or "cuda".
        candidates: By name, in the order of their turns.
        numel: Parameters, for bytes a second.
        copy_bandwidth: Bytes per second of a large copy.
        rounds: Samples of each.
        count_costs: Also count memory, launches and host time, each in runs of its own.
        wait: Time until the device has done it; else until the call returns.
        left_out: Name and reason of those that are not timed.
        notes: Name and what else the JSON says of it.
    """

    name: str
    baseline: str
    device: str
    candidates: dict[str, Candidate] = field(default_factory=dict)
    numel: int | None = None
    copy_bandwidth: float | None = None
    rounds: int = 21
    count_costs: bool = True
    wait: bool = True
    left_out: dict[str, str] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    _wrong: dict[str, Exception] | None = None

    def check(self) -> dict[str, Exception]:
        """Compare all results, once; return what was found of those that are wrong."""
        if self._wrong is None:
            self._wrong = {}
            for name, candidate in self.candidates.items():
                try:
                    found = candidate.check() if candidate.check else {}
                except Exception as error:  # of any library; the test of this candidate raises it
                    self._wrong[name] = error
                else:
                    self.notes.setdefault(name, {}).update(found)
        return self._wrong

    def play(self, name: str, benchmark: Any) -> None:
        """Check all, time all in turns if that is not done yet, and play one candidate back.

        Args:
            name: The candidate.
            benchmark: pytest-benchmark's fixture.
        """
        if name in self.left_out:
            pytest.skip(self.left_out[name])
        benchmark.group = self.name
        wrong = self.check()
        candidate = self.candidates[name]
        if name in wrong:
            benchmark.pedantic(_raise, (wrong[name],))
        if not benchmark.enabled and candidate.run is None:
            pytest.skip("its times come from other processes")
        if benchmark.enabled:
            if not self.seconds:
                self._time({key: each for key, each in self.candidates.items() if key not in wrong})
            if self.baseline not in self.seconds:
                pytest.fail(f"the baseline {self.baseline} has no times: see its own test")
            self.rows[name] = self._row(name, candidate)
            benchmark.extra_info |= self.rows[name]
        samples = self.seconds.get(name, [])
        left = iter(samples)
        benchmark.pedantic(
            _next_sample, (left, candidate), setup=clock.reset, rounds=len(samples) or 1
        )
        if benchmark.enabled and benchmark.stats.stats.data != samples:
            raise RuntimeError("another timer was used: the file needs `pytestmark = PLAYED_BACK`")

    def _time(self, right: dict[str, Candidate]) -> None:
        self.seconds = time_all(
            {name: each.run for name, each in right.items() if each.run is not None},
            self.device,
            self.rounds,
            {name: each.prepare for name, each in right.items() if each.prepare is not None},
            wait=self.wait,
        )

    def _row(self, name: str, candidate: Candidate) -> dict[str, Any]:
        """Return what pytest-benchmark's statistics do not say."""
        median, base = (statistics.median(self.seconds[key]) for key in (name, self.baseline))
        row: dict[str, Any] = {
            "candidate": name,
            "baseline": self.baseline,
            "time / baseline": round(median / base, 4),
            "shortest / baseline": round(
                min(self.seconds[name]) / min(self.seconds[self.baseline]), 4
            ),
        }
        if candidate.bytes_moved is not None and self.numel is not None:
            rate = candidate.bytes_moved * self.numel / median
            row |= {"bytes a parameter": candidate.bytes_moved, "GB/s": round(rate / 1e9, 1)}
            if self.copy_bandwidth is not None:
                row["of a copy"] = round(rate / self.copy_bandwidth, 3)
            if (sheet := data_sheet_bandwidth(self.device)) is not None:
                row["of the data sheet"] = round(rate / sheet, 3)
        if self.count_costs and (run := candidate.run) is not None:
            row["peak MB"] = round(peak_memory(run) / 1e6, 2)
            if self.device == "cuda":
                row["launches"] = launches(run, self.device)
                row["host us"] = round((host_seconds(run, self.device) or 0.0) * 1e6, 1)
        return row | {"check": self.notes.get(name) or None}


def _raise(error: Exception) -> None:
    raise error


def _next_sample(left: Iterator[float], candidate: Candidate) -> None:
    """Let the clock go on by a sample; run in earnest where none is left, as for a profile."""
    if (sample := next(left, None)) is not None:
        clock.now += sample
        return
    if candidate.run is None:
        raise RuntimeError("its times come from other processes; nothing can be run here")
    if candidate.prepare is not None:
        candidate.prepare()
    candidate.run()
