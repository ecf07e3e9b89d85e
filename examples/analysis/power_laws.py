r"""Power laws of the loss: how they are fitted, how sure they are and what they predict.

    L(x) = E + sum_k A_k x_k^-gamma_k,      E, A_k > 0

minimising sum_i Huber_delta(log L(x_i) - log L_i). With the exponents given the prediction is
linear in E and A: non-negative least squares solves it at every point of a grid of exponents
(variable projection), which finds the basin without a starting value. From the best points all
parameters are refined together, in the logarithms of the amplitudes, by Levenberg-Marquardt steps
on the reweighted residuals. Many data sets are refined at once: a bootstrap is one call.

References:
    Golub and Pereyra, "The Differentiation of Pseudo-Inverses and Nonlinear Least Squares
    Problems Whose Variables Separate", 1973. Hoffmann et al., "Training Compute-Optimal Large
    Language Models", arXiv:2203.15556 (the law, the Huber loss on log L, delta = 1e-3).
    Besiroglu et al., "Chinchilla Scaling: A Replication Attempt", arXiv:2404.10102 (sum the terms
    and converge tightly).
"""

import itertools
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np
from scipy.optimize import nnls

from common.statistics import Array, Interval, bootstrap_interval

__all__ = [
    "FLOPS_PER_PARAMETER_TOKEN", "ChinchillaLaw", "ComputeLaw", "PowerLaw", "count_distinct",
    "fit_power_law", "refine",
]  # fmt: skip

# Operations a parameter and token, in C = 6 N D: a multiply-add forward and two backward.
FLOPS_PER_PARAMETER_TOKEN = 6.0

_EXPONENT_BOUNDS = (1e-3, 4.0)
_GRID = np.geomspace(0.03, 2.5, 18)  # of every exponent; published ones lie between 0.05 and 1
_STARTS = 6  # best grid points that are refined
_REWEIGHTINGS = 2  # of the Huber loss on the grid
_NNLS_ITERATIONS = 100  # far more than three columns can need
_ITERATIONS = 500
_LARGEST_STEP = 1.0  # in a log amplitude or an exponent
_AMPLITUDE_SPAN = 18.0  # a term exp(-18) of the loss is as good as absent
# Noise is amplified by the root of the condition number. Grids and isoFLOP sweeps lie below 1e5;
# at 1e8 an error of 0.1 % in the losses moves the worst direction by ten times its own size.
_LARGEST_CONDITION = 1e8
_VANISHED = 1e-5  # share of the loss below which a term says nothing
_LOG_LIMIT = 230.0  # 1e100 parameters
_MIN_POINTS = 6  # one more than E, A, B, alpha and beta; seeds repeat a point and add none
_MIN_COMPUTE_RUNS = 4  # one more than E, K and gamma
_MIN_VALUES = 3  # a constant and a power cannot be told apart by fewer
_LARGEST_CORRELATION = 0.99  # of log N and log D


def _terms(theta: Array, x: Array) -> Array:
    """Logarithms of the terms, (S, K + 1, n), for parameters (S, 2K + 1) and log variables (K, n).

    The parameters are log E, the logarithms of the terms where log x = 0, and the exponents.
    """
    variables, points = x.shape
    logs = np.empty((theta.shape[0], variables + 1, points))
    logs[:, 0] = theta[:, :1]
    amplitudes, exponents = theta[:, 1 : variables + 1], theta[:, variables + 1 :]
    logs[:, 1:] = amplitudes[:, :, None] - exponents[:, :, None] * x
    return logs


def _log_sum(logs: Array) -> Array:
    largest = logs.max(axis=1)
    total: Array = largest + np.log(np.exp(logs - largest[:, None]).sum(axis=1))
    return total


def _jacobian(logs: Array, log_prediction: Array, x: Array) -> Array:
    shares = np.exp(logs - log_prediction[:, None])  # (S, K + 1, n), they add up to 1
    return np.concatenate((shares, -shares[:, 1:] * x), axis=1)  # (S, 2K + 1, n)


def _huber(residuals: Array, weights: Array, delta: float) -> Array:
    size = np.abs(residuals)
    values = np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))
    total: Array = (weights * values).sum(axis=1)
    return total


