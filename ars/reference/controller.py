r"""The controller: from a surprise signal to a gate on the optimizer, eqs. (1) to (4).

The equations as proposed, with S the surprise and H the last W surprises, S included:

.. math::
    \rho &= \mathrm{corr}(H_{:-1}, H_{1:})                              \quad (1) \\
    \Psi &= \max(\epsilon, 1 - \rho^2)                  \quad\text{(EntropyGuard, 2)} \\
    \Phi &= \phi_{min} + (1 - \phi_{min}) \exp(-\alpha S / \Psi)
                                                        \quad\text{(SurpriseGate, 3)} \\
    \chi &= U(-j, j) (1 - \Psi)                         \quad\text{(ChronosJitter, 4)}

The conditioned form replaces S by its deviation from the window's trend and H by its residuals,
and discounts what sampling noise explains: :func:`trend`, :func:`standardized_surprise`,
:func:`shrink`.
"""

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ars.reference.philox import philox_uniform

# A number of values: on the device, or an int where reading it waits for nothing.
Count: TypeAlias = int | Tensor

# Variation below this share of a window's largest value is rounding, not signal.
RELATIVE_NOISE_FLOOR = 1e-12
# A trend line and its deviation mean nothing over fewer values than this.
MIN_HISTORY = 10


class Signals(NamedTuple):
    """What the controller says of one step: each a 0-d float64 tensor on the window's device."""

    surprise: Tensor
    rho: Tensor
    psi: Tensor
    phi: Tensor
    chi: Tensor


def controller_step_(
    surprise: Tensor,
    window: Tensor,
    counts: Tensor,
    *,
    alpha: float,
    phi_min: float,
    eps: float,
    jitter: float,
    standardize: bool,
    detrend: bool,
    threshold: float,
    significance: float,
    seed: int,
) -> Signals:
    """Observe one surprise, in place, and return the gate for this step (eqs. 1 to 4).

    A surprise that is not finite is never written to the window; it closes the gate to phi_min.

    Args:
        surprise: The step's surprise, 0-d.
        window: Ring buffer of the last W surprises, shape (W,), float64; written in place.
        counts: (surprises ever written, steps ever taken), shape (2,), int64; written in place.
        alpha: Sensitivity of the gate, >= 0.
        phi_min: Smallest gate, in [0, 1].
        eps: Smallest Psi, in (0, 1].
        jitter: Largest relative change of the learning rate, >= 0.
        standardize: Gate on the deviation from the window's trend instead of on S itself.
        detrend: The trend is a line rather than the mean; rho is that of the line's residuals.
        threshold: Standard errors of deviation that are ordinary noise, >= 0.
        significance: Standard errors of rho that are ordinary noise, >= 0.
        seed: Key of the jitter.

    Returns:
        The signals. ``surprise`` is what was observed, before any standardisation.
    """
    value = surprise.detach().to(window)
    finite = torch.isfinite(value)

    gated = value
    if standardize:
        values, valid = _oldest_first(window, counts[0])
        _, predicted, error = trend(values, valid, linear=detrend)
        gated = standardized_surprise(value, predicted, error, valid, threshold, eps)

    slot = (counts[0] % window.numel()).unsqueeze(0)
    window.scatter_(0, slot, torch.where(finite, value, window.gather(0, slot)))
    uniform = _uniform(seed, counts[1])
    counts += torch.stack((finite.to(torch.int64), torch.ones_like(counts[1])))

    values, valid = _oldest_first(window, counts[0])
    if detrend:
        values = trend(values, valid, linear=True)[0]
    rho = shrink(autocorrelation(values, valid, window.abs().amax()), valid, significance)
    psi = entropy_guard(rho, eps)
    phi = torch.where(finite, surprise_gate(gated, psi, alpha, phi_min), phi_min)
    return Signals(value, rho, psi, phi, chronos_jitter(psi, uniform, jitter))


