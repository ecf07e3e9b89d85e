"""The optimizers that are compared."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ars import ARSAdamW, ARSConfig, ARSOptimizer
from stress.peer_optimizers import OPTIMIZERS, RULES

__all__ = ["ARMS", "BASE_RATES", "PEER_ARMS", "Arm", "Step", "arm_named", "arm_settings"]

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
        fused_clip: whether `ARSAdamW` clips, by its ``max_grad_norm``.
        peer: a name of `RULES` or `OPTIMIZERS` of `stress.peer_optimizers`; empty for none.
        settings: of the peer, where they differ from its own.
    """

    title: str
    family: str = "adamw"
    controller: ARSConfig | None = None
    clip: float | None = None
    factor: float = 1.0
    betas: tuple[float, float] = _BETAS
    fused_clip: bool = False
    peer: str = ""
    settings: tuple[tuple[str, float], ...] = ()


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

# The arms of the comparison with peers: lengths in steps are shortened to runs of 200.
PEER_ARMS = {
    "low-beta2": Arm("AdamW, low beta2", betas=(_BETAS[0], 0.8)),
    "zclip": Arm("ZClip", peer="zclip"),
    "adagc": Arm("AdaGC", peer="adagc"),
    "spam": Arm("SPAM", peer="spam"),
    "stableadamw": Arm("StableAdamW", peer="stableadamw"),
    "skip": Arm("skipped steps", peer="skip", settings=(("window", 50),)),
    "default-max-norm": Arm(
        "default, max_grad_norm", controller=ARSConfig(), clip=1.0, fused_clip=True
    ),
    "default-400": Arm("default, 400 steps", controller=ARSConfig(first_release=400)),
}
_OF_ARMS = ("clip", "beta2")  # changes of an arm itself, not of its controller or peer
_OF_OPTIMIZERS = ("params", "lr", "betas", "eps", "weight_decay")
_LATER = ("fused_clip", "peer", "settings")  # fields that records of earlier arms do not have


def arm_named(name: str, changes: Mapping[str, Any] | None = None) -> Arm:
    """An arm of `ARMS` or `PEER_ARMS`, with some settings changed.

    Args:
        name: of the arm.
        changes: ``clip`` or ``beta2`` of the arm, or settings of its controller or peer.

    Raises:
        ValueError: the arm does not have a setting.

    Example:
        >>> arm_named("zclip", {"threshold": 3.0}).settings
        (('threshold', 3.0),)
        >>> arm_named("low-beta2", {"beta2": 0.5}).betas
        (0.9, 0.5)
    """
    arm = (ARMS | PEER_ARMS)[name]
    inner = dict(changes or {})
    own = {key: inner.pop(key) for key in _OF_ARMS if key in inner}
    if "clip" in own:
        arm = dataclasses.replace(arm, clip=own["clip"])
    if "beta2" in own:
        arm = dataclasses.replace(arm, betas=(arm.betas[0], own["beta2"]))
    if not inner:
        return arm
    if arm.peer:
        return dataclasses.replace(arm, settings=tuple((dict(arm.settings) | inner).items()))
    if arm.controller is None:
        raise ValueError(f"{name} has neither controller nor peer: it takes no {', '.join(inner)}")
    return dataclasses.replace(arm, controller=dataclasses.replace(arm.controller, **inner))


def arm_settings(name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of an arm's update: its own, the controller's in full, and what all share.

    Args:
        name: of the arm.
        changes: settings that differ from the arm's, see `arm_named`.

    Example:
        >>> arm_settings("adamw-clip", {})["clip"], arm_settings("adamw-clip", {})["controller"]
        (1.0, None)
        >>> arm_settings("skip", {"sigmas": 3.0})["settings"]
        {'sigmas': 3.0, 'window': 50}
    """
    arm = arm_named(name, changes)
    settings = dataclasses.asdict(arm)
    del settings["title"]
    for field in _LATER:
        if not settings[field]:
            del settings[field]
    if arm.peer:
        settings["settings"] = _peer_settings(arm)
    shared = {"base_rates": BASE_RATES, "weight_decay": _WEIGHT_DECAY, "momentum": _MOMENTUM}
    return settings | shared


def _peer_settings(arm: Arm) -> dict[str, float]:
    """All settings of a peer's own, those that it has by itself among them."""
    known = inspect.signature((RULES | OPTIMIZERS)[arm.peer]).parameters
    own = {name: p.default for name, p in known.items() if name not in _OF_OPTIMIZERS}
    return own | dict(arm.settings)


class Step:
    """The update of one arm.

    Args:
        name: of the arm.
        model: to train.
        rate: learning rate, as a multiple of the best.
        changes: settings that differ from the arm's, see `arm_named`.
        eps: of AdamW; ``None`` leaves its own.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        rate: float,
        changes: Mapping[str, Any],
        eps: float | None = None,
    ) -> None:
        self.arm = arm_named(name, changes)
        self._parameters = list(model.parameters())
        config = self.arm.controller
        scale = rate * self.arm.factor
        peer = dict(self.arm.settings)
        self._rule = RULES[self.arm.peer](**peer) if self.arm.peer in RULES else None
        self._clip = None if self.arm.fused_clip else self.arm.clip
        if self.arm.peer in OPTIMIZERS:
            settings = {
                "lr": scale * BASE_RATES["adamw"], "betas": self.arm.betas,
                "weight_decay": _WEIGHT_DECAY,
            }  # fmt: skip
            bases: list[Any] = [OPTIMIZERS[self.arm.peer](self._parameters, **settings, **peer)]
        elif self.arm.family == "adamw" and config is not None:
            bases = [
                ARSAdamW(
                    self._parameters,
                    lr=scale * BASE_RATES["adamw"],
                    betas=self.arm.betas,
                    weight_decay=_WEIGHT_DECAY,
                    ars=config,
                    max_grad_norm=self.arm.clip if self.arm.fused_clip else None,
                )
            ]
        else:
            bases = _FAMILIES[self.arm.family](model, scale, self.arm.betas)
            if config is not None:
                bases = [ARSOptimizer(base, config) for base in bases]
        self.watches = config is not None
        self.optimizers = bases
        if eps is not None:
            for group in (group for base in bases for group in base.param_groups):
                group["eps"] = eps
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
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip)
        if self._rule is not None:
            gradients = [weight.grad for weight in self._parameters if weight.grad is not None]
            if not self._rule(gradients, loss.item()):
                return {"phi": 1.0, "psi": 1.0}
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