def refine(
    theta: Array, x: Array, y: Array, weights: Array, delta: float, *, tolerance: float = 1e-11
) -> tuple[Array, Array]:
    """Minimise the Huber loss of S data sets from S starting points.

    Args:
        theta: (S, 2K + 1) starting points: log E, K log amplitudes at log x = 0, K exponents.
        x: (K, n) logarithms of the variables, shared.
        y: (S, n) logarithms of the losses.
        weights: (S, n) how often each point counts.
        delta: where the loss turns from quadratic to linear.
        tolerance: a data set is finished when a step changes no parameter by more.

    Returns:
        (S, 2K + 1) parameters and (S,) losses.
    """
    variables = x.shape[0]
    middle = np.median(y)
    low = np.full(theta.shape[1], middle - _AMPLITUDE_SPAN)
    high = np.full(theta.shape[1], middle + _AMPLITUDE_SPAN)
    low[variables + 1 :], high[variables + 1 :] = _EXPONENT_BOUNDS
    theta = np.clip(theta, low, high)
    damping = np.full(theta.shape[0], 1e-3)
    logs = _terms(theta, x)
    prediction = _log_sum(logs)
    losses = _huber(prediction - y, weights, delta)
    active = np.arange(theta.shape[0])
    for _ in range(_ITERATIONS):
        residuals = prediction[active] - y[active]
        pull = weights[active] * np.minimum(1.0, delta / np.maximum(np.abs(residuals), 1e-300))
        rows = _jacobian(logs[active], prediction[active], x)
        weighted = rows * pull[:, None]
        normal = weighted @ rows.transpose(0, 2, 1)
        gradient = (weighted @ residuals[:, :, None])[:, :, 0]
        diagonal = np.einsum("sii->si", normal)
        # A vanished term has no curvature: the floor keeps the system solvable and its step small.
        floor = 1e-12 * diagonal.max(axis=1, keepdims=True) + 1e-300
        diagonal += damping[active, None] * diagonal + floor
        step = -np.linalg.solve(normal, gradient[:, :, None])[:, :, 0]
        step = np.clip(step, -_LARGEST_STEP, _LARGEST_STEP)
        trial = np.clip(theta[active] + step, low, high)
        trial_logs = _terms(trial, x)
        trial_prediction = _log_sum(trial_logs)
        trial_losses = _huber(trial_prediction - y[active], weights[active], delta)
        moved = np.abs(trial - theta[active]).max(axis=1)
        better = trial_losses <= losses[active]
        taken = active[better]
        theta[taken], losses[taken] = trial[better], trial_losses[better]
        logs[taken], prediction[taken] = trial_logs[better], trial_prediction[better]
        damping[active] = np.where(better, damping[active] / 5, damping[active] * 4)
        active = active[(moved > tolerance) & (damping[active] < 1e12)]
        if active.size == 0:
            break
    return theta, losses


def _grid_starts(x: Array, y: Array, delta: float) -> Array:
    """The best exponents of the grid, with the amplitudes that belong to them."""
    loss = np.exp(y)
    found: list[tuple[float, Array]] = []
    for exponents in itertools.product(_GRID, repeat=x.shape[0]):
        columns = np.exp(-np.asarray(exponents)[:, None] * x)  # (K, n)
        # Relative residuals, which are those of the logarithm to first order.
        design = np.concatenate((np.ones((1, y.size)), columns)).T / loss[:, None]  # (n, K + 1)
        root = np.ones(y.size)
        for _ in range(_REWEIGHTINGS + 1):
            amplitudes, _ = nnls(design * root[:, None], root, maxiter=_NNLS_ITERATIONS)
            residuals = design @ amplitudes - 1.0
            root = np.sqrt(np.minimum(1.0, delta / np.maximum(np.abs(residuals), 1e-300)))
        value = _huber(residuals[None], np.ones((1, y.size)), delta)[0]
        logs = np.log(np.maximum(amplitudes, 1e-6 * loss.min()))
        found.append((float(value), np.concatenate((logs, exponents))))
    found.sort(key=lambda entry: entry[0])
    return np.stack([start for _, start in found[:_STARTS]])


def fit_power_law(x: Array, y: Array, delta: float) -> Array:
    """Fit one data set.

    Args:
        x: (K, n) logarithms of the variables, centred: their means are 0.
        y: (n,) logarithms of the losses.
        delta: of the Huber loss.

    Returns:
        The (2K + 1,) parameters of `refine`.
    """
    starts = _grid_starts(x, y, delta)
    copies = np.broadcast_to(y, (len(starts), y.size))
    theta, losses = refine(starts, x, copies, np.ones_like(copies), delta)
    best: Array = theta[np.argmin(losses)]
    return best


def count_distinct(logs: Array) -> int:
    """Number of values that differ by more than a thousandth of themselves, of (n,) logarithms."""
    return 1 + int((np.diff(np.sort(logs)) > 1e-3).sum()) if logs.size else 0


