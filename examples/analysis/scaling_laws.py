r"""Scaling laws with intervals, a score that counts, and a refusal where the data cannot tell.

    fit:          L(N, D) = E + A N^-alpha + B D^-beta        runs whose N and D vary apart
    fit_compute:  L(C)    = E + K C^-gamma                    a series with one run a budget
    isoflop:      N* ~ C^a, D* ~ C^b                          budgets with several sizes each

The score is the error on the runs with the largest compute when the law was fitted to the others:
R^2 is close to 1 for nearly any curve through falling losses.

The loss may be in nats or bits, a token or a byte; N may count all parameters or only those in
matrix products. The exponents depend on that choice more than on anything else, so say which.
Runs must be comparable: all cooled down, none stopped on the way.

The isoFLOP method needs no form of L(N, D). At one budget C the loss over log N is near its minimum
a parabola; its vertex is N*(C). D*(C) is read off the runs of the budget, whose log D is a straight
line in log N. A parabola fitted to sizes far from the minimum, or not centred on it, is biased;
budgets whose minimum is not between their sizes are left out and named.

References:
    Hoffmann et al., "Training Compute-Optimal Large Language Models", arXiv:2203.15556; the isoFLOP
    method is its approach 2.
    Besiroglu et al., "Chinchilla Scaling: A Replication Attempt", arXiv:2404.10102.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from analysis.power_laws import (
    FLOPS_PER_PARAMETER_TOKEN,
    ChinchillaLaw,
    ComputeLaw,
    PowerLaw,
    count_distinct,
    fit_power_law,
    refine,
)
from analysis.records import Record, chain
from common.statistics import Array, Interval, bootstrap_interval

__all__ = ["ArmLaws", "HoldOut", "IsoFlopFit", "ScalingLawValidator", "fit_series"]

_BOOTSTRAP_TOLERANCE = 1e-6  # far below the width of any interval
_TIE = 1e-6  # relative; sums of logarithms of equal products differ by rounding
_CHUNK = 500  # bootstrap fits at a time: bounds the memory
_SAME_BUDGET = 0.1  # in log C
_MIN_SIZES = 5
_MIN_BUDGETS = 4
_MIN_INTERIOR = 3
_GROWN = (
    "models of this series were grown: part of their tokens was seen by smaller ancestors, so "
    "L(N, D) does not describe them; see the law in C, the operations of the whole lineage"
)

Numbers = Sequence[float] | Array
_Law = TypeVar("_Law", bound=PowerLaw)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class HoldOut:
    """Predictions of the runs with the largest compute from a fit to the others.

    Args:
        runs: indices of the runs held out.
        predicted: their losses by the law.
        measured: their losses.
        rms_relative_error: root mean square of log(predicted / measured), the score.
        worst_relative_error: largest absolute value of it.
    """

    runs: tuple[int, ...]
    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    rms_relative_error: float
    worst_relative_error: float

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps."""
        return asdict(self)


