"""The settings of the controller."""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ars.settings import check_settings

__all__ = ["CONDITIONED", "ARSConfig"]


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
        check_settings("ARSConfig", settings)


# The default controller. Settings are immutable, so all optimizers may share them.
CONDITIONED = ARSConfig()