_Law = TypeVar("_Law", bound="PowerLaw")


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """What every fitted law reports.

    Args:
        samples: the bootstrap's values of each parameter, (S,).
        confidence: of the intervals.
        residuals: of log L, measured minus fitted.
        log_losses: log L as measured.
        condition: condition number of the fit's normal matrix, its columns scaled to length 1; the
            squared factor by which noise is amplified in the worst direction.
        flaws: what makes the fit doubtful, in words; empty for a sound one.
    """

    formula: ClassVar[str]
    variables: ClassVar[tuple[str, ...]]
    parameters: ClassVar[tuple[str, ...]]  # the constant, then amplitude and exponent by variable
    shown: ClassVar[tuple[str, ...]]

    samples: dict[str, Array] = field(repr=False)
    confidence: float
    residuals: Array = field(repr=False)
    log_losses: Array = field(repr=False)
    condition: float
    flaws: tuple[str, ...]

    @classmethod
    def of(
        cls: type[_Law], theta: Array, samples: Array, x: Array, y: Array, confidence: float
    ) -> _Law:
        """The law whose parameters were fitted in the centred variables.

        Args:
            theta: (2K + 1,) parameters of `refine`.
            samples: (S, 2K + 1) those of a bootstrap.
            x: (K, n) logarithms of the variables, not centred.
            y: (n,) logarithms of the losses.
            confidence: of the intervals.
        """
        middle = x.mean(axis=1)
        logs = _terms(theta[None], x - middle[:, None])
        point = _in_own_variables(theta[None], middle)[0].tolist()
        draws = _in_own_variables(samples, middle).T
        condition, flaws = _doubts(theta, logs, x - middle[:, None], cls.variables)
        values: dict[str, Any] = dict(zip(cls.parameters, point, strict=True))
        return cls(
            **values,
            samples=dict(zip(cls.parameters, draws, strict=True)),
            confidence=confidence,
            residuals=y - _log_sum(logs)[0],
            log_losses=y,
            condition=condition,
            flaws=flaws,
        )

    @classmethod
    def check_design(cls, x: Array) -> None:
        """See whether runs at the logarithms (K, n) of the variables can determine the law.

        Raises:
            ValueError: they cannot; the message says why and what would.
        """
        raise NotImplementedError

    def predict(self, *variables: object) -> Array:
        """L at these values of the variables (numbers or arrays, all > 0)."""
        constant, *powers = (getattr(self, name) for name in self.parameters)
        total: Array = np.asarray(constant, dtype=np.float64)
        for amplitude, exponent, x in zip(powers[::2], powers[1::2], variables, strict=True):
            total = total + amplitude * np.asarray(x, dtype=np.float64) ** -exponent
        return total

    @property
    def intervals(self) -> dict[str, Interval]:
        """Percentiles of the bootstrap by name; empty without one."""
        draws = {name: values for name, values in self.samples.items() if values.size}
        return {name: bootstrap_interval(v, self.confidence) for name, v in draws.items()}

    @property
    def rms_relative_error(self) -> float:
        """Root mean square of the residuals of log L."""
        return float(np.sqrt(np.mean(self.residuals**2)))

    @property
    def r_squared(self) -> float:
        """Share of the variance of log L that the law explains; high for bad laws too."""
        total = float(((self.log_losses - self.log_losses.mean()) ** 2).sum())
        return 1.0 - float((self.residuals**2).sum()) / total if total > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps."""
        return {
            "law": self.formula,
            **{name: getattr(self, name) for name in self.shown},
            "intervals": self.intervals,
            "confidence": self.confidence,
            "runs": self.log_losses.size,
            "r_squared": self.r_squared,
            "rms_relative_error": self.rms_relative_error,
            "condition": self.condition,
            "flaws": self.flaws,
        }


def _in_own_variables(theta: Array, middle: Array) -> Array:
    """The constant, then amplitude and exponent of each variable, from centred ones (S, 2K + 1)."""
    count = middle.size
    exponents = theta[:, count + 1 :]
    amplitudes = np.exp(theta[:, 1 : count + 1] + exponents * middle)
    pairs = np.stack((amplitudes, exponents), axis=2).reshape(len(theta), 2 * count)
    return np.concatenate((np.exp(theta[:, :1]), pairs), axis=1)


def _doubts(
    theta: Array, logs: Array, x: Array, names: tuple[str, ...]
) -> tuple[float, tuple[str, ...]]:
    """Condition number of a fit (2K + 1,) with terms (1, K + 1, n), and what is doubtful of it."""
    prediction = _log_sum(logs)
    rows = _jacobian(logs, prediction, x)[0]
    lengths = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
    condition = float(np.linalg.cond(rows / lengths)) ** 2
    flaws = []
    if not condition <= _LARGEST_CONDITION:
        flaws.append(
            f"the runs do not determine it: condition number {condition:.2g}, above "
            f"{_LARGEST_CONDITION:.0e}"
        )
    shares = np.exp(logs - prediction[:, None])[0].max(axis=1)
    terms = ["E", *(f"the term of {name}" for name in names)]
    flaws += [f"{term} vanished" for term, s in zip(terms, shares, strict=True) if s < _VANISHED]
    low, high = _EXPONENT_BOUNDS
    for name, exponent in zip(names, theta[len(names) + 1 :], strict=True):
        if not low * 1.001 < exponent < high / 1.001:
            flaws.append(f"the exponent of {name} ran to the bound {exponent:g}")
    return condition, tuple(flaws)


@dataclass(frozen=True, kw_only=True)
class ChinchillaLaw(PowerLaw):
    """L(N, D) = E + A N^-alpha + B D^-beta.

    Args:
        E: irreducible loss.
        A: amplitude of the term in N.
        B: amplitude of the term in D.
        alpha: exponent of N.
        beta: exponent of D.
    """

    formula = "E + A N^-alpha + B D^-beta"
    variables = ("N", "D")
    parameters = ("E", "A", "alpha", "B", "beta")
    shown = ("E", "A", "B", "alpha", "beta", "a")

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    @property
    def a(self) -> float:
        """Exponent of the compute-optimal size, N* ~ C^a with a = beta / (alpha + beta)."""
        return self.beta / (self.alpha + self.beta)

    @property
    def intervals(self) -> dict[str, Interval]:
        """Percentiles of the bootstrap by name, ``a`` among them; empty without one."""
        draws = self.samples["beta"] / (self.samples["alpha"] + self.samples["beta"])
        a = {"a": bootstrap_interval(draws, self.confidence)} if draws.size else {}
        return super().intervals | a

    def optimum(self, flops: float) -> dict[str, Any]:
        """The size and tokens of least loss at C = 6 N D operations, with their intervals.

        N* = G (C/6)^a,  D* = (C/6)^(1-a) / G,  G = (alpha A / (beta B))^(1/(alpha+beta))

        Args:
            flops: C, > 0.
        """
        budget = np.log(flops / FLOPS_PER_PARAMETER_TOKEN)

        def log_size(values: dict[str, Any]) -> Any:
            total = values["alpha"] + values["beta"]
            ratio = np.log(values["alpha"] * values["A"]) - np.log(values["beta"] * values["B"])
            size = (ratio + values["beta"] * budget) / total
            # Without exponents there is no optimum: the clipped bound says so in a finite number.
            return np.clip(size, -_LOG_LIMIT, _LOG_LIMIT)

        point = float(log_size(vars(self)))
        params, tokens = float(np.exp(point)), float(np.exp(budget - point))
        result: dict[str, Any] = {
            "flops": float(flops),
            "params": params,
            "tokens": tokens,
            "loss": float(self.predict(params, tokens)),
        }
        if self.samples["E"].size:
            low, high = bootstrap_interval(log_size(self.samples), self.confidence)
            result["params_interval"] = [float(np.exp(low)), float(np.exp(high))]
            result["tokens_interval"] = [float(np.exp(budget - high)), float(np.exp(budget - low))]
        return result

    @classmethod
    def check_design(cls, x: Array) -> None:
        """See whether runs at (log N, log D), shape (2, n), can determine both exponents."""
        points = len(np.unique(np.round(x, 3), axis=1).T)
        if points < _MIN_POINTS:
            raise ValueError(
                f"{x.shape[1]} runs at {points} different (N, D) cannot determine the five "
                f"parameters of E + A/N^alpha + B/D^beta: give {_MIN_POINTS} or more, at several "
                "sizes and token counts"
            )
        for name, unit, logs in (("N", "sizes", x[0]), ("D", "token counts", x[1])):
            if (values := count_distinct(logs)) < _MIN_VALUES:
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
                f"{reason} (correlation of log N and log D {correlation:+.4f}): only one exponent "
                "can be identified. Fit E + K C^-gamma instead (fit_compute), or train each size "
                "at several token counts"
            )


@dataclass(frozen=True, kw_only=True)
class ComputeLaw(PowerLaw):
    """L(C) = E + K C^-gamma.

    Args:
        E: irreducible loss of the series.
        K: amplitude.
        gamma: exponent of C.
    """

    formula = "E + K C^-gamma"
    variables = ("C",)
    parameters = shown = ("E", "K", "gamma")

    E: float
    K: float
    gamma: float

    @classmethod
    def check_design(cls, x: Array) -> None:
        """See whether runs at log C, shape (1, n), are enough."""
        budgets = count_distinct(x[0])
        if x.shape[1] < _MIN_COMPUTE_RUNS or budgets < _MIN_VALUES:
            raise ValueError(
                f"{x.shape[1]} runs at {budgets} budgets cannot determine the three parameters of "
                f"E + K C^-gamma: give {_MIN_COMPUTE_RUNS} or more runs at {_MIN_VALUES} or more "
                "budgets"
            )
