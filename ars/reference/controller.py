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
:func:`shrink`. Only alternation counts as resonance, as a trend that is no line leaves a positive
rho and never a negative one. Two further terms are absent from the proposal, where kappa = 0 and
r = 1. Resonance brakes by itself, and a gate that has closed opens over r steps:

.. math::
    \rho &\to \min(\rho, 0) \\
    S / \Psi &\to (S + \kappa) / \Psi - \kappa \\
    \Phi_t &= \min(\Phi, \Phi_{t-1} + (1 - \Phi_{t-1}) / r)

A gate opens fast after a first alarm and slowly after a second one. An abrupt shift and a learning
rate beyond the stable edge begin alike, with one surprise. They differ when the gate opens: after
the shift the loss falls, beyond the edge it rises again. So the first alarm releases the gate over
r_1 steps, and an alarm while it opens over r_2 > r_1 (:func:`back_off`):

.. math::
    m_t &= m_{t-1} + (S_t - m_{t-1}) / 4, \qquad b_t = \min(b_{t-1}, m_t) \\
    \text{alarm} &:\quad \Phi^* < (\phi_{min} + \Phi_{t-1}) / 2
                    \quad\text{or, while the gate opens,}\quad m_t > b_{t-1} + 2 \sigma

with sigma the standard error of the trend's prediction before the first alarm, and m = b = S at
each alarm. A rise closes the gate. Resonance releases over r_2 at once: there is nothing to try
again. A gate of 0.9 counts as open, and the next alarm as a first one.
"""

import functools
import math
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ars.reference.rounding import philox_uniform
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

__all__ = [
    "AVERAGED", "CLOSED_BY", "ERROR_FLOOR", "MIN_HISTORY", "OPEN", "RELATIVE_NOISE_FLOOR", "RISE",
    "GateState", "Signals", "back_off", "chronos_jitter", "controller_step_", "draw",
    "entropy_guard", "slow_release", "surprise_gate",
]  # fmt: skip

# A number of values: on the device, or an int where reading it waits for nothing.
Count: TypeAlias = int | Tensor

# Variation below this share of a window's largest value is rounding, not signal.
RELATIVE_NOISE_FLOOR = 1e-12
# A trend line and its deviation mean nothing over fewer values than this.
MIN_HISTORY = 10
# Least error of a prediction, relative to it, so that a constant signal does not divide by 0.
ERROR_FLOOR = 1e-6
# Surprises that the running mean is over: few, as each one more is damage.
AVERAGED = 4
# Standard errors by which the mean must rise: 1 has false alarms after a shift, 3 comes late.
RISE = 2.0
# An alarm closes this share of what the gate is open beyond phi_min.
CLOSED_BY = 0.5
# A gate that counts as open.
OPEN = 0.9


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

    @classmethod
    def read(cls, diagnostics: Tensor) -> "Signals":
        """Return the signals that a step's diagnostics begin with: numbers on a CPU, else 0-d.

        Args:
            diagnostics: Shape (5,) or longer; what is returned does not follow it.
        """
        found = diagnostics[: len(cls._fields)].clone()
        return cls(*(found.tolist() if is_host(found) else found.unbind()))


class GateState(NamedTuple):
    """What the gate remembers: numbers on a CPU, else 0-d float64 tensors.

    Args:
        phi: Phi of the step before.
        slow: 1 if the gate opens over the long release, else 0.
        deviation: sigma while the gate opens after an alarm, else 0.
        mean: m, of the surprises since the alarm.
        lowest: b, the least m since the alarm.
    """

    phi: Scalar
    slow: Scalar
    deviation: Scalar
    mean: Scalar
    lowest: Scalar


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
        gate_state: A :class:`GateState`, (1, 0, 0, 0, 0) before the first
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


def slow_release(phi: Scalar, previous: Scalar, release: float) -> Scalar:
    """Let a gate open by at most a part of what it was closed: ``1 / release``, a step.

    Args:
        phi: What is asked for, in [0, 1].
        previous: Phi of the step before.
        release: r, in steps, >= 1.

    Example:
        >>> slow_release(1.0, 0.2, release=4), slow_release(0.1, 0.2, release=4)
        (0.4, 0.1)
    """
    limit = previous + (1 - previous) / release
    return choose(phi < limit, phi, limit)


def back_off(
    state: GateState,
    phi: Scalar,
    surprise: Scalar,
    finite: Any,
    psi: Scalar,
    deviation: Scalar,
    *,
    phi_min: float,
    first_release: float,
    release: float,
) -> GateState:
    """Return the gate's next state, whose ``phi`` is that of this step.

    Args:
        state: Of the step before.
        phi: What surprise and resonance ask for.
        surprise: S of this step.
        finite: Whether S is a finite number; if it is not, there is no alarm.
        psi: Of this step; less than 1 is resonance.
        deviation: Standard error of what the trend predicted for S.
        phi_min: Smallest gate.
        first_release: r_1, in steps.
        release: r_2, in steps.

    Example:
        >>> state = GateState(phi=1.0, slow=0.0, deviation=0.0, mean=0.0, lowest=0.0)
        >>> settings = {"phi_min": 0.1, "first_release": 2, "release": 10}
        >>> state = back_off(state, 0.2, 5.0, True, 1.0, 0.5, **settings)  # a first alarm
        >>> state
        GateState(phi=0.2, slow=0.0, deviation=0.5, mean=5.0, lowest=5.0)
        >>> round(back_off(state, 1.0, 5.0, True, 1.0, 0.5, **settings).phi, 6)
        0.6
    """
    watching: Any = state.deviation > 0
    mean: Any = state.mean + (surprise - state.mean) / AVERAGED
    rises = finite & watching & (mean > state.lowest + RISE * state.deviation)
    phi = choose(rises, phi_min, phi)
    alarm = finite & (rises | (phi < phi_min + CLOSED_BY * (state.phi - phi_min)))
    slow: Any = (state.slow > 0) | (psi < 1) | (alarm & watching)
    soon = slow_release(phi, state.phi, first_release)
    phi = choose(slow, slow_release(phi, state.phi, release), soon)
    opened: Any = phi >= OPEN
    kept = choose(watching, state.deviation, choose(alarm, deviation, 0.0))
    follows: Any = watching & finite
    return GateState(
        phi,
        choose(opened, 0.0, slow * 1.0),
        choose(opened, 0.0, kept),
        choose(alarm, surprise, choose(follows, mean, state.mean)),
        choose(alarm, surprise, choose(follows & (mean < state.lowest), mean, state.lowest)),
    )


def remember_(window: Tensor, counts: Tensor, value: Scalar, finite: Any) -> None:
    """Write a finite surprise over the oldest one, and count."""
    if isinstance(value, Tensor):
        slot = (counts[0] % window.numel()).unsqueeze(0)
        window.scatter_(0, slot, torch.where(finite, value, window.gather(0, slot)))
        counts += torch.stack((finite.to(torch.int64), torch.ones_like(counts[1])))
        return
    if finite:
        window[counts[0] % window.numel()] = value
    counts += _count_increment(finite)


@functools.cache
def _count_increment(finite: bool) -> Tensor:
    return torch.tensor([int(finite), 1], device="cpu")


def oldest_first(window: Tensor, count: Tensor) -> tuple[Tensor, Count]:
    """Return the ring buffer in order of age, and how many values are valid.

    Entry ``count % W`` of the ring is written next, so with n valid values the oldest is at
    ``(count - n) % W``. On a CPU the values are exactly the valid ones and n is an int; elsewhere,
    where reading n would wait for the device, there are W values and the unwritten ones are 0.
    """
    size = window.numel()
    if is_host(window):
        written = int(count)
        oldest = written % size if written > size else 0
        return torch.cat((window[oldest:], window[:oldest]))[:written], min(written, size)
    age = torch.arange(size, device=window.device)
    valid = count.clamp(max=size)
    ordered = window[(count - valid + age) % size]
    return torch.where(age < valid, ordered, 0.0), valid


def _valid_mask(values: Tensor, valid: Count) -> Tensor | None:
    """Return which values count, or None if all do."""
    if isinstance(valid, int):
        return None
    return torch.arange(values.numel(), device=values.device) < valid


def _masked(values: Tensor, used: Tensor | None) -> Tensor:
    """Set what does not count to 0."""
    return values if used is None else torch.where(used, values, 0.0)


def divisor(count: Count) -> Any:
    """Return a count to divide by, at least 1."""
    if isinstance(count, int):
        return max(count, 1)
    return count.clamp(min=1).to(torch.float64)  # int64 would divide in float32


def autocorrelation(values: Tensor, valid: Count, scale: Scalar) -> Scalar:
    r"""Lag-1 autocorrelation ``rho = corr(H[:-1], H[1:])`` (eq. 1), 0 while it is undefined.

    Pearson's correlation of the pairs of successive values. It is undefined with fewer than two
    pairs, when either side's standard deviation is within 1e-12 of ``scale``: rounding, or when a
    variance overflows.

    Args:
        values: The window oldest first, shape (W,).
        valid: How many leading values count: 0-d, or an int if they all do.
        scale: Magnitude of what the values were computed from, 0-d or a number.

    Returns:
        rho in [-1, 1], a number on a CPU, else 0-d.
    """
    pairs = valid - 1
    if isinstance(pairs, int) and pairs < 2:
        return 0.0
    used = _valid_mask(values[1:], pairs)
    n = divisor(pairs)
    # Subtracting the first value makes a constant window vary by exactly 0, whatever its level.
    shifted = values - values[0]
    x, y = _masked(shifted[:-1], used), _masked(shifted[1:], used)
    x = _masked(x - read(x.sum()) / n, used)
    y = _masked(y - read(y.sum()) / n, used)
    xx, yy, xy = read(x.dot(x)), read(y.dot(y)), read(x.dot(y))
    noise = RELATIVE_NOISE_FLOOR * scale
    floor = n * (noise * noise)  # a power of a number would raise where this is infinite
    defined = (xx > floor) & (yy > floor) & (xx + yy < math.inf) & (pairs >= 2)
    rho = xy / choose(defined, xx**0.5 * yy**0.5, 1.0)
    return choose(defined, at_least(at_most(rho, 1.0), -1.0), 0.0)


@functools.lru_cache(maxsize=4)
def _ages(count: int, device: torch.device) -> Tensor:
    """Return the ages of a full window, centred."""
    return torch.arange(count, dtype=torch.float64, device=device) - (count - 1) / 2


def trend(values: Tensor, valid: Count, *, linear: bool) -> tuple[Tensor, Scalar, Scalar]:
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
        error, numbers on a CPU, else 0-d.
    """
    if isinstance(valid, int) and valid == 0:
        return values, 0.0, 0.0
    used = _valid_mask(values, valid)
    n = divisor(valid)
    first = read(values[0])
    # As in autocorrelation: a constant window must leave residuals of exactly 0.
    shifted = _masked(values - first, used)
    mean = read(shifted.sum()) / n
    residuals, predicted = shifted - mean, first + mean
    leverage, freedom = 1 + 1 / n, at_least(n - (2 if linear else 1), 1)
    if linear:
        age = _ages(values.numel(), values.device)
        age = age if used is None else _masked(age + (values.numel() - n) / 2, used)
        spread = at_least(n * (n * n - 1) / 12, 0.5)  # the sum of age^2
        slope = read(age.dot(shifted)) / spread
        ahead = (n + 1) / 2
        residuals, predicted = residuals - slope * age, predicted + slope * ahead
        leverage = leverage + ahead * ahead / spread
    residuals = _masked(residuals, used)
    error = (read(residuals.dot(residuals)) / freedom * leverage) ** 0.5
    return residuals, predicted, error
