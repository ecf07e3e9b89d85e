r"""The settings of the controller, and its three parts: EntropyGuard, SurpriseGate, ChronosJitter.

A part is its settings and its equation; the equations themselves are in
:mod:`ars.reference.controller`. Scalars are numbers or 0-d tensors.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ars import reference
from ars.reference import Scalar

__all__ = ["CONDITIONED", "ARSConfig", "ChronosJitter", "EntropyGuard", "SurpriseGate"]

# What Phi can multiply.
GATES = ("betas", "lr", "grad")
# What the controller can watch, besides what a callable returns.
SURPRISES = ("auto", "loss", "grad_norm", "entropy")

_Rule = tuple[type, Callable[[Any], bool], str]

_NOT_NEGATIVE: _Rule = (float, lambda x: 0 <= x < math.inf, "be finite and >= 0")
_RULES: dict[str, _Rule] = {
    "window": (int, lambda x: x >= 3, "be at least 3"),
    "alpha": _NOT_NEGATIVE,
    "phi_min": (float, lambda x: 0 <= x <= 1, "lie in [0, 1]"),
    "eps": (float, lambda x: 0 < x <= 1, "lie in (0, 1]"),
    "jitter": (float, lambda x: 0 <= x < 1, "lie in [0, 1)"),
    "standardize": (bool, lambda x: True, ""),
    "detrend": (bool, lambda x: True, ""),
    "threshold": _NOT_NEGATIVE,
    "significance": _NOT_NEGATIVE,
    "alternating": (bool, lambda x: True, ""),
    "resonance": _NOT_NEGATIVE,
    "release": (float, lambda x: 1 <= x < math.inf, "be finite and >= 1"),
    "first_release": (float, lambda x: 1 <= x < math.inf, "be finite and >= 1"),
    "seed": (int, lambda x: 0 <= x < 2**63, "lie in [0, 2^63)"),
}


def _check_settings(owner: str, settings: Mapping[str, Any]) -> None:
    """Raise unless every setting of an owner has its type and lies in its range.

    Raises:
        TypeError: A setting has the wrong type.
        ValueError: A setting is out of its range.
    """
    for name, value in settings.items():
        if name == "gate":
            _check_gate(owner, value)
        elif name == "surprise":
            _check_surprise(owner, value)
        else:
            kind = _RULES[name][0]
            accepted = (int, float) if kind is float else kind
            if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
                article = "an" if kind is int else "a"
                raise TypeError(f"{owner}: {name} must be {article} {kind.__name__}, got {value!r}")
    for name, value in settings.items():
        if name in _RULES and not _RULES[name][1](value):
            raise ValueError(f"{owner}: {name} must {_RULES[name][2]}, got {value!r}")


def _check_gate(owner: str, gate: Any) -> None:
    if not isinstance(gate, tuple):
        raise TypeError(f"{owner}: gate must be a tuple of names such as ('lr',), got {gate!r}")
    if not set(gate) <= set(GATES) or len(set(gate)) < len(gate):
        raise ValueError(f"{owner}: gate must name some of {GATES}, each once, got {gate!r}")


def _check_surprise(owner: str, surprise: Any) -> None:
    if not isinstance(surprise, str) and not callable(surprise):
        raise TypeError(f"{owner}: surprise must be a name or a callable, got {surprise!r}")
    if isinstance(surprise, str) and surprise not in SURPRISES:
        raise ValueError(f"{owner}: surprise must be one of {SURPRISES}, got {surprise!r}")


class _Part:
    def __post_init__(self) -> None:
        _check_settings(type(self).__name__, vars(self))


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ARSConfig:
    r"""Settings of the controller that gates an optimizer (adaptive resonance suppression).

    The default brakes the learning rate, down to a tenth, on a surprise far beyond what its recent
    trend explains: for tens of steps, and for hundreds if the surprise then rises again. It also
    brakes on an alternation beyond sampling noise, whether that surprises or not. Ordinary training
    runs with an open gate. It is what the stress tests in docs/ars.md support. :meth:`paper` is the
    formula as proposed, exactly. The equations are those of :mod:`ars.reference.controller`; the
    parts are :class:`ars.EntropyGuard` (``eps``, ``alternating``; ``eps=1`` switches it off),
    :class:`ars.SurpriseGate` (``alpha``, ``phi_min``, ``resonance``, ``release``; ``gate=()`` or
    ``phi_min=1`` switches it off) and :class:`ars.ChronosJitter` (``jitter``, ``seed``;
    ``jitter=0`` switches it off). The other settings, ``first_release`` among them, are the
    controller's own.

    Args:
        window: How many surprises are remembered, W >= 3.
        alpha: Sensitivity of the gate to surprise, >= 0; 0 leaves it open.
        phi_min: Smallest gate, in [0, 1]; 1 leaves it open.
        eps: Smallest Psi, in (0, 1].
        jitter: Largest relative change of the learning rate by the jitter, in [0, 1).
        gate: What Phi multiplies, some of: ``"betas"``, beta_i Phi (the proposal); ``"lr"``,
            lr (1 + chi) Phi; ``"grad"``, the task's gradient after clipping, times Phi. Adam
            cancels a factor of the gradient that stays the same; what it does not cancel is one
            that changes within the memory of its second moment.
        surprise: What is watched. ``"auto"``: the loss if ``step()`` gets one, else the gradient
            norm. ``"loss"`` or ``"grad_norm"``: that. ``"entropy"``: what is passed as
            ``step(surprise=ars.prediction_entropy(logits))``. A callable: the 0-d tensor that it
            returns when ``step()`` calls it, without arguments.
        standardize: Gate on the deviation from the window's trend, in standard errors and upwards
            only, instead of on the surprise itself.
        detrend: The trend is a line rather than the mean, and rho is that of its residuals.
        threshold: Standard errors that count as ordinary, >= 0 (only with ``standardize``).
        significance: Standard errors of rho that count as ordinary, >= 0.
        alternating: Only alternation, a negative rho, is resonance: a trend that is no line makes
            rho positive in every descent.
        resonance: How much resonance brakes by itself, without surprise, kappa >= 0.
        release: Steps in which a closed gate opens, >= 1; 1 opens it at once.
        first_release: The same after a first surprise, >= 1. If the surprise rises again while the
            gate opens, or in resonance, it is ``release``. Without effect from ``release`` on, or
            without ``standardize``.
        seed: Key of the jitter's random numbers, 0 <= seed < 2^63.

    Raises:
        TypeError: A setting has the wrong type.
        ValueError: A setting is out of its range.

    Example:
        >>> ARSConfig.paper().threshold, ARSConfig().threshold
        (0.0, 10.0)
        >>> ARSConfig(gate=("lr", "momentum"))
        Traceback (most recent call last):
        ValueError: ARSConfig: gate must name some of ('betas', 'lr', 'grad'), each once, got
        ('lr', 'momentum')
    """

    window: int = 50
    alpha: float = 1.0
    phi_min: float = 0.1
    eps: float = 1e-6
    jitter: float = 0.1
    gate: tuple[str, ...] = ("lr",)
    surprise: str | Callable[[], Tensor] = "auto"
    standardize: bool = True
    detrend: bool = True
    threshold: float = 10.0
    significance: float = 4.0
    alternating: bool = True
    resonance: float = 30.0
    release: float = 400
    first_release: float = 20
    seed: int = 0

    @classmethod
    def paper(cls, **overrides: Any) -> "ARSConfig":
        """Return the controller as proposed: the surprise itself, no detrending, no tests.

        Args:
            **overrides: Settings to change from the proposal's.

        Returns:
            The settings.

        Raises:
            TypeError: A setting is unknown, or has the wrong type.
            ValueError: A setting is out of its range.

        Example:
            >>> config = ARSConfig.paper(window=20)
            >>> config.window, config.gate, config.standardize
            (20, ('betas',), False)
        """
        plain: dict[str, Any] = {
            "window": 100, "alpha": 1.0, "phi_min": 0.1, "eps": 1e-6, "jitter": 0.1,
            "gate": ("betas",), "standardize": False, "detrend": False, "threshold": 0.0,
            "significance": 0.0, "alternating": False, "resonance": 0.0, "release": 1,
            "first_release": 1,
        }  # fmt: skip
        return cls(**(plain | overrides))

    def __post_init__(self) -> None:
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        _check_settings("ARSConfig", settings)


# The default controller. Settings are immutable, so all optimizers may share them.
CONDITIONED = ARSConfig()