def _uniform(seed: int, step: Tensor) -> Tensor | float:
    """Draw the step's uniform number; on a CPU with integers, 30 times faster than with tensors."""
    if step.device.type == "cpu":
        return philox_uniform(seed, int(step) & 0xFFFFFFFF)
    return philox_uniform(seed, step & 0xFFFFFFFF)


def _oldest_first(window: Tensor, count: Tensor) -> tuple[Tensor, Count]:
    """Return the ring buffer in order of age, and how many values are valid.

    Entry ``count % W`` of the ring is written next, so with n valid values the oldest is at
    ``(count - n) % W``. On a CPU the values are exactly the valid ones and n is an int; elsewhere,
    where reading n would wait for the device, there are W values and the unwritten ones are 0.
    """
    size = window.numel()
    if window.device.type == "cpu":
        written = int(count)
        oldest = written % size if written > size else 0
        return torch.cat((window[oldest:], window[:oldest]))[:written], min(written, size)
    age = torch.arange(size, device=window.device)
    valid = count.clamp(max=size)
    ordered = window[(count - valid + age) % size]
    return torch.where(age < valid, ordered, 0.0), valid


def _used(values: Tensor, valid: Count) -> Tensor | None:
    """Return which values count, or None if all do."""
    if isinstance(valid, int):
        return None
    return torch.arange(values.numel(), device=values.device) < valid


def _masked(values: Tensor, used: Tensor | None) -> Tensor:
    """Set what does not count to 0."""
    return values if used is None else torch.where(used, values, 0.0)


def _at_least(count: Count, minimum: int) -> Any:
    """Return the larger of the two, a number to divide by."""
    if isinstance(count, int):
        return max(count, minimum)
    return count.clamp(min=minimum).to(torch.float64)  # int64 would divide in float32


def autocorrelation(values: Tensor, valid: Count, scale: Tensor) -> Tensor:
    r"""Lag-1 autocorrelation ``rho = corr(H[:-1], H[1:])`` (eq. 1), 0 while it is undefined.

    Pearson's correlation of the pairs of successive values. It is undefined with fewer than two
    pairs, or when either side's standard deviation is within 1e-12 of ``scale``: rounding.

    Args:
        values: The window oldest first, shape (W,).
        valid: How many leading values count: 0-d, or an int if they all do.
        scale: Magnitude of what the values were computed from, 0-d.

    Returns:
        rho in [-1, 1], 0-d.
    """
    pairs = valid - 1
    if isinstance(pairs, int) and pairs < 2:
        return torch.zeros_like(scale)
    used = _used(values[1:], pairs)
    n = _at_least(pairs, 1)
    # Subtracting the first value makes a constant window vary by exactly 0, whatever its level.
    shifted = values - values[0]
    x, y = _masked(shifted[:-1], used), _masked(shifted[1:], used)
    x = _masked(x - x.sum() / n, used)
    y = _masked(y - y.sum() / n, used)
    xx, yy, xy = x.dot(x), y.dot(y), x.dot(y)
    floor = n * (RELATIVE_NOISE_FLOOR * scale) ** 2
    defined = (xx > floor) & (yy > floor) & (pairs >= 2)
    rho = xy / torch.where(defined, xx.sqrt() * yy.sqrt(), 1.0)
    return torch.where(defined, rho.clamp(-1.0, 1.0), 0.0)


