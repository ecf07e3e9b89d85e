r"""Robust least squares for sums of powers, the form of every scaling law here.

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
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

__all__ = ["EXPONENT_BOUNDS", "PowerSum", "fit_power_sum", "refine"]

Array = NDArray[np.float64]

EXPONENT_BOUNDS = (1e-3, 4.0)
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


@dataclass(frozen=True)
class PowerSum:
    """A fitted law.

    Args:
        constant: E, in the unit of the loss.
        amplitudes: A_k, one a variable.
        exponents: gamma_k, one a variable.
        condition: condition number of the fit's normal matrix, its columns scaled to length 1;
            the squared factor by which noise is amplified in the worst direction.
        flaws: what makes the fit doubtful, in words; empty for a sound one.
    """

    constant: float
    amplitudes: tuple[float, ...]
    exponents: tuple[float, ...]
    condition: float
    flaws: tuple[str, ...]

    def predict(self, *variables: object) -> Array:
        """The law at the given values of its variables (arrays or numbers, all > 0)."""
        total: Array = np.asarray(self.constant, dtype=np.float64)
        for amplitude, exponent, x in zip(self.amplitudes, self.exponents, variables, strict=True):
            total = total + amplitude * np.asarray(x, dtype=np.float64) ** -exponent
        return total


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
    low[variables + 1 :], high[variables + 1 :] = EXPONENT_BOUNDS
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


def fit_power_sum(x: Array, y: Array, delta: float) -> tuple[Array, PowerSum]:
    """Fit one data set.

    Args:
        x: (K, n) logarithms of the variables, centred: their means are 0.
        y: (n,) logarithms of the losses.
        delta: of the Huber loss.

    Returns:
        The (2K + 1,) parameters of `refine` and the law in terms of the centred variables.
    """
    starts = _grid_starts(x, y, delta)
    copies = np.broadcast_to(y, (len(starts), y.size))
    theta, losses = refine(starts, x, copies, np.ones_like(copies), delta)
    best = theta[np.argmin(losses)]
    return best, describe(best, x)


def describe(theta: Array, x: Array) -> PowerSum:
    """The law with parameters ``theta`` (2K + 1,), and what is doubtful about it on points x."""
    variables = x.shape[0]
    logs = _terms(theta[None], x)
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
    names = ["E", *(f"the term of variable {k + 1}" for k in range(variables))]
    flaws += [f"{n} vanished" for n, s in zip(names, shares, strict=True) if s < _VANISHED]
    low, high = EXPONENT_BOUNDS
    for k, exponent in enumerate(theta[variables + 1 :]):
        if not low * 1.001 < exponent < high / 1.001:
            flaws.append(f"the exponent of variable {k + 1} ran to the bound {exponent:g}")
    return PowerSum(
        constant=float(np.exp(theta[0])),
        amplitudes=tuple(float(v) for v in np.exp(theta[1 : variables + 1])),
        exponents=tuple(float(v) for v in theta[variables + 1 :]),
        condition=condition,
        flaws=tuple(flaws),
    )
