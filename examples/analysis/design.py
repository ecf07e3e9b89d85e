"""Whether a set of runs can determine a law at all, asked before anything is fitted."""

from collections.abc import Sequence

import numpy as np

from analysis.power_sums import Array

__all__ = ["Numbers", "check_compute", "check_design", "checked"]

_MIN_POINTS = 6  # one more than E, A, B, alpha and beta; seeds repeat a point and add none
_MIN_COMPUTE_RUNS = 4  # one more than E, K and gamma
_MIN_VALUES = 3  # a constant and a power cannot be told apart by fewer
_LARGEST_CORRELATION = 0.99  # of log N and log D

Numbers = Sequence[float] | Array


def checked(name: str, values: Numbers, like: Numbers | None = None) -> Array:
    """The values as an array.

    Args:
        name: for messages.
        values: one a run.
        like: the values of another quantity, to be as many; ``None`` for any number.

    Raises:
        ValueError: a value is not positive and finite, or their number is another.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name} must be a list of numbers, got shape {array.shape}")
    if like is not None and array.size != len(like):
        raise ValueError(f"{name} has {array.size} values for {len(like)} runs; give one a run")
    bad = ~(np.isfinite(array) & (array > 0))
    if bad.any():
        first = int(np.argmax(bad))
        raise ValueError(
            f"{name}[{first}] is {array[first]:g}; every value must be positive and finite "
            "(leave out runs that diverged)"
        )
    return array


def _distinct(logs: Array) -> int:
    return 1 + int((np.diff(np.sort(logs)) > 1e-3).sum()) if logs.size else 0


def check_design(x: Array) -> None:
    """See whether runs at (log N, log D), shape (2, n), can determine both exponents.

    Raises:
        ValueError: they cannot; the message says why and what would.
    """
    points = len(np.unique(np.round(x, 3), axis=1).T)
    if points < _MIN_POINTS:
        raise ValueError(
            f"{x.shape[1]} runs at {points} different (N, D) cannot determine the five parameters "
            f"of E + A/N^alpha + B/D^beta: give {_MIN_POINTS} or more, at several sizes and token "
            "counts"
        )
    for name, unit, logs in (("N", "sizes", x[0]), ("D", "token counts", x[1])):
        if (values := _distinct(logs)) < _MIN_VALUES:
            raise ValueError(
                f"only {values} different {unit} {name}: its exponent cannot be told from the "
                f"constant E; train at {_MIN_VALUES} or more {unit}"
            )
    correlation = float(np.asarray(np.corrcoef(x))[0, 1])
    if abs(correlation) > _LARGEST_CORRELATION:
        reason = (
            "N and D move together"
            if correlation > 0
            else "all runs have nearly the same product N D"
        )
        raise ValueError(
            f"{reason} (correlation of log N and log D {correlation:+.4f}): only one exponent can "
            "be identified. Fit E + K C^-gamma instead (fit_compute), or train each size at "
            "several token counts"
        )


def check_compute(x: Array) -> None:
    """See whether runs at log C, shape (1, n), can determine E + K C^-gamma.

    Raises:
        ValueError: they are too few.
    """
    if x.shape[1] < _MIN_COMPUTE_RUNS or _distinct(x[0]) < _MIN_VALUES:
        raise ValueError(
            f"{x.shape[1]} runs at {_distinct(x[0])} budgets cannot determine the three parameters "
            f"of E + K C^-gamma: give {_MIN_COMPUTE_RUNS} or more runs at {_MIN_VALUES} or more "
            "budgets"
        )
