"""The optimizers that are compared."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ars import ARSAdamW, ARSConfig, ARSOptimizer

__all__ = ["ARMS", "BASE_RATES", "Arm", "Step", "arm_settings"]

# Best final validation of plain training at the size "small", found on seeds 100 and 101.
BASE_RATES = {"adamw": 0.01, "sgd": 0.3, "muon": 0.03}
_BETAS = (0.9, 0.95)
_WEIGHT_DECAY = 0.1
_MOMENTUM = 0.9  # of SGD


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Args:
        title: in tables and figures.
        family: the base optimizer, a name of `BASE_RATES`.
        controller: of the optimizer, ``None`` for none.
        clip: largest gradient norm, ``None`` for no clipping.
        factor: of the learning rate, against that of the other arms.
        betas: of AdamW.
    """

    title: str
    family: str = "adamw"
    controller: ARSConfig | None = None
    clip: float | None = None
    factor: float = 1.0
    betas: tuple[float, float] = _BETAS


ARMS = {
    "adamw": Arm("AdamW"),
    "adamw-clip": Arm("AdamW, clipped", clip=1.0),
    "adamw-low": Arm("AdamW, clipped, lr / 10", clip=1.0, factor=0.1),
    # The betas that the proposal's gate leaves on average in ordinary training, without a gate.
    "adamw-betas": Arm("AdamW, betas x 0.13", betas=(0.13 * _BETAS[0], 0.13 * _BETAS[1])),
    "paper": Arm("paper", controller=ARSConfig.paper()),
    "paper-psi": Arm("paper, Psi alone", controller=ARSConfig.paper(phi_min=1.0, jitter=0.0)),
    "paper-psi-chi": Arm("paper, Psi and chi", controller=ARSConfig.paper(phi_min=1.0)),
    "paper-psi-phi": Arm("paper, Psi and Phi", controller=ARSConfig.paper(jitter=0.0)),
    "paper-lr": Arm("paper, gate on lr", controller=ARSConfig.paper(gate=("lr",))),
    "default": Arm("default", controller=ARSConfig()),
    "default-clip": Arm("default, clipped", controller=ARSConfig(), clip=1.0),
    "default-norm": Arm(
        "default, watching the gradient norm", controller=ARSConfig(surprise="grad_norm")
    ),
    "default-betas": Arm(
        "default on the betas, 20 steps",
        controller=ARSConfig(gate=("betas",), release=20),
    ),
    "sgd": Arm("SGD", family="sgd"),
    "sgd-default": Arm("SGD, default", family="sgd", controller=ARSConfig()),
    "muon": Arm("Muon", family="muon"),
    "muon-default": Arm("Muon, default", family="muon", controller=ARSConfig()),
}


def arm_settings(name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of an arm's update: its own, the controller's in full, and what all share.

    Args:
        name: of the arm.
        changes: settings of the controller that differ from the arm's.

    Example:
        >>> arm_settings("adamw-clip", {})["clip"], arm_settings("adamw-clip", {})["controller"]
        (1.0, None)
    """
    arm = ARMS[name]
    settings = dataclasses.asdict(dataclasses.replace(arm, controller=_controller(arm, changes)))
    del settings["title"]
    shared = {"base_rates": BASE_RATES, "weight_decay": _WEIGHT_DECAY, "momentum": _MOMENTUM}
    return settings | shared


def _controller(arm: Arm, changes: Mapping[str, Any]) -> ARSConfig | None:
    return None if arm.controller is None else dataclasses.replace(arm.controller, **changes)


class Step:
    """The update of one arm.

    Args:
        name: of the arm.
        model: to train.
        rate: learning rate, as a multiple of the best.
        changes: settings of the controller that differ from the arm's.
    """

    def __init__(
        self, name: str, model: nn.Module, rate: float, changes: Mapping[str, Any]
    ) -> None:
        self.arm = ARMS[name]
        self._parameters = list(model.parameters())
        config = _controller(self.arm, changes)
        scale = rate * self.arm.factor
        if self.arm.family == "adamw" and config is not None:
            bases: list[Any] = [
                ARSAdamW(
                    self._parameters,
                    lr=scale * BASE_RATES["adamw"],
                    betas=self.arm.betas,
                    weight_decay=_WEIGHT_DECAY,
                    ars=config,
                )
            ]
        else:
            bases = _FAMILIES[self.arm.family](model, scale, self.arm.betas)
            if config is not None:
                bases = [ARSOptimizer(base, config) for base in bases]
        self.watches = config is not None
        self.optimizers = bases
        self._rates = [
            [group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers
        ]

    def __call__(self, loss: Tensor, factor: float) -> dict[str, float]:
        """Differentiate and update.

        Args:
            loss: of the batch, with its graph.
            factor: of the learning rate in this step.

        Returns:
            The gate and the resonance guard in this step, 1 without a controller.
        """
        for optimizer, rates in zip(self.optimizers, self._rates, strict=True):
            optimizer.zero_grad(set_to_none=True)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        loss.backward()
        if self.arm.clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, self.arm.clip)
        for optimizer in self.optimizers:
            if self.watches:
                optimizer.step(loss=loss.detach())
            else:
                optimizer.step()
        if not self.watches:
            return {"phi": 1.0, "psi": 1.0}
        shown = self.optimizers[0].diagnostics
        return {name: float(shown[name]) for name in ("phi", "psi")}


def _adamw(
    model: nn.Module, scale: float, betas: tuple[float, float]
) -> list[torch.optim.Optimizer]:
    return [_adamw_of(model.parameters(), scale, betas)]


def _adamw_of(parameters: Any, scale: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    rate = scale * BASE_RATES["adamw"]
    return torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=_WEIGHT_DECAY)


def _sgd(model: nn.Module, scale: float, betas: tuple[float, float]) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=scale * BASE_RATES["sgd"], momentum=_MOMENTUM)]


def _muon(
    model: nn.Module, scale: float, betas: tuple[float, float]
) -> list[torch.optim.Optimizer]:
    # Muon is meant for the matrices between the embedding and the head.
    inside = [p for name, p in model.named_parameters() if name.startswith("blocks.")]
    others = [p for name, p in model.named_parameters() if not name.startswith("blocks.")]
    rate = scale * BASE_RATES["muon"]
    return [
        torch.optim.Muon(inside, lr=rate, weight_decay=_WEIGHT_DECAY),
        _adamw_of(others, scale, betas),
    ]


_Family = Callable[[nn.Module, float, tuple[float, float]], list[torch.optim.Optimizer]]
_FAMILIES: dict[str, _Family] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "muon": _muon,
}
