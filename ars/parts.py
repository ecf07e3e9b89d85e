r"""The three parts of the controller: EntropyGuard, SurpriseGate and ChronosJitter.

Each is its settings and its equation; the equations themselves are in
:mod:`ars.reference.controller`. Scalars are numbers or 0-d tensors.
"""

import dataclasses

from torch import Tensor

from ars import reference
from ars.reference.scalars import Scalar
from ars.settings import check_settings

__all__ = ["ChronosJitter", "EntropyGuard", "SurpriseGate"]


class _Part:
    def __post_init__(self) -> None:
        check_settings(type(self).__name__, vars(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropyGuard(_Part):
    r"""Measures how far a signal is from resonance.

    .. math:: \Psi = \max(\epsilon, 1 - \rho^2)

    1 while successive surprises are uncorrelated, eps when each determines the next.

    Args:
        eps: Smallest Psi, in (0, 1]; 1 switches the part off.
        alternating: Only alternation is resonance: a positive rho counts as 0.

    Raises:
        TypeError: A setting has the wrong type.
        ValueError: A setting is out of its range.

    Example:
        >>> guard = EntropyGuard()
        >>> guard(0.0), guard(-0.5), guard(1.0)
        (1.0, 0.75, 1e-06)
        >>> guard = EntropyGuard(alternating=True)
        >>> guard(-0.5), guard(0.5)
        (0.75, 1.0)
    """

    eps: float = 1e-6
    alternating: bool = False

    def __call__(self, rho: Scalar) -> Scalar:
        """Return Psi.

        Args:
            rho: Lag-1 autocorrelation of the surprises, in [-1, 1].
        """
        return reference.entropy_guard(rho, self.eps, self.alternating)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SurpriseGate(_Part):
    r"""Closes under surprise, and the more so in resonance.

    .. math::
        \tilde S &= (S + \kappa) / \Psi - \kappa \\
        \Phi^* &= \phi_{min} + (1 - \phi_{min}) \exp(-\alpha \tilde S) \\
        \Phi_t &= \min(\Phi^*, \Phi_{t-1} + (1 - \Phi_{t-1}) / r)

    With kappa = 0 and r = 1, which is the proposal, it is ``S / Psi``, and without memory. With
    kappa > 0 resonance brakes without any surprise, for a self-oscillation may go along with a
    falling loss. With r > 1 a gate that has closed opens over about r steps.

    Args:
        alpha: Sensitivity, >= 0; 0 leaves the gate open.
        phi_min: Smallest gate, in [0, 1]; 1 switches the part off.
        resonance: kappa, >= 0.
        release: r, in steps, >= 1.

    Raises:
        TypeError: A setting has the wrong type.
        ValueError: A setting is out of its range.

    Example:
        >>> SurpriseGate()(0.0, 0.5), SurpriseGate(phi_min=0.5)(1e9, 0.5)
        (1.0, 0.5)
        >>> SurpriseGate(release=4)(0.0, 1.0, previous=0.2)
        0.4
    """

    alpha: float = 1.0
    phi_min: float = 0.1
    resonance: float = 0.0
    release: float = 1

    def __call__(self, surprise: Scalar, psi: Scalar, previous: Scalar = 1.0) -> Scalar:
        """Return Phi, in [phi_min, 1].

        Args:
            surprise: S; a negative one counts as 0.
            psi: What :class:`EntropyGuard` returned, in (0, 1].
            previous: Phi of the step before.
        """
        phi = reference.surprise_gate(surprise, psi, self.alpha, self.phi_min, self.resonance)
        return reference.slow_release(phi, previous, self.release)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChronosJitter(_Part):
    r"""Varies the learning rate in resonance, to break its rhythm.

    .. math:: \chi = j (2 u - 1) (1 - \Psi), \qquad u \sim U[0, 1)

    u is a Philox number that depends on the seed and the step alone: the same on every device.

    Args:
        jitter: j, in [0, 1); 0 switches the part off.
        seed: Key of the random numbers, 0 <= seed < 2^63.

    Raises:
        TypeError: A setting has the wrong type.
        ValueError: A setting is out of its range.

    Example:
        >>> chi = ChronosJitter(jitter=0.1)
        >>> chi(1.0, step=7), abs(chi(0.0, step=7)) <= 0.1
        (0.0, True)
    """

    jitter: float = 0.1
    seed: int = 0

    def __call__(self, psi: Scalar, step: int | Tensor) -> Scalar:
        """Return chi, in [-jitter, jitter).

        Args:
            psi: What :class:`EntropyGuard` returned, in (0, 1].
            step: Number of the step, >= 0; taken modulo 2^32.
        """
        uniform = reference.draw(psi, self.seed, step)
        return reference.chronos_jitter(psi, uniform, self.jitter)
