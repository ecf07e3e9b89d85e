"""Estimates with intervals, no surer than their number allows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

__all__ = [
    "MIN_SEEDS", "Array", "Estimate", "Interval", "bootstrap_interval", "count_seeds",
    "share_interval",
]  # fmt: skip

Array = NDArray[np.float64]
Interval = tuple[float, float]

MIN_SEEDS = 3  # two give an interval 13 deviations wide
_CONFIDENCE = 0.95


def count_seeds(count: int) -> str:
    """The number in words.

    Example:
        >>> count_seeds(1), count_seeds(3)
        ('1 seed', '3 seeds')
    """
    return f"{count} seed{'' if count == 1 else 's'}"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; ``f"{estimate:.2f}"`` shows it with its interval in brackets.

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
        """The estimate from one or more independent values.

        Example:
            >>> estimate = Estimate.of([1.0, 2.0, 3.0])
            >>> f"{estimate:.2f}", estimate.plus_minus(".2f"), round(estimate.error, 3)
            ('2.00 [-0.48, 4.48]', '2.00 ± 2.48', 0.577)
        """
        mean = float(np.mean(values))
        if len(values) < 2:
            return cls(mean, None, tuple(values))
        half = float(stdtrit(len(values) - 1, 0.5 + _CONFIDENCE / 2)) * _error(values)
        return cls(mean, (mean - half, mean + half), tuple(values))

    @property
    def error(self) -> float:
        """Standard error of the mean; NaN below 2 values."""
        return math.nan if self.interval is None else _error(self.values)

    @property
    def known(self) -> Interval | None:
        """The interval, if enough seeds are behind it to conclude anything."""
        return self.interval if len(self.values) >= MIN_SEEDS else None

    @property
    def margin(self) -> float | None:
        """Half the interval's width; ``None`` below 2 values."""
        return None if self.interval is None else self.interval[1] - self.mean

    def plus_minus(self, form: str) -> str:
        """The mean and half the interval's width, such as "2.10 ± 0.03".

        Args:
            form: of the mean; half the width has no sign.
        """
        margin = "" if self.margin is None else f" ± {self.margin:{form.lstrip('+')}}"
        return f"{self.mean:{form}}{margin}"

    def __format__(self, form: str) -> str:
        if self.interval is None:
            return f"{self.mean:{form}}"
        low, high = self.interval
        return f"{self.mean:{form}} [{low:{form}}, {high:{form}}]"


def _error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def share_interval(successes: int, count: int) -> Interval:
    """Wilson's 95 % interval of a share, which is right for none and for all as well.

    Example:
        >>> low, high = share_interval(0, 10)
        >>> round(low, 3), round(high, 3)
        (0.0, 0.278)

    References:
        Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    from scipy.stats import binomtest  # not above: importing it takes half a second

    found = binomtest(successes, count).proportion_ci(_CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)


def bootstrap_interval(draws: Array, confidence: float) -> Interval:
    """The middle share of a bootstrap's draws.

    Args:
        draws: (S,) values, one a resample.
        confidence: the share, in (0, 1).

    Example:
        >>> bootstrap_interval(np.arange(101.0), 0.5)
        (25.0, 75.0)
    """
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    return float(low), float(high)
