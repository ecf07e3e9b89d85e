"""The optimizer of an arm: one object with one step, whatever it is made of."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ars import ARSAdamW, ARSConfig, ARSOptimizer
from ars.models import GPT
from trainer.arms import Arm
from trainer.muon import Muon
from trainer.series_plan import Settings
from trainer.settings import SeriesConfig

__all__ = ["Optimizer", "build_optimizer"]


class _Together:
    """Several optimizers that take their step together: a `GradScaler` skips all of them or none.

    Args:
        parts: the optimizers.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of all parts."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self, *, loss: Tensor) -> None:
        """Step every part; those with a controller are told the loss."""
        for part in self.parts:
            part.step(**({"loss": loss} if isinstance(part, (ARSAdamW, ARSOptimizer)) else {}))


class Optimizer:
    """One or two optimizers that share a loss, a clipping norm and a schedule.

    Args:
        parts: the optimizers, AdamW alone or first; the first one's diagnostics are shown.
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
        # Alone, AdamW is skipped on the device, without waiting for it.
        self._whole: Any = self.parts[0] if len(self.parts) == 1 else _Together(self.parts)

    @property
    def rate(self) -> float:
        """AdamW's learning rate."""
        return float(self.parts[0].param_groups[0]["lr"])

    def set_rate(self, share: float) -> None:
        """Set every learning rate to a share of its peak."""
        for part, rates in zip(self.parts, self._rates, strict=True):
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate * share

    def step(self, loss: Tensor, scaler: "torch.amp.GradScaler | None" = None) -> None:
        """Clip and update; a gradient that is not finite stops every part under a scaler.

        Args:
            loss: of the task, detached, 0-d: what the controllers watch.
            scaler: that scaled the loss before it was differentiated.
        """
        if scaler is not None:
            scaler.unscale_(self._whole)
        if self._clip:
            weights = [p for group in self._whole.param_groups for p in group["params"]]
            self._norm = nn.utils.clip_grad_norm_(weights, self._clip)
        if scaler is None:
            self._whole.step(loss=loss)
        else:
            scaler.step(self._whole, loss=loss)

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
    matrices: Any = Muon(inside, lr=settings.muon_lr, weight_decay=settings.weight_decay)
    if controller is not None:
        matrices = ARSOptimizer(matrices, controller)
    return Optimizer([adamw, matrices], shown, config.max_grad_norm)
