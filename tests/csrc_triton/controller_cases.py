"""Controllers for the kernels, and the same observation by the reference."""

from typing import Any

import torch
from torch import Tensor

from ars import reference
from ars.csrc_triton.layout import Config
from ars.csrc_triton.step import Controller

CONTROLLERS: dict[str, dict[str, Any]] = {
    "paper": {
        "alpha": 1.0, "phi_min": 0.1, "eps": 1e-6, "jitter": 0.1, "threshold": 0.0,
        "significance": 0.0, "alternating": 0.0, "resonance": 0.0, "release": 1.0,
        "first_release": 1.0, "seed": 3, "standardize": False, "detrend": False, "gate": ("betas",),
    },
    "conditioned": {
        "alpha": 0.7, "phi_min": 0.2, "eps": 1e-6, "jitter": 0.3, "threshold": 0.5,
        "significance": 0.3, "alternating": 0.0, "resonance": 0.0, "release": 1.0,
        "first_release": 1.0, "seed": -(2**40) - 5, "standardize": True, "detrend": True,
        "gate": ("betas", "lr", "grad"),
    },
}  # fmt: skip
CONTROLLERS["standardized"] = CONTROLLERS["conditioned"] | {"detrend": False, "gate": ("lr",)}
CONTROLLERS["resonant"] = CONTROLLERS["conditioned"] | {"resonance": 0.4, "release": 7.0}
CONTROLLERS["default"] = CONTROLLERS["conditioned"] | {
    "threshold": 3.0, "significance": 2.0, "alternating": 1.0, "resonance": 5.0,
    "release": 30.0, "first_release": 4.0, "gate": ("lr",),
}  # fmt: skip


def make_controller(name: str, window: int, device: str, history: int) -> Controller:
    """Make a controller that has observed ``history`` alternating surprises: resonance."""
    settings = CONTROLLERS[name]
    constants = [settings[entry.name.lower()] for entry in Config]
    config = torch.tensor(constants, dtype=torch.float64, device=device)
    values = torch.zeros(window, dtype=torch.float64)
    values[:history] = torch.arange(history) % 2 + 0.3 * torch.rand(history)
    return Controller(
        window=values.to(device),
        counts=torch.tensor([history, history], device=device),
        gate_state=torch.tensor([0.9, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64, device=device),
        config=config,
        seed=settings["seed"],
        standardize=settings["standardize"],
        detrend=settings["detrend"],
        gate=settings["gate"],
    )


def observe(controller: Controller, surprise: Tensor) -> reference.Signals:
    """Let the reference observe a surprise, in place."""
    constants = controller.config.tolist()
    return reference.controller_step_(
        surprise,
        controller.window,
        controller.counts,
        controller.gate_state,
        standardize=controller.standardize,
        detrend=controller.detrend,
        seed=controller.seed,
        **{entry.name.lower(): constants[entry] for entry in Config},
    )