def trend(values: Tensor, valid: Count, *, linear: bool) -> tuple[Tensor, Tensor, Tensor]:
    r"""Least-squares trend of a window and what it predicts for the next value.

    With ages ``t_k = k - (n-1)/2`` the line is ``mean + slope t_k``. Its prediction for
    ``t_n = (n+1)/2`` has the standard error ``s sqrt(1 + 1/n + t_n^2 / sum t_k^2)``, with ``s^2``
    the residual variance (the last term only with a slope).

    Args:
        values: The window oldest first, shape (W,).
        valid: How many leading values count: 0-d, or an int if they all do.
        linear: Fit a line; otherwise the mean alone.

    Returns:
        residuals, shape (W,), 0 where nothing counts; the predicted next value and its standard
        error, 0-d.
    """
    if isinstance(valid, int) and valid == 0:
        zero = values.new_zeros(())
        return values, zero, zero
    used = _used(values, valid)
    n = _at_least(valid, 1)
    # As in autocorrelation: a constant window must leave residuals of exactly 0.
    shifted = _masked(values - values[0], used)
    mean = shifted.sum() / n
    residuals, predicted = shifted - mean, values[0] + mean
    leverage, freedom = 1 + 1 / n, _at_least(n - (2 if linear else 1), 1)
    if linear:
        age = torch.arange(values.numel(), dtype=values.dtype, device=values.device) - (n - 1) / 2
        age = _masked(age, used)
        spread = age.dot(age).clamp(min=0.5)
        slope = age.dot(shifted) / spread
        ahead = (n + 1) / 2
        residuals, predicted = residuals - slope * age, predicted + slope * ahead
        leverage = leverage + ahead * ahead / spread
    residuals = _masked(residuals, used)
    error = (residuals.dot(residuals) / freedom * leverage).sqrt()
    return residuals, predicted, error


def standardized_surprise(
    surprise: Tensor, predicted: Tensor, error: Tensor, valid: Count, threshold: float, eps: float
) -> Tensor:
    r"""One-sided surprise, in standard errors beyond a threshold.

    ``max(0, (S - predicted) / (error + eps |predicted|) - threshold)``, and 0 while the trend rests
    on fewer than ten values. A value as good as expected, or better, is no surprise.

    Args:
        surprise: The new value, 0-d.
        predicted: What :func:`trend` predicts for it, 0-d.
        error: The standard error of that prediction, 0-d.
        valid: How many values the trend was fitted to, 0-d or an int.
        threshold: Standard errors that count as ordinary noise, >= 0.
        eps: Relative floor of the error, so that a constant signal does not divide by 0.

    Returns:
        The standardized surprise, >= 0, 0-d.
    """
    scale = error + eps * predicted.abs()
    deviations = (surprise - predicted) / torch.where(scale > 0, scale, 1.0)
    return (deviations - threshold).clamp(min=0.0) * (valid >= MIN_HISTORY)


def shrink(rho: Tensor, valid: Count, significance: float) -> Tensor:
    r"""Move an autocorrelation towards 0 by ``significance`` sampling errors of ``1/sqrt(n)``.

    ``sign(rho) max(0, |rho| - significance / sqrt(n))``: what noise explains is not resonance.

    Args:
        rho: Autocorrelation in [-1, 1], 0-d.
        valid: How many values it was estimated from, 0-d or an int.
        significance: Standard errors to subtract, >= 0; 0 returns rho itself.

    Returns:
        The shrunken autocorrelation, 0-d.
    """
    noise = significance / _at_least(valid, 1) ** 0.5
    return rho.sign() * (rho.abs() - noise).clamp(min=0.0)


def entropy_guard(rho: Tensor, eps: float) -> Tensor:
    """EntropyGuard, ``Psi = max(eps, 1 - rho^2)`` (eq. 2): 1 without resonance, eps in full."""
    return (1 - rho * rho).clamp(min=eps)


def surprise_gate(surprise: Tensor, psi: Tensor, alpha: float, phi_min: float) -> Tensor:
    """SurpriseGate, ``Phi = phi_min + (1 - phi_min) exp(-alpha S / Psi)`` (eq. 3): 1 is open.

    A negative surprise counts as 0: the gate never opens further than 1.
    """
    return phi_min + (1 - phi_min) * torch.exp(-alpha * (surprise.clamp(min=0.0) / psi))


def chronos_jitter(psi: Tensor, uniform: float | Tensor, jitter: float) -> Tensor:
    """ChronosJitter, ``chi = jitter (2 u - 1) (1 - Psi)`` (eq. 4), with u uniform in [0, 1)."""
    return jitter * (2 * uniform - 1) * (1 - psi)
