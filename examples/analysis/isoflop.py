"""The isoFLOP method: the best size at each budget, and powers of the budget through them.

At one budget C the loss over log N is near its minimum a parabola; its vertex is N*(C). D*(C) is
read off the runs of the budget, whose log D is a straight line in log N. Then N* ~ C^a, D* ~ C^b.

The method needs no form of L(N, D), but a parabola fitted to sizes far from the minimum, or not
centred on it, is biased; budgets whose minimum is not between their sizes are left out and named.

Reference:
    Hoffmann et al., "Training Compute-Optimal Large Language Models", arXiv:2203.15556, approach 2.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.power_sums import Array

__all__ = ["IsoFlopFit", "fit_isoflop"]

_SAME_BUDGET = 0.1  # in log C
_MIN_SIZES = 5
_MIN_BUDGETS = 4
_MIN_INTERIOR = 3


@dataclass(frozen=True)
class IsoFlopFit:
    """Compute-optimal sizes and tokens.

    Args:
        a: exponent of N* in C.
        b: exponent of D* in C.
        intervals: of a and b by bootstrap of the parabolas' residuals; empty without one.
        confidence: of the intervals.
        budgets: C, N*, D* and the fitted loss of each budget used.
        left_out: budgets without an interior minimum.
    """

    a: float
    b: float
    intervals: dict[str, tuple[float, float]]
    confidence: float
    budgets: tuple[dict[str, float], ...]
    left_out: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps."""
        return {
            "law": "N* ~ C^a, D* ~ C^b",
            "a": self.a,
            "b": self.b,
            "intervals": {name: list(pair) for name, pair in self.intervals.items()},
            "confidence": self.confidence,
            "budgets": [dict(budget) for budget in self.budgets],
            "left_out": list(self.left_out),
        }


@dataclass(frozen=True)
class _Parabola:
    log_flops: float
    x: Array  # log N, centred
    middle: float  # of log N
    losses: Array
    line: Array  # log D = line[0] x + line[1]

    def fit(self, losses: Array) -> Array:
        """Coefficients (..., 3), highest power first, of losses (..., n)."""
        coefficients: Array = np.polyfit(self.x, np.atleast_2d(losses).T, 2).T
        return coefficients

    def vertex(self, coefficients: Array) -> Array:
        """Where the parabola is least, NaN if it opens downwards or lies outside the sizes."""
        curvature, slope = coefficients[:, 0], coefficients[:, 1]
        place = -slope / (2 * np.where(curvature > 0, curvature, np.nan))
        inside = (place > self.x.min()) & (place < self.x.max())
        return np.where(inside, place, np.nan)


def fit_isoflop(
    log_n: Array,
    log_d: Array,
    losses: Array,
    log_c: Array,
    *,
    bootstraps: int,
    confidence: float,
    seed: int,
) -> IsoFlopFit:
    """See `analysis.scaling.ScalingLawValidator.isoflop`; sizes, tokens and budgets as logarithms.

    Raises:
        ValueError: see there.
    """
    parabolas = []
    order = np.argsort(log_c, kind="stable")
    cuts = np.flatnonzero(np.diff(log_c[order]) > _SAME_BUDGET) + 1
    for group in np.split(order, cuts):
        sizes = 1 + int((np.diff(np.sort(log_n[group])) > 1e-3).sum())
        if sizes >= _MIN_SIZES:
            middle = float(log_n[group].mean())
            x = log_n[group] - middle
            line = np.polyfit(x, log_d[group], 1)
            level = float(log_c[group].mean())
            parabolas.append(_Parabola(level, x, middle, losses[group], line))
    if len(parabolas) < _MIN_BUDGETS:
        raise ValueError(
            f"{len(parabolas)} of {cuts.size + 1} budgets have {_MIN_SIZES} or more sizes: the "
            f"isoFLOP method needs {_MIN_BUDGETS}; train {_MIN_SIZES} sizes at each of "
            f"{_MIN_BUDGETS} budgets, tokens adjusted to cost the same"
        )
    used: list[tuple[_Parabola, Array, float]] = []
    left_out = []
    for parabola in parabolas:
        coefficients = parabola.fit(parabola.losses)
        place = float(parabola.vertex(coefficients)[0])
        if np.isnan(place):
            left_out.append(float(np.exp(parabola.log_flops)))
        else:
            used.append((parabola, coefficients[0], place))
    if len(used) < _MIN_INTERIOR:
        raise ValueError(
            f"only {len(used)} budgets have their minimum between the sizes tried: "
            f"{_MIN_INTERIOR} are needed; add smaller and larger sizes at the others"
        )
    log_c_used = np.array([p.log_flops for p, _, _ in used])
    places = np.array([[place] for _, _, place in used])
    a, b = _exponents(log_c_used, places, used)
    intervals = {}
    if bootstraps:
        draws = _resample(used, bootstraps, np.random.default_rng(seed))
        tail = (1.0 - confidence) / 2.0
        for name, values in zip("ab", _exponents(log_c_used, draws, used), strict=True):
            low, high = np.quantile(values, [tail, 1.0 - tail])
            intervals[name] = (float(low), float(high))
    budgets = tuple(
        {
            "flops": float(np.exp(parabola.log_flops)),
            "params": float(np.exp(place + parabola.middle)),
            "tokens": float(np.exp(np.polyval(parabola.line, place))),
            "loss": float(np.polyval(coefficients, place)),
            "runs": parabola.x.size,
        }
        for parabola, coefficients, place in used
    )
    return IsoFlopFit(float(a[0]), float(b[0]), intervals, confidence, budgets, tuple(left_out))


def _exponents(
    log_c: Array, places: Array, used: list[tuple[_Parabola, Array, float]]
) -> tuple[Array, Array]:
    """Slopes of log N* and log D* over log C for vertices (budgets, S)."""
    middles = np.array([[p.middle] for p, _, _ in used])
    lines = np.array([p.line for p, _, _ in used])
    log_d = lines[:, :1] * places + lines[:, 1:]
    return np.polyfit(log_c, places + middles, 1)[0], np.polyfit(log_c, log_d, 1)[0]


def _resample(
    used: list[tuple[_Parabola, Array, float]], count: int, generator: np.random.Generator
) -> Array:
    """Vertices (budgets, S) of parabolas fitted to resampled residuals."""
    rows = []
    for parabola, coefficients, _ in used:
        fitted = np.polyval(coefficients, parabola.x)
        points = parabola.x.size
        residuals = (parabola.losses - fitted) * np.sqrt(points / (points - 3))
        drawn = fitted + residuals[generator.integers(0, points, (count, points))]
        place = parabola.vertex(parabola.fit(drawn))
        # A resample without a minimum says that the best size lies at an end, whichever is lower.
        ends = drawn[:, np.argmin(parabola.x)] < drawn[:, np.argmax(parabola.x)]
        edge = np.where(ends, parabola.x.min(), parabola.x.max())
        rows.append(np.where(np.isnan(place), edge, place))
    return np.stack(rows)
