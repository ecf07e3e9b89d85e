"""The controller of a training run: its settings, and its state on the device."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from ars import reference

__all__ = ["ARSConfig", "ARSController", "check_watched", "read_surprise"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ARSConfig:
    r"""Settings of the controller that gates an optimizer (adaptive resonance suppression).

    The default is conditioned: it brakes on a surprise that its recent trend does not explain, and
    ignores sampling noise, so that ordinary training runs with an open gate. :meth:`paper` is the
    formula as proposed, exactly. The equations are those of :mod:`ars.reference.controller`.

    Args:
        window: How many surprises are remembered, W >= 3.
        alpha: Sensitivity of the gate to surprise, >= 0; 0 leaves it open.
        phi_min: Smallest gate, in [0, 1]; 1 leaves it open.
        eps: Smallest Psi, in (0, 1].
        jitter: Largest relative change of the learning rate by the jitter, in [0, 1).
        standardize: Gate on the deviation from the window's trend, in standard errors and upwards
            only, instead of on the surprise itself.
        detrend: The trend is a line rather than the mean, and rho is that of its residuals.
        threshold: Standard errors that count as ordinary, >= 0 (only with ``standardize``).
        significance: Standard errors of rho that count as ordinary, >= 0.
        seed: Key of the jitter's random numbers, 0 <= seed < 2^63.

    Raises:
        TypeError: A setting has the wrong type.
        ValueError: A setting is out of its range.

    Example:
        >>> ARSConfig.paper().threshold, ARSConfig().threshold
        (0.0, 3.0)
        >>> ARSConfig(phi_min=2.0)
        Traceback (most recent call last):
        ValueError: ARSConfig: phi_min must lie in [0, 1], got 2.0
    """

    window: int = 100
    alpha: float = 1.0
    phi_min: float = 0.1
    eps: float = 1e-6
    jitter: float = 0.1
    standardize: bool = True
    detrend: bool = True
    threshold: float = 3.0
    significance: float = 3.0
    seed: int = 0

    @classmethod
    def paper(cls, **overrides: Any) -> "ARSConfig":
        """Return the controller as proposed: the surprise itself, no detrending, no tests.

        Args:
            **overrides: Settings to change from the proposal's.

        Returns:
            The settings.
        """
        plain = {"standardize": False, "detrend": False, "threshold": 0.0, "significance": 0.0}
        return cls(**(plain | overrides))

    def __post_init__(self) -> None:
        for name in ("window", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"ARSConfig: {name} must be an int, got {value!r}")
        for name in ("standardize", "detrend"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"ARSConfig: {name} must be a bool, got {getattr(self, name)!r}")
        for name in ("alpha", "phi_min", "eps", "jitter", "threshold", "significance"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"ARSConfig: {name} must be a float, got {value!r}")
        ranges = (
            ("window", self.window >= 3, "be at least 3"),
            ("alpha", 0 <= self.alpha < math.inf, "be finite and >= 0"),
            ("phi_min", 0 <= self.phi_min <= 1, "lie in [0, 1]"),
            ("eps", 0 < self.eps <= 1, "lie in (0, 1]"),
            ("jitter", 0 <= self.jitter < 1, "lie in [0, 1)"),
            ("threshold", 0 <= self.threshold < math.inf, "be finite and >= 0"),
            ("significance", 0 <= self.significance < math.inf, "be finite and >= 0"),
            ("seed", 0 <= self.seed < 2**63, "lie in [0, 2^63)"),
        )
        for name, holds, rule in ranges:
            if not holds:
                raise ValueError(f"ARSConfig: {name} must {rule}, got {getattr(self, name)!r}")


class ARSController:
    """The controller's memory: the last surprises and how many there were, on one device.

    Args:
        config: Its settings.
        device: Where it lives: the device of the parameters it gates.
    """

    def __init__(self, config: ARSConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self._settings = dataclasses.asdict(config)
        del self._settings["window"]
        self.window = torch.zeros(config.window, dtype=torch.float64, device=device)
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)

    def observe(self, surprise: Tensor | float) -> reference.Signals:
        """Observe one surprise and return the gate for this step.

        Args:
            surprise: The step's surprise, 0-d, on any device, or a number.

        Returns:
            The signals (eqs. 1 to 4): numbers on a CPU, 0-d float64 on another device.
        """
        return reference.controller_step_(surprise, self.window, self.counts, **self._settings)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the window (W,) and the counts (2,), as references."""
        return {"window": self.window, "counts": self.counts}

    def check_state_dict(self, state: dict[str, Tensor]) -> None:
        """Check that a saved state fits this controller, changing nothing.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            ValueError: An entry is missing or was saved with another window.
        """
        for name, mine in self.state_dict().items():
            if name not in state:
                raise ValueError(f"the controller's state lacks {name!r}; was it saved by ARS?")
            if state[name].shape != mine.shape:
                raise ValueError(
                    f"the controller's {name!r} was saved with shape {tuple(state[name].shape)}, "
                    f"this one has {tuple(mine.shape)}: use the same ARSConfig(window=...)"
                )

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a state saved by :meth:`state_dict` into this controller's tensors."""
        self.check_state_dict(state)
        self.window.copy_(state["window"])
        self.counts.copy_(state["counts"])


def check_watched(before: str | None, now: str) -> None:
    """Check that a controller goes on watching what it has watched.

    Args:
        before: ``loss``, ``grad_norm``, or None before the first step.
        now: What it would watch in this step.

    Raises:
        ValueError: It is not the same.
    """
    if before not in (None, now):
        raise ValueError(
            f"the controller has watched the {before} and now gets the {now}: "
            "pass loss= to every step, or to none"
        )


def read_surprise(loss: Any) -> Tensor | None:
    """Return the loss as a detached 0-d tensor, or None if there is none.

    Raises:
        TypeError: It is neither a tensor nor a number.
        ValueError: It is not a scalar.
    """
    if loss is None:
        return None
    if isinstance(loss, (int, float)):
        # Of an addition Dynamo can make an input of the number, of a constructor only a constant.
        return torch.zeros((), dtype=torch.float64) + loss
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss must be a 0-d tensor or a number, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(
            f"the loss must be a scalar, got shape {tuple(loss.shape)}: reduce it, e.g. loss.mean()"
        )
    return loss.detach().reshape(())
