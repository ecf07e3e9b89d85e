"""Means with intervals, no surer than their number allows."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

__all__ = ["MIN_SEEDS", "Estimate", "Interval", "mean_interval"]

Interval = tuple[float, float]

MIN_SEEDS = 3  # two give an interval 13 deviations wide
_CONFIDENCE = 0.95


def mean_interval(values: Sequence[float]) -> tuple[float, Interval | None]:
    """Mean of independent values and its 95 % t interval, ``None`` for a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.ppf(0.5 + _CONFIDENCE / 2, len(values) - 1)) * error
    return mean, (mean - half, mean + half)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Args:
        mean: of the values.
        interval: 95 % t interval of the mean; ``None`` below 2 values.
        values: one a seed.
    """

    mean: float
    interval: Interval | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """The estimate from one value or more.

        Example:
            >>> Estimate.of([1.0, 3.0]).mean
            2.0
        """
        mean, interval = mean_interval(values)
        return cls(mean, interval, tuple(values))

    @property
    def known(self) -> Interval | None:
        """The interval, if enough seeds are behind it to conclude anything."""
        return self.interval if len(self.values) >= MIN_SEEDS else None

    @property
    def margin(self) -> float | None:
        """Half the interval's width; ``None`` below 2 values."""
        return None if self.interval is None else self.interval[1] - self.mean

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps."""
        return asdict(self)
