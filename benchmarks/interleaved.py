"""Timing of candidates against one another in one run.

The candidates take turns, round by round, so that whatever else the machine does hits all of them
alike; the figure of merit is the ratio of their medians.
"""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

WARM_UP = 3


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def time_all(
    candidates: Mapping[str, Callable[[], object]],
    device: str,
    rounds: int = 21,
    prepare: Mapping[str, Callable[[], object]] | None = None,
    *,
    wait: bool = True,
) -> dict[str, list[float]]:
    """Time every candidate ``rounds`` times, in turns.

    Args:
        candidates: Name and what to time.
        device: "cpu" or "cuda".
        rounds: How often.
        prepare: Name and what to do before each round of that candidate, outside of its time.
        wait: Until the device has done it; else until the call returns.

    Returns:
        Each candidate's times, in seconds, in the order in which they were taken.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(WARM_UP + rounds):
        for name, run in candidates.items():
            if prepare and name in prepare:
                prepare[name]()
            synchronize(device)
            start = time.perf_counter()
            run()
            if wait:
                synchronize(device)
            if index >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def bandwidth(device: str, numel: int = 50_000_000) -> float:
    """Measure a large copy: bytes read and written per second."""
    source = torch.randn(numel, device=device)
    target = torch.empty_like(source)
    copies = time_all({"copy": lambda: target.copy_(source)}, device, rounds=9)["copy"]
    return 2 * source.nbytes / statistics.median(copies)
