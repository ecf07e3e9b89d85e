"""Every setting that decides the numbers of a run, in one place."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["RULE", "ByRule", "Precision", "SeriesConfig"]

RULE = "rule"
ByRule = Literal["rule"]
Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class SeriesConfig:
    """Settings of one series; two runs with equal settings and data give equal numbers.

    The defaults are the demonstration's, for two CPU cores.

    Args:
        arms: the ways to train that are compared, as `trainer.arms` reads them.
        depths: layers of each model, ascending.
        parents: the depths that larger ones are grown out of, each out of the largest below it;
            ``None`` for all.
        steps: trunk steps of each depth of a chain without overhead, in the order of ``depths``;
            ``None`` to go by ``ratio``.
        ratio: tokens, trunk and cooled branch, per parameter in matrix products.
        batch_size: sequences a step over all processes, or "rule".
        sequence_len: tokens a sequence.
        lr: constant learning rate of the trunk, or "rule".
        muon_lr: the same of Muon, for the matrices of the blocks.
        muon_adamw_lr: the same of the AdamW beside Muon, for the embedding and the head.
        weight_decay: decoupled, on every matrix, or "rule".
        betas: of Adam.
        max_grad_norm: the gradient's norm is clipped to it; 0 does not clip.
        warmup_steps: linear warm-up of models that are not grown.
        cooldown: steps of the cooled branch as a share of the trunk's steps.
        ewc_strength: lambda of ``ewc`` (and of the EWC in ``ewc+subspace``).
        subspace_strength: gamma of ``subspace``.
        distill_strength: weight of ``distill``.
        distill_temperature: of ``distill``.
        fisher_samples: sequences that the Fisher information is averaged over.
        precision: of the forward and backward pass; weights and moments are fp32.
        seed: of the initial weights, of the batches and of the Fisher sketch.
        eval_windows: most validation windows of ``sequence_len`` tokens for the reported number.
        curve_windows: the same for the points of the validation curve.
        curve_points: points of the validation curve of a model.
    """

    arms: tuple[str, ...] = ("scratch+ars", "grown+ewc+ars")
    depths: tuple[int, ...] = (2, 3, 4)
    parents: tuple[int, ...] | None = None
    steps: tuple[int, ...] | None = (450, 240, 240)
    ratio: float = 10.5
    batch_size: int | ByRule = 4
    sequence_len: int = 256
    lr: float | ByRule = 3e-3
    muon_lr: float | ByRule = 0.02
    muon_adamw_lr: float | ByRule = 0.012
    weight_decay: float | ByRule = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    warmup_steps: int = 20
    cooldown: float = 0.25
    # Weak: both models read the same kind of text, so there is nothing to forget, and every
    # strength that was tried from 0.01 on costs (docs/miniseries.md).
    ewc_strength: float = 1e-4
    subspace_strength: float = 1e-4
    distill_strength: float = 0.03
    distill_temperature: float = 2.0
    fisher_samples: int = 64
    precision: Precision = "fp32"
    seed: int = 0
    eval_windows: int = 256
    curve_windows: int = 32
    curve_points: int = 10

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON has them (lists for tuples)."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }
