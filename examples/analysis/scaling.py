r"""Scaling laws with intervals, a score that counts, and a refusal where the data cannot tell.

    fit:          L(N, D) = E + A N^-alpha + B D^-beta        runs whose N and D vary apart
    fit_compute:  L(C)    = E + K C^-gamma                    a series with one run a budget
    isoflop:      N* ~ C^a, D* ~ C^b                          budgets with several sizes each

The score is the error on the runs with the largest compute when the law was fitted to the others:
R^2 is close to 1 for nearly any curve through falling losses.

The loss may be in nats or bits, a token or a byte; N may count all parameters or only those in
matrix products. The exponents depend on that choice more than on anything else, so say which.
Runs must be comparable: all cooled down, none stopped on the way.

References:
    Hoffmann et al., "Training Compute-Optimal Large Language Models", arXiv:2203.15556.
    Besiroglu et al., "Chinchilla Scaling: A Replication Attempt", arXiv:2404.10102.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from analysis.design import Numbers, check_compute, check_design, checked
from analysis.isoflop import IsoFlopFit, fit_isoflop
from analysis.laws import ChinchillaLaw, ComputeLaw, HoldOut, Interval
from analysis.power_sums import Array, PowerSum, fit_power_sum, refine

__all__ = ["ScalingLawValidator"]

_BOOTSTRAP_TOLERANCE = 1e-6  # far below the width of any interval
_TIE = 1e-6  # relative; sums of logarithms of equal products differ by rounding
_CHUNK = 500  # bootstrap fits at a time: bounds the memory

Indices = NDArray[np.intp]


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
        x = np.log(np.stack([checked("params", params), checked("tokens", tokens, params)]))
        y = np.log(checked("losses", losses, params))
        check_design(x)
        return self._fit(x, y, self.bootstraps)

    def fit_compute(self, flops: Numbers, losses: Numbers) -> ComputeLaw:
        """Fit L = E + K C^-gamma, all that a series with one run a budget can tell.

        Args:
            flops: C of each run, > 0; of the whole lineage if a model was grown.
            losses: L of each run, > 0.

        Raises:
            ValueError: there are fewer than 4 runs or 3 budgets.
        """
        x = np.log(checked("flops", flops))[None]
        y = np.log(checked("losses", losses, flops))
        check_compute(x)
        return self._fit_compute(x, y, self.bootstraps)

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
        return fit_isoflop(
            np.log(checked("params", params)),
            np.log(checked("tokens", tokens, params)),
            checked("losses", losses, params),
            np.log(checked("flops", flops, params)),
            bootstraps=self.bootstraps,
            confidence=self.confidence,
            seed=self.seed,
        )

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
        x = np.log(np.stack([checked("params", params), checked("tokens", tokens, params)]))
        y = np.log(checked("losses", losses, params))

        def predict(kept: Indices, wanted: Indices) -> Array:
            check_design(x[:, kept])
            return self._fit(x[:, kept], y[kept], 0).predict(*np.exp(x[:, wanted]))

        return _hold_out(x.sum(axis=0), y, share, predict)

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
        x = np.log(checked("flops", flops))[None]
        y = np.log(checked("losses", losses, flops))

        def predict(kept: Indices, wanted: Indices) -> Array:
            check_compute(x[:, kept])
            return self._fit_compute(x[:, kept], y[kept], 0).predict(np.exp(x[0, wanted]))

        return _hold_out(x[0], y, share, predict)

    def _fit(self, x: Array, y: Array, bootstraps: int) -> ChinchillaLaw:
        theta, law, samples = self._fit_power_sum(x, y, bootstraps)
        middle = x.mean(axis=1)
        draws = _named(samples, middle)
        a_draws = draws["beta"] / (draws["alpha"] + draws["beta"])
        point = {name: float(value[0]) for name, value in _named(theta[None], middle).items()}
        return ChinchillaLaw(
            **point,
            intervals=self._intervals({**draws, "a": a_draws}),
            samples=draws,
            confidence=self.confidence,
            runs=y.size,
            residuals=y - np.log(law.predict(*np.exp(x - middle[:, None]))),
            log_losses=y,
            condition=law.condition,
            flaws=_in_words(law.flaws, ("N", "D")),
        )

    def _fit_compute(self, x: Array, y: Array, bootstraps: int) -> ComputeLaw:
        theta, law, samples = self._fit_power_sum(x, y, bootstraps)
        middle = x.mean(axis=1)
        names = {"E": "E", "A": "K", "alpha": "gamma"}
        draws = {names[name]: value for name, value in _named(samples, middle).items()}
        point = {names[n]: float(value[0]) for n, value in _named(theta[None], middle).items()}
        return ComputeLaw(
            **point,
            intervals=self._intervals(draws),
            confidence=self.confidence,
            runs=y.size,
            residuals=y - np.log(law.predict(*np.exp(x - middle[:, None]))),
            log_losses=y,
            condition=law.condition,
            flaws=_in_words(law.flaws, ("C",)),
        )

    def _fit_power_sum(self, x: Array, y: Array, bootstraps: int) -> tuple[Array, PowerSum, Array]:
        centred = x - x.mean(axis=1, keepdims=True)
        theta, law = fit_power_sum(centred, y, self.huber_delta)
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
        return theta, law, np.concatenate(parts)

    def _intervals(self, draws: dict[str, Array]) -> dict[str, Interval]:
        tail = (1.0 - self.confidence) / 2.0
        return {
            name: (float(np.quantile(values, tail)), float(np.quantile(values, 1.0 - tail)))
            for name, values in draws.items()
            if values.size
        }


def _named(theta: Array, middle: Array) -> dict[str, Array]:
    """Parameters of the law in its own variables, from those in the centred ones."""
    variables = middle.size
    exponents = theta[:, variables + 1 :]
    amplitudes = np.exp(theta[:, 1 : variables + 1] + exponents * middle)
    named = {"E": np.exp(theta[:, 0]), "A": amplitudes[:, 0], "alpha": exponents[:, 0]}
    if variables == 2:
        named |= {"B": amplitudes[:, 1], "beta": exponents[:, 1]}
    return named


def _in_words(flaws: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    words = []
    for flaw in flaws:
        for k, name in enumerate(names):
            flaw = flaw.replace(f"variable {k + 1}", name)
        words.append(flaw)
    return tuple(words)


def _hold_out(
    order: Array, y: Array, share: float, predict: Callable[[Indices, Indices], Array]
) -> HoldOut:
    if not 0.0 < share < 1.0:
        raise ValueError(f"share must lie between 0 and 1, got {share}")
    count = math.ceil(share * y.size)
    # With all of equal size: seeds of a run that is predicted would give its loss away.
    held_out = order >= np.sort(order)[-count] - _TIE
    kept, wanted = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    predicted = predict(kept, wanted)
    errors = np.log(predicted) - y[wanted]
    return HoldOut(
        runs=tuple(int(i) for i in wanted),
        predicted=tuple(float(v) for v in predicted),
        measured=tuple(float(v) for v in np.exp(y[wanted])),
        rms_relative_error=float(np.sqrt(np.mean(errors**2))),
        worst_relative_error=float(np.abs(errors).max()),
    )
