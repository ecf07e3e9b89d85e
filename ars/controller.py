"""The controller of a training run: its parts, and its state on the device."""

import torch
from torch import Tensor

from ars import reference
from ars.config import ARSConfig
from ars.parts import ChronosJitter, EntropyGuard, SurpriseGate

__all__ = ["ARSController"]

_OPEN = reference.GateState(phi=1.0, slow=0.0, deviation=0.0, mean=0.0, lowest=0.0)


class ARSController:
    """The controller: its three parts, and its memory on one device.

    Args:
        config: Its settings.
        device: Where it lives: the device of the parameters it gates.

    Attributes:
        config: Its settings.
        entropy_guard: Psi, from the autocorrelation of the surprises.
        surprise_gate: Phi, from a surprise and Psi; opens over ``release``. The controller itself
            shortens that to ``first_release``, as it remembers whether there was an alarm before.
        chronos_jitter: chi, from Psi and the step.

    Example:
        >>> controller = ARSController(ARSConfig.paper())
        >>> signals = controller.observe(0.0)
        >>> signals.psi, signals.phi, signals.chi
        (1.0, 1.0, 0.0)
        >>> controller.surprise_gate(0.0, psi=1.0)
        1.0
    """

    def __init__(self, config: ARSConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.entropy_guard = EntropyGuard(eps=config.eps, alternating=config.alternating)
        self.surprise_gate = SurpriseGate(
            alpha=config.alpha,
            phi_min=config.phi_min,
            resonance=config.resonance,
            release=config.release,
        )
        self.chronos_jitter = ChronosJitter(jitter=config.jitter, seed=config.seed)
        self._settings = (
            vars(self.entropy_guard) | vars(self.surprise_gate) | vars(self.chronos_jitter)
        )
        for name in ("standardize", "detrend", "threshold", "significance", "first_release"):
            self._settings[name] = getattr(config, name)
        self.window = torch.zeros(config.window, dtype=torch.float64, device=device)
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)
        self.gate_state = torch.zeros(len(_OPEN), dtype=torch.float64, device=device)
        self.gate_state[0].fill_(1.0)

    def observe(self, surprise: Tensor | float) -> reference.Signals:
        """Observe one surprise and return the gate for this step.

        Args:
            surprise: The step's surprise, 0-d, on any device, or a number.

        Returns:
            The signals (eqs. 1 to 4): numbers on a CPU, 0-d float64 on another device.
        """
        return reference.controller_step_(
            surprise, self.window, self.counts, self.gate_state, **self._settings
        )

    def latest(self) -> Tensor:
        """Return the last finite surprise, 0-d, or 0 before the first; nothing waits for it."""
        place = (self.counts[0] - 1) % self.window.numel()
        return self.window.gather(0, place.view(1)).reshape(())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the window (W,), the counts (2,) and the gate's memory (5,), as references."""
        return {"window": self.window, "counts": self.counts, "gate_state": self.gate_state}

    def check_state_dict(self, state: dict[str, Tensor]) -> None:
        """Check that a saved state fits this controller, changing nothing.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            ValueError: An entry is missing or was saved with another window.
        """
        for name, mine in self.state_dict().items():
            if name == "gate_state" and name not in state:
                continue  # as in version 0.1.0, or with last_phi in its place
            if name not in state:
                raise ValueError(f"the controller's state lacks {name!r}; was it saved by ARS?")
            if state[name].shape != mine.shape:
                raise ValueError(
                    f"the controller's {name!r} was saved with shape {tuple(state[name].shape)}, "
                    f"this one has {tuple(mine.shape)}: use the same ARSConfig(window=...)"
                )

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a state saved by :meth:`state_dict` into this controller's tensors.

        Version 0.1.0 saved nothing of the gate: it is taken to be open. A ``last_phi``, which was
        saved in its place later, opens over ``release``, as it would have.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            ValueError: It does not fit; nothing has been changed then.
        """
        self.check_state_dict(state)
        self.window.copy_(state["window"])
        self.counts.copy_(state["counts"])
        if "gate_state" in state:
            self.gate_state.copy_(state["gate_state"])
        else:
            self.gate_state.copy_(torch.tensor(_OPEN, dtype=torch.float64, device="cpu"))
            if "last_phi" in state:
                self.gate_state[0].copy_(state["last_phi"])
                self.gate_state[1].fill_(1.0)