@dataclass(frozen=True)
class IsoFlopFit:
    """Compute-optimal sizes and tokens.

    Args:
        a: exponent of N* in C.
        b: exponent of D* in C.
        intervals: of a and b by bootstrap of the parabolas' residuals; empty without one.
        confidence: of the intervals.
        budgets: C, N*, D*, the fitted loss and the number of runs of each budget used.
        left_out: budgets without an interior minimum.
    """

    a: float
    b: float
    intervals: dict[str, Interval]
    confidence: float
    budgets: tuple[dict[str, float], ...]
    left_out: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps."""
        return {"law": "N* ~ C^a, D* ~ C^b", **asdict(self)}


class ScalingLawValidator:
    """Fits scaling laws and says how far to trust them.

    Args:
        huber_delta: residuals of log L beyond it count linearly; > 0.
        bootstraps: resamples of the runs behind every interval; 0 for none.
        confidence: of the intervals, in (0, 1).
        seed: of the resampling.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> sizes = [1e7, 3e7, 1e8, 3e8]
        >>> runs = [(n, d) for n in sizes for d in (1e9, 1e10, 1e11)]
        >>> losses = [1.8 + 480 * n**-0.35 + 2000 * d**-0.37 for n, d in runs]
        >>> law = ScalingLawValidator(bootstraps=0).fit(*zip(*runs), losses)
        >>> round(law.E, 4), round(law.alpha, 4), round(law.beta, 4)
        (1.8, 0.35, 0.37)
    """

    def __init__(
        self,
        *,
        huber_delta: float = 1e-3,
        bootstraps: int = 1000,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> None:
        if not 0.0 < huber_delta < math.inf:
            raise ValueError(f"huber_delta must be positive and finite, got {huber_delta}")
        if bootstraps < 0:
            raise ValueError(f"bootstraps must be >= 0, got {bootstraps}")
        if not 0.0 < confidence < 1.0:
            raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
        self.huber_delta = huber_delta
        self.bootstraps = bootstraps
        self.confidence = confidence
        self.seed = seed

    def fit(self, params: Numbers, tokens: Numbers, losses: Numbers) -> ChinchillaLaw:
        """Fit L = E + A N^-alpha + B D^-beta.

        Args:
            params: N of each run, > 0.
            tokens: D of each run, > 0.
            losses: L of each run, > 0.

        Raises:
            ValueError: there are fewer than 6 different pairs of N and D or 3 values of either,
                or one follows from the other, so that only one exponent can be identified.
        """
        x, y = _logarithms(params=params, tokens=tokens, losses=losses)
        return self._fit(ChinchillaLaw, x, y, self.bootstraps)

    def fit_compute(self, flops: Numbers, losses: Numbers) -> ComputeLaw:
        """Fit L = E + K C^-gamma, all that a series with one run a budget can tell.

        Args:
            flops: C of each run, > 0; of the whole lineage if a model was grown.
            losses: L of each run, > 0.

        Raises:
            ValueError: there are fewer than 4 runs or 3 budgets.
        """
        x, y = _logarithms(flops=flops, losses=losses)
        return self._fit(ComputeLaw, x, y, self.bootstraps)

    def holdout(
        self, params: Numbers, tokens: Numbers, losses: Numbers, *, share: float = 0.25
    ) -> HoldOut:
        """Fit L(N, D) without the runs of largest N D and predict them.

        Args:
            params: N of each run, > 0.
            tokens: D of each run, > 0.
            losses: L of each run, > 0.
            share: of the runs held out, in (0, 1), rounded up; and all as large as the smallest
                of these.

        Raises:
            ValueError: as `fit`, for the runs that are left.
        """
        x, y = _logarithms(params=params, tokens=tokens, losses=losses)
        return self._hold_out(ChinchillaLaw, x, y, share)

    def holdout_compute(self, flops: Numbers, losses: Numbers, *, share: float = 0.25) -> HoldOut:
        """Fit L(C) without the runs of largest C and predict them.

        Args:
            flops: C of each run, > 0.
            losses: L of each run, > 0.
            share: of the runs held out, in (0, 1), rounded up; and all as large as the smallest
                of these.

        Raises:
            ValueError: as `fit_compute`, for the runs that are left.
        """
        x, y = _logarithms(flops=flops, losses=losses)
        return self._hold_out(ComputeLaw, x, y, share)

    def isoflop(
        self, params: Numbers, tokens: Numbers, losses: Numbers, flops: Numbers
    ) -> IsoFlopFit:
        """Fit a parabola in log N at each budget and powers of C through their minima.

        Args:
            params: N of each run, > 0.
            tokens: D of each run, > 0.
            losses: L of each run, > 0.
            flops: C of each run, > 0; runs within 10 % of each other share a budget.

        Raises:
            ValueError: there are fewer than 4 budgets with 5 sizes, or fewer than 3 of them have
                their minimum inside the sizes tried.
        """
        x, _ = _logarithms(params=params, tokens=tokens, flops=flops, losses=losses)
        budgets = _budgets(x, np.asarray(losses, dtype=np.float64))
        used = [budget for budget in budgets if not np.isnan(budget.place)]
        if len(used) < _MIN_INTERIOR:
            raise ValueError(
                f"only {len(used)} budgets have their minimum between the sizes tried: "
                f"{_MIN_INTERIOR} are needed; add smaller and larger sizes at the others"
            )
        a, b = _exponents(used, np.array([[budget.place] for budget in used]))
        intervals = {}
        if self.bootstraps:
            generator = np.random.default_rng(self.seed)
            draws = np.stack([budget.resampled(self.bootstraps, generator) for budget in used])
            for name, values in zip("ab", _exponents(used, draws), strict=True):
                intervals[name] = bootstrap_interval(values, self.confidence)
        return IsoFlopFit(
            a=float(a[0]),
            b=float(b[0]),
            intervals=intervals,
            confidence=self.confidence,
            budgets=tuple(budget.optimum for budget in used),
            left_out=tuple(float(np.exp(p.log_flops)) for p in budgets if np.isnan(p.place)),
        )

    def _fit(self, kind: type[_Law], x: Array, y: Array, bootstraps: int) -> _Law:
        kind.check_design(x)
        centred = x - x.mean(axis=1, keepdims=True)
        theta = fit_power_law(centred, y, self.huber_delta)
        generator = np.random.default_rng(self.seed)
        parts = [np.empty((0, theta.size))]
        for first in range(0, bootstraps, _CHUNK):
            size = (min(_CHUNK, bootstraps - first), y.size)
            # Resampling the runs with replacement is giving each a weight.
            weights = generator.multinomial(y.size, np.full(y.size, 1.0 / y.size), size=size[0])
            parts.append(
                refine(
                    np.broadcast_to(theta, (size[0], theta.size)),
                    centred,
                    np.broadcast_to(y, size),
                    weights.astype(np.float64),
                    self.huber_delta,
                    tolerance=_BOOTSTRAP_TOLERANCE,
                )[0]
            )
        return kind.of(theta, np.concatenate(parts), x, y, self.confidence)

    def _hold_out(self, kind: type[PowerLaw], x: Array, y: Array, share: float) -> HoldOut:
        if not 0.0 < share < 1.0:
            raise ValueError(f"share must lie between 0 and 1, got {share}")
        order = x.sum(axis=0)
        count = math.ceil(share * y.size)
        # With all of equal size: seeds of a run that is predicted would give its loss away.
        held_out = order >= np.sort(order)[-count] - _TIE
        law = self._fit(kind, x[:, ~held_out], y[~held_out], 0)
        predicted = law.predict(*np.exp(x[:, held_out]))
        errors = np.log(predicted) - y[held_out]
        return HoldOut(
            runs=tuple(np.flatnonzero(held_out).tolist()),
            predicted=tuple(predicted.tolist()),
            measured=tuple(np.exp(y[held_out]).tolist()),
            rms_relative_error=float(np.sqrt(np.mean(errors**2))),
            worst_relative_error=float(np.abs(errors).max()),
        )


def _logarithms(*, losses: Numbers, **variables: Numbers) -> tuple[Array, Array]:
    """Logarithms of the variables (K, n) and of the losses (n,), which have to be one a run."""
    runs = len(next(iter(variables.values())))
    checked = []
    for name, values in (*variables.items(), ("losses", losses)):
        array = np.asarray(values, dtype=np.float64)
        if array.ndim != 1:
            raise ValueError(f"{name} must be a list of numbers, got shape {array.shape}")
        if array.size != runs:
            raise ValueError(f"{name} has {array.size} values for {runs} runs; give one a run")
        bad = ~(np.isfinite(array) & (array > 0))
        if bad.any():
            first = int(np.argmax(bad))
            raise ValueError(
                f"{name}[{first}] is {array[first]:g}; every value must be positive and finite "
                "(leave out runs that diverged)"
            )
        checked.append(np.log(array))
    return np.stack(checked[:-1]), checked[-1]


class _Budget:
    """Runs of one budget, and the parabola through their losses over the centred log N."""

    def __init__(self, x: Array, losses: Array) -> None:
        log_n, log_d, log_c = x
        self.log_flops = float(log_c.mean())
        self.middle = float(log_n.mean())
        self.x = log_n - self.middle
        self.losses = losses
        self.line = np.polyfit(self.x, log_d, 1)  # log D = line[0] x + line[1]
        self.coefficients = np.polyfit(self.x, losses, 2)
        self.place = float(self._vertices(self.coefficients[:, None])[0])

    def _vertices(self, coefficients: Array) -> Array:
        """Where parabolas (3, S) are least, NaN if open downwards or least outside the sizes."""
        curvature, slope = coefficients[0], coefficients[1]
        place = -slope / (2 * np.where(curvature > 0, curvature, np.nan))
        inside = (place > self.x.min()) & (place < self.x.max())
        return np.where(inside, place, np.nan)

    def resampled(self, count: int, generator: np.random.Generator) -> Array:
        """Vertices (S,) of parabolas fitted to resampled residuals."""
        points = self.x.size
        fitted = np.polyval(self.coefficients, self.x)
        residuals = (self.losses - fitted) * np.sqrt(points / (points - 3))
        drawn = fitted + residuals[generator.integers(0, points, (count, points))]
        place = self._vertices(np.polyfit(self.x, drawn.T, 2))
        # A resample without a minimum says that the best size lies at an end, whichever is lower.
        ends = drawn[:, np.argmin(self.x)] < drawn[:, np.argmax(self.x)]
        edge = np.where(ends, self.x.min(), self.x.max())
        return np.where(np.isnan(place), edge, place)

    @property
    def optimum(self) -> dict[str, float]:
        return {
            "flops": float(np.exp(self.log_flops)),
            "params": float(np.exp(self.place + self.middle)),
            "tokens": float(np.exp(np.polyval(self.line, self.place))),
            "loss": float(np.polyval(self.coefficients, self.place)),
            "runs": self.x.size,
        }


def _budgets(x: Array, losses: Array) -> list[_Budget]:
    """The budgets with enough sizes, ascending, of runs at (log N, log D, log C), shape (3, n)."""
    log_c = x[2]
    order = np.argsort(log_c, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(log_c[order]) > _SAME_BUDGET) + 1)
    found = [
        _Budget(x[:, group], losses[group])
        for group in groups
        if count_distinct(x[0, group]) >= _MIN_SIZES
    ]
    if len(found) < _MIN_BUDGETS:
        raise ValueError(
            f"{len(found)} of {len(groups)} budgets have {_MIN_SIZES} or more sizes: the isoFLOP "
            f"method needs {_MIN_BUDGETS}; train {_MIN_SIZES} sizes at each of {_MIN_BUDGETS} "
            "budgets, tokens adjusted to cost the same"
        )
    return found


def _exponents(budgets: Sequence[_Budget], places: Array) -> tuple[Array, Array]:
    """Slopes of log N* and log D* over log C for vertices (budgets, S)."""
    log_c = np.array([budget.log_flops for budget in budgets])
    middles = np.array([[budget.middle] for budget in budgets])
    lines = np.array([budget.line for budget in budgets])
    log_d = lines[:, :1] * places + lines[:, 1:]
    return np.polyfit(log_c, places + middles, 1)[0], np.polyfit(log_c, log_d, 1)[0]


@dataclass(frozen=True)
class ArmLaws:
    """What was fitted to one arm; a string says why something was not.

    Args:
        arm: the arm.
        models: of all seeds, ancestors of other arms included, to which L(C) was fitted.
        runs: N, D, C and loss of every cooled branch of these, to which the others were fitted;
            none of a grown arm.
        chinchilla: L(N, D).
        chinchilla_score: its prediction of the runs with the largest N D.
        compute: L(C).
        compute_score: its prediction of the runs with the largest C.
        isoflop: compute-optimal sizes.
    """

    arm: str
    models: tuple[Record, ...]
    runs: tuple[tuple[int, int, int, float], ...]
    chinchilla: ChinchillaLaw | str
    chinchilla_score: HoldOut | str
    compute: ComputeLaw | str
    compute_score: HoldOut | str
    isoflop: IsoFlopFit | str

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps: each law, with the optimum of the largest C, or ``{"refused": why}``."""
        found: dict[str, Any] = {
            "arm": self.arm,
            "models": [{"name": r.name, "seed": r.seed} for r in self.models],
        }
        for key in ("chinchilla", "chinchilla_score", "compute", "compute_score", "isoflop"):
            value = getattr(self, key)
            found[key] = {"refused": value} if isinstance(value, str) else value.to_dict()
        if isinstance(self.chinchilla, ChinchillaLaw):
            largest = max(FLOPS_PER_PARAMETER_TOKEN * n * d for n, d, *_ in self.runs)
            found["chinchilla"]["optimum"] = self.chinchilla.optimum(largest)
        return found


