"""The optimizer of an arm: one object with one step, whatever it is made of."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ars import ARSAdamW, ARSConfig, ARSOptimizer
from ars.models import GPT
from trainer.arms import Arm
from trainer.config import SeriesConfig
from trainer.rules import Settings

__all__ = ["Optimizer", "build_optimizer"]


class Optimizer:
    """One or two optimizers that share a loss, a clipping norm and a schedule.

    Args:
        parts: the optimizers; the first one's diagnostics are shown.
        shown: the diagnostics of the first one that say something.
        clip: largest norm of all gradients together, for parts that do not clip themselves; 0 for
            none.
    """

    def __init__(self, parts: Iterable[Any], shown: Sequence[str], clip: float = 0.0) -> None:
        self.parts: list[Any] = list(parts)
        self._shown = shown
        self._clip = clip
        self._rates = [[group["lr"] for group in part.param_groups] for part in self.parts]
        self._norm: Tensor | None = None

    @property
    def adamw(self) -> ARSAdamW:
        """The only part.

        Raises:
            TypeError: there is another, or it is not AdamW.
        """
        (only,) = self.parts
        if not isinstance(only, ARSAdamW):
            raise TypeError(f"the optimizer is {type(only).__name__}, not ARSAdamW")
        return only

    def set_rate(self, share: float) -> None:
        """Set every learning rate to a share of its peak."""
        for part, rates in zip(self.parts, self._rates, strict=True):
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate * share

    def step(self, loss: Tensor, scaler: "torch.amp.GradScaler | None" = None) -> None:
        """Clip and update; gradients that are not finite move nothing under a scaler.

        Args:
            loss: of the task, detached, 0-d: what the controllers watch.
            scaler: that scaled the loss before it was differentiated.
        """
        if scaler is not None:
            for part in self.parts:
                scaler.unscale_(part)
        if self._clip:
            weights = [p for part in self.parts for g in part.param_groups for p in g["params"]]
            self._norm = nn.utils.clip_grad_norm_(weights, self._clip)
        for part in self.parts:
            words = {"loss": loss} if isinstance(part, (ARSAdamW, ARSOptimizer)) else {}
            if scaler is None:
                part.step(**words)
            else:
                scaler.step(part, **words)

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def shown(self) -> dict[str, Tensor]:
        """Phi, psi, norm of the gradient and penalty of the last step, 0-d, those there are."""
        found = self.parts[0].diagnostics
        shown = {key: found[key] for key in self._shown}
        if self._norm is not None:
            shown["grad_norm"] = self._norm
        return shown

    def state_dict(self) -> list[dict[str, Any]]:
        """Of every part."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Load what `state_dict` returned."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def build_optimizer(
    model: GPT, arm: Arm, settings: Settings, config: SeriesConfig, penalty: Any = None
) -> Optimizer:
    """The optimizer of an arm over all parameters of a model.

    Args:
        model: every one of whose parameters is a matrix, so all are decayed.
        arm: how it is trained.
        settings: learning rates and weight decay.
        config: of the series.
        penalty: that AdamW applies in its step, or ``None``.
    """
    controllers = {"ars": ARSConfig(), "paper": ARSConfig.paper(), None: None}
    controller = controllers[arm.controller]
    clip = config.max_grad_norm or None
    muon = arm.has("muon")
    others = [p for n, p in model.named_parameters() if not (muon and n.startswith("blocks."))]
    adamw = ARSAdamW(
        others,
        lr=settings.muon_adamw_lr if muon else settings.lr,
        betas=config.betas,
        weight_decay=settings.weight_decay,
        ars=controller,
        penalty=penalty,
        max_grad_norm=None if muon else clip,
    )
    shown = [] if controller is None else ["phi", "psi"]
    if clip is not None and not muon:
        shown.append("grad_norm")
    if not muon:
        return Optimizer([adamw], shown if penalty is None else [*shown, "penalty"])
    # Muon is meant for the matrices between the embedding and the head. The two parts are clipped
    # by their common norm, and their controllers see the same loss and so agree.
    inside = [p for name, p in model.named_parameters() if name.startswith("blocks.")]
    matrices: Any = torch.optim.Muon(
        inside, lr=settings.muon_lr, weight_decay=settings.weight_decay
    )
    if controller is not None:
        matrices = ARSOptimizer(matrices, controller)
    return Optimizer([adamw, matrices], shown, config.max_grad_norm)
