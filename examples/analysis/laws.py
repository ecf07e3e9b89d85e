"""Fitted laws: what was found, how sure it is, and what it predicts."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from analysis.power_sums import Array

__all__ = ["FLOPS_PER_PARAMETER_TOKEN", "ChinchillaLaw", "ComputeLaw", "HoldOut", "Interval"]

Interval = tuple[float, float]

# Operations a parameter and token, in C = 6 N D: a multiply-add forward and two backward.
FLOPS_PER_PARAMETER_TOKEN = 6.0

_LOG_LIMIT = 230.0  # 1e100 parameters


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """What every fit reports.

    Args:
        intervals: percentiles of the bootstrap by name; empty without one.
        confidence: of the intervals.
        runs: that were fitted.
        residuals: of log L, measured minus fitted.
        log_losses: log L as measured.
        condition: see `analysis.power_sums.PowerSum`.
        flaws: what makes the fit doubtful, in words; empty for a sound one.
    """

    intervals: dict[str, Interval]
    confidence: float
    runs: int
    residuals: Array = field(repr=False)
    log_losses: Array = field(repr=False)
    condition: float
    flaws: tuple[str, ...]

    @property
    def rms_relative_error(self) -> float:
        """Root mean square of the residuals of log L."""
        return float(np.sqrt(np.mean(self.residuals**2)))

    @property
    def r_squared(self) -> float:
        """Share of the variance of log L that the law explains; high for bad laws too."""
        total = float(((self.log_losses - self.log_losses.mean()) ** 2).sum())
        return 1.0 - float((self.residuals**2).sum()) / total if total > 0 else 0.0

    def _report(self) -> dict[str, Any]:
        return {
            "intervals": {name: list(pair) for name, pair in self.intervals.items()},
            "confidence": self.confidence,
            "runs": self.runs,
            "r_squared": self.r_squared,
            "rms_relative_error": self.rms_relative_error,
            "condition": self.condition,
            "flaws": list(self.flaws),
        }


@dataclass(frozen=True, kw_only=True)
class ChinchillaLaw(_Fit):
    """L(N, D) = E + A N^-alpha + B D^-beta.

    Args:
        E: irreducible loss.
        A: amplitude of the term in N.
        B: amplitude of the term in D.
        alpha: exponent of N.
        beta: exponent of D.
        samples: the bootstrap's values of the five, each (S,).
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    samples: dict[str, Array] = field(repr=False)

    @property
    def a(self) -> float:
        """Exponent of the compute-optimal size, N* ~ C^a with a = beta / (alpha + beta)."""
        return self.beta / (self.alpha + self.beta)

    def predict(self, params: object, tokens: object) -> Array:
        """L at N parameters and D tokens (numbers or arrays, > 0)."""
        n = np.asarray(params, dtype=np.float64)
        d = np.asarray(tokens, dtype=np.float64)
        return np.asarray(self.E + self.A * n**-self.alpha + self.B * d**-self.beta)

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
            tail = (1.0 - self.confidence) / 2.0
            low, high = np.quantile(log_size(self.samples), [tail, 1.0 - tail])
            result["params_interval"] = [float(np.exp(low)), float(np.exp(high))]
            result["tokens_interval"] = [float(np.exp(budget - high)), float(np.exp(budget - low))]
        return result

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps."""
        values = {name: getattr(self, name) for name in ("E", "A", "B", "alpha", "beta", "a")}
        return {"law": "E + A N^-alpha + B D^-beta", **values, **self._report()}


@dataclass(frozen=True, kw_only=True)
class ComputeLaw(_Fit):
    """L(C) = E + K C^-gamma.

    Args:
        E: irreducible loss of the series.
        K: amplitude.
        gamma: exponent of C.
    """

    E: float
    K: float
    gamma: float

    def predict(self, flops: object) -> Array:
        """L at C operations (a number or an array, > 0)."""
        return np.asarray(self.E + self.K * np.asarray(flops, dtype=np.float64) ** -self.gamma)

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps."""
        values = {"E": self.E, "K": self.K, "gamma": self.gamma}
        return {"law": "E + K C^-gamma", **values, **self._report()}


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
        return {
            "runs": list(self.runs),
            "predicted": list(self.predicted),
            "measured": list(self.measured),
            "rms_relative_error": self.rms_relative_error,
            "worst_relative_error": self.worst_relative_error,
        }