def fit_series(records: Sequence[Record], validator: ScalingLawValidator) -> list[ArmLaws]:
    """Fit what can be fitted to each arm.

    The loss is bits per byte, N counts all parameters, D a model's own tokens and C the operations
    of its lineage. A model from scratch with cooled branches at several shares of its steps is one
    run at each of them.

    Args:
        records: of one or more seeds, without models that diverged.
        validator: with the settings of the fits.
    """
    return [_fit_arm(arm, records, validator) for arm in dict.fromkeys(r.arm for r in records)]


def _fit_arm(arm: str, records: Sequence[Record], validator: ScalingLawValidator) -> ArmLaws:
    seeds = dict.fromkeys(record.seed for record in records)
    models = [record for seed in seeds for record in chain(records, arm, seed)]
    compute = [float(r.lineage_flops) for r in models], [r.val_bpb for r in models]
    runs: list[tuple[int, int, int, float]] = []
    if all(record.parent is None for record in models):
        runs = [
            (record.params, branch.tokens, branch.flops, branch.val_bpb)
            for record in models
            for branch in record.cooled
            if math.isfinite(branch.val_bpb)
        ]
    params, tokens, flops, losses = np.array(runs, dtype=np.float64).reshape(-1, 4).T

    def in_n_and_d(fit: Callable[[], _Result]) -> _Result | str:
        return _or_reason(fit) if runs else _GROWN

    return ArmLaws(
        arm=arm,
        models=tuple(models),
        runs=tuple(runs),
        chinchilla=in_n_and_d(lambda: validator.fit(params, tokens, losses)),
        chinchilla_score=in_n_and_d(lambda: validator.holdout(params, tokens, losses)),
        compute=_or_reason(lambda: validator.fit_compute(*compute)),
        compute_score=_or_reason(lambda: validator.holdout_compute(*compute)),
        isoflop=in_n_and_d(lambda: validator.isoflop(params, tokens, losses, flops)),
    )


def _or_reason(fit: Callable[[], _Result]) -> _Result | str:
    try:
        return fit()
    except ValueError as refusal:
        return str(refusal)
