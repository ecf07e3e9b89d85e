r"""The controller: from a surprise signal to a gate on the optimizer, eqs. (1) to (4).

The equations as proposed, with S the surprise and H the last W surprises, S included:

.. math::
    \rho &= \mathrm{corr}(H_{:-1}, H_{1:})                              \quad (1) \\
    \Psi &= \max(\epsilon, 1 - \rho^2)                  \quad\text{(EntropyGuard, 2)} \\
    \Phi &= \phi_{min} + (1 - \phi_{min}) \exp(-\alpha S / \Psi)
                                                        \quad\text{(SurpriseGate, 3)} \\
    \chi &= U(-j, j) (1 - \Psi)                         \quad\text{(ChronosJitter, 4)}

The conditioned form replaces S by its deviation from the window's trend and H by its residuals,
and discounts what sampling noise explains: :func:`~ars.reference.window.trend`,
:func:`standardized_surprise`, :func:`shrink`. Only alternation counts as resonance, as a trend that
is no line leaves a positive rho and never a negative one. Two further terms are absent from the
proposal, where kappa = 0 and r = 1. Resonance brakes by itself, and a gate that has closed opens
over r steps:

.. math::
    \rho &\to \min(\rho, 0) \\
    S / \Psi &\to (S + \kappa) / \Psi - \kappa \\
    \Phi_t &= \min(\Phi, \Phi_{t-1} + (1 - \Phi_{t-1}) / r)

with r shorter after a first alarm, :mod:`ars.reference.backoff`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ars.reference.backoff import GateState, back_off, slow_release
from ars.reference.philox import philox_uniform
from ars.reference.scalars import (
    Scalar,
    at_least,
    at_most,
    choose,
    copysign,
    exp,
    is_finite,
    is_host,
    read,
)
from ars.reference.window import (
    ERROR_FLOOR,
    MIN_HISTORY,
    Count,
    autocorrelation,
    divisor,
    oldest_first,
    remember_,
    trend,
)

__all__ = [
    "Signals", "chronos_jitter", "controller_step_", "draw", "entropy_guard", "surprise_gate",
]  # fmt: skip


class Signals(NamedTuple):
    """What the controller says of one step: numbers on a CPU, else 0-d float64 tensors.

    Args:
        surprise: S, what was observed.
        rho: Lag-1 autocorrelation of the surprises (1), in [-1, 1].
        psi: EntropyGuard (2), in (0, 1]; 1 without resonance.
        phi: The gate (3), in [0, 1]; 1 is open.
        chi: Relative change of the learning rate (4).
    """

    surprise: Scalar
    rho: Scalar
    psi: Scalar
    phi: Scalar
    chi: Scalar


def controller_step_(
    surprise: Scalar,
    window: Tensor,
    counts: Tensor,
    gate_state: Tensor,
    *,
    alpha: float,
    phi_min: float,
    eps: float,
    jitter: float,
    standardize: bool,
    detrend: bool,
    threshold: float,
    significance: float,
    alternating: bool = False,
    resonance: float = 0.0,
    release: float = 1,
    first_release: float = 1,
    seed: int,
) -> Signals:
    """Observe one surprise, in place, and return the gate for this step (eqs. 1 to 4).

    A surprise that is not finite is never written to the window; it closes the gate to phi_min.

    Args:
        surprise: The step's surprise, 0-d or a number.
        window: Ring buffer of the last W surprises, shape (W,), float64; written in place.
        counts: (surprises ever written, steps ever taken), shape (2,), int64; written in place.
        gate_state: A :class:`~ars.reference.backoff.GateState`, (1, 0, 0, 0, 0) before the first
            step, shape (5,), float64; written in place.
        alpha: Sensitivity of the gate, >= 0.
        phi_min: Smallest gate, in [0, 1].
        eps: Smallest Psi, in (0, 1].
        jitter: Largest relative change of the learning rate, >= 0.
        standardize: Gate on the deviation from the window's trend instead of on S itself.
        detrend: The trend is a line rather than the mean; rho is that of the line's residuals.
        threshold: Standard errors of deviation that are ordinary noise, >= 0.
        significance: Standard errors of rho that are ordinary noise, >= 0.
        alternating: Only a negative rho is resonance.
        resonance: Strength kappa of the braking on resonance itself, >= 0.
        release: Steps r over which a closed gate opens, >= 1.
        first_release: The same after a first alarm; only where that is less than ``release`` and
            only with ``standardize`` is there a difference.
        seed: Key of the jitter.

    Returns:
        The signals. ``surprise`` is what was observed, before any standardisation.

    Example:
        >>> window, counts = torch.zeros(4, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
        >>> gate_state = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
        >>> settings = {"alpha": 1.0, "phi_min": 0.1, "eps": 1e-6, "jitter": 0.0, "seed": 0}
        >>> plain = {"standardize": False, "detrend": False, "threshold": 0.0, "significance": 0.0}
        >>> controller_step_(0.0, window, counts, gate_state, **settings, **plain)
        Signals(surprise=0.0, rho=0.0, psi=1.0, phi=1.0, chi=0.0)
        >>> counts.tolist()
        [1, 1]
    """
    value = read(torch.as_tensor(surprise, dtype=torch.float64, device=window.device).detach())
    finite = is_finite(value)

    gated, deviation = value, None
    if standardize:
        values, valid = oldest_first(window, counts[0])
        _, predicted, error = trend(values, valid, linear=detrend)
        gated = standardized_surprise(value, predicted, error, valid, threshold)
        if first_release < release:
            magnitude: Any = abs(predicted)
            deviation = error + ERROR_FLOOR * magnitude

    step = read(counts[1].clone())
    remember_(window, counts, value, finite)
    values, valid = oldest_first(window, counts[0])
    if detrend:
        values = trend(values, valid, linear=True)[0]
    rho = shrink(autocorrelation(values, valid, read(window.abs().amax())), valid, significance)
    psi = entropy_guard(rho, eps, alternating)
    phi = choose(finite, surprise_gate(gated, psi, alpha, phi_min, resonance), phi_min)
    before = GateState(*(gate_state.tolist() if is_host(gate_state) else gate_state.unbind()))
    after = before._replace(phi=slow_release(phi, before.phi, release))
    if deviation is not None:
        after = back_off(
            before, phi, value, finite, psi, deviation,
            phi_min=phi_min, first_release=first_release, release=release,
        )  # fmt: skip
    _write_(gate_state, before, after)
    phi = after.phi
    return Signals(value, rho, psi, phi, chronos_jitter(psi, draw(psi, seed, step), jitter))


def _write_(gate_state: Tensor, before: GateState, after: GateState) -> None:
    if not is_host(gate_state):
        for place, entry in zip(gate_state.unbind(), after, strict=True):
            place.copy_(entry) if isinstance(entry, Tensor) else place.fill_(entry)
    elif after != before:  # an open gate stays as it is
        gate_state.copy_(torch.tensor(after, dtype=torch.float64, device="cpu"))


def standardized_surprise(
    surprise: Scalar,
    predicted: Scalar,
    error: Scalar,
    valid: Count,
    threshold: float,
) -> Scalar:
    r"""One-sided surprise, in standard errors beyond a threshold.

    ``max(0, (S - predicted) / (error + 1e-6 |predicted|) - threshold)``, and 0 while the trend
    rests on fewer than ten values. A value as good as expected, or better, is no surprise.

    Args:
        surprise: The new value.
        predicted: What :func:`trend` predicts for it.
        error: The standard error of that prediction.
        valid: How many values the trend was fitted to.
        threshold: Standard errors that count as ordinary noise, >= 0.

    Returns:
        The standardized surprise, >= 0.
    """
    magnitude: Any = abs(predicted)
    scale = error + ERROR_FLOOR * magnitude
    deviations = (surprise - predicted) / choose(scale > 0, scale, 1.0)
    return choose(valid >= MIN_HISTORY, at_least(deviations - threshold, 0.0), 0.0)


def shrink(rho: Scalar, valid: Count, significance: float) -> Scalar:
    r"""Move an autocorrelation towards 0 by ``significance`` sampling errors of ``1/sqrt(n)``.

    ``sign(rho) max(0, |rho| - significance / sqrt(n))``: what noise explains is not resonance.

    Args:
        rho: Autocorrelation in [-1, 1].
        valid: How many values it was estimated from.
        significance: Standard errors to subtract, >= 0; 0 returns rho itself.

    Returns:
        The shrunken autocorrelation.
    """
    noise = significance / divisor(valid) ** 0.5
    return copysign(at_least(abs(rho) - noise, 0.0), rho)


def entropy_guard(rho: Scalar, eps: float, alternating: bool = False) -> Scalar:
    """EntropyGuard, ``Psi = max(eps, 1 - rho^2)`` (eq. 2): 1 without resonance, eps in full.

    Args:
        rho: Lag-1 autocorrelation of the surprises, in [-1, 1].
        eps: Smallest Psi, in (0, 1].
        alternating: Only alternation is resonance: a positive rho counts as 0.

    Example:
        >>> entropy_guard(0.5, eps=1e-6), entropy_guard(0.5, eps=1e-6, alternating=True)
        (0.75, 1.0)
    """
    counted: Any = at_most(rho, 0.0) if alternating else rho
    return at_least(1 - counted * counted, eps)


def surprise_gate(
    surprise: Scalar, psi: Scalar, alpha: float, phi_min: float, resonance: float = 0.0
) -> Scalar:
    """SurpriseGate, ``Phi = phi_min + (1 - phi_min) exp(-alpha S~)`` (eq. 3): 1 is open.

    ``S~ = S / Psi + resonance (1 / Psi - 1)``. A negative surprise counts as 0: the gate never
    opens further than 1.

    Args:
        surprise: S.
        psi: What :func:`entropy_guard` returned, in (0, 1].
        alpha: Sensitivity, >= 0.
        phi_min: Smallest gate, in [0, 1].
        resonance: kappa, >= 0.

    Example:
        >>> surprise_gate(-1.0, 1.0, alpha=1.0, phi_min=0.1)
        1.0
        >>> surprise_gate(1e9, 1.0, alpha=1.0, phi_min=0.1)
        0.1
    """
    strained = at_least(surprise, 0.0) / psi + resonance * (1 / psi - 1)
    return phi_min + (1 - phi_min) * exp(-alpha * strained)


def draw(psi: Scalar, seed: int, step: Any) -> Scalar:
    """Return the jitter's random number of a step, in [0, 1).

    Without resonance there is no jitter, whatever is drawn; on a CPU nothing is then.

    Args:
        psi: What :func:`entropy_guard` returned, in (0, 1].
        seed: Key, 64 bits.
        step: Number of the step, >= 0, modulo 2^32: an int, or an int64 tensor.

    Example:
        >>> draw(1.0, seed=0, step=3), 0 <= draw(0.5, seed=0, step=3) < 1
        (0.5, True)
    """
    still = not isinstance(psi, Tensor) and psi == 1.0
    return 0.5 if still else philox_uniform(seed, step & 0xFFFFFFFF)


def chronos_jitter(psi: Scalar, uniform: Scalar, jitter: float) -> Scalar:
    """ChronosJitter, ``chi = jitter (2 u - 1) (1 - Psi)`` (eq. 4), with u uniform in [0, 1).

    Args:
        psi: What :func:`entropy_guard` returned, in (0, 1].
        uniform: u, what :func:`draw` returned.
        jitter: Largest relative change of the learning rate, >= 0.

    Example:
        >>> chronos_jitter(psi=0.5, uniform=0.0, jitter=0.2)
        -0.1
    """
    return jitter * (2 * uniform - 1) * (1 - psi)
