r"""How long a closed gate takes to open: briefly after a first alarm, long after a second one.

An abrupt shift and a learning rate beyond the stable edge begin alike, with one surprise. They
differ when the gate opens: after the one the loss falls, beyond the other it rises again. So the
first alarm releases the gate over r_1 steps, and an alarm while it opens over r_2 > r_1:

.. math::
    m_t &= m_{t-1} + (S_t - m_{t-1}) / 4, \qquad b_t = \min(b_{t-1}, m_t) \\
    \text{alarm} &:\quad \Phi^* < (\phi_{min} + \Phi_{t-1}) / 2
                    \quad\text{or, while the gate opens,}\quad m_t > b_{t-1} + 2 \sigma

with sigma the standard error of the trend's prediction before the first alarm, and m = b = S at
each alarm. A rise closes the gate. Resonance releases over r_2 at once: there is nothing to try
again. A gate of 0.9 counts as open, and the next alarm as a first one.
"""

from typing import Any, NamedTuple

from ars.reference.scalars import Scalar, choose

__all__ = [
    "AVERAGED", "CLOSED_BY", "OPEN", "RISE", "GateState", "back_off", "slow_release",
]  # fmt: skip

# Surprises that the running mean is over: few, as each one more is damage.
AVERAGED = 4
# Standard errors by which the mean must rise: 1 has false alarms after a shift, 3 comes late.
RISE = 2.0
# An alarm closes this share of what the gate is open beyond phi_min.
CLOSED_BY = 0.5
# A gate that counts as open.
OPEN = 0.9


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
