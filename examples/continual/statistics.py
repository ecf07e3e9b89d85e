"""Figures of a run, and of several seeds."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy.special import stdtrit

__all__ = ["Estimate", "average_accuracy", "estimate", "forgetting", "seen_so_far"]

Matrix = Sequence[Sequence[float]]


class Estimate(NamedTuple):
    """Mean of several seeds; with one seed the others are NaN.

    Args:
        mean: arithmetic mean.
        error: standard error of the mean.
        half: half the width of the 95 % confidence interval, by Student's t.
    """

    mean: float
    error: float
    half: float


def average_accuracy(accuracy: Matrix) -> float:
    """Mean accuracy over all tasks after the last one."""
    return statistics.fmean(accuracy[-1])


def forgetting(accuracy: Matrix) -> float | None:
    """How far the earlier tasks have fallen from their best, on average; None with one row.

    Example:
        >>> forgetting([[90, 10, 10], [80, 95, 10], [70, 90, 99]])
        12.5
    """
    last = len(accuracy) - 1
    if last == 0:
        return None
    drops = [max(row[s] for row in accuracy) - accuracy[last][s] for s in range(last)]
    return statistics.fmean(drops)


def seen_so_far(accuracy: Matrix) -> list[float]:
    """After each task, the mean accuracy over the tasks learned until then.

    Example:
        >>> seen_so_far([[90, 10], [80, 96]])
        [90.0, 88.0]
    """
    return [statistics.fmean(row[: t + 1]) for t, row in enumerate(accuracy)]


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, standard error and 95 % interval of independent values.

    Example:
        >>> [round(x, 3) for x in estimate([1.0, 2.0, 3.0])]
        [2.0, 0.577, 2.484]
    """
    n = len(values)
    if n == 1:
        return Estimate(values[0], math.nan, math.nan)
    error = statistics.stdev(values) / math.sqrt(n)
    return Estimate(statistics.fmean(values), error, float(stdtrit(n - 1, 0.975)) * error)
