"""Every setting that decides the numbers of a run, in one place."""

import dataclasses
from dataclasses import dataclass
from typing import Any

__all__ = ["ARS_CHOICES", "DEFAULT_EWC_STRENGTH", "DEFAULT_STEPS", "SeriesConfig", "default_steps"]

ARS_CHOICES = ("default", "paper", "off")

# Trunk steps of the default series, to fit six minutes on two CPU cores. At equal FLOPs, batches of
# 4 sequences beat 8 and 16 in both arms (d3 from scratch: 2.43, 2.66 and 3.06 bits per byte).
DEFAULT_STEPS = {2: 600, 3: 320, 4: 320}
_OTHER_STEPS = 320

# The largest strength that costs nothing. Both models read the same kind of text, so there is
# nothing to forget: d2 -> d3 gave, with seeds 7 and 8, 2.3057 and 2.3278 bits per byte without the
# penalty; 2.3060 and 2.3277 with 1e-4; 2.3081 and 2.3284 with 1e-3; 2.3220 and 2.3422 with 1e-2;
# 2.3813 and 2.3874 with 1e-1; 2.3945 and 2.3734 with 1.
DEFAULT_EWC_STRENGTH = 1e-4


@dataclass(frozen=True)
class SeriesConfig:
    """Settings of one series; two runs with equal settings and data give equal numbers.

    Args:
        depths: layers of each model, ascending; each is grown from the one before it.
        steps: trunk steps of the first model and of each inherited one (same length).
        batch_size: sequences a step.
        sequence_len: bytes a sequence.
        lr: constant learning rate of the trunk.
        ewc_strength: weight of the penalty towards the grown parent; 0 trains without it.
        fisher_samples: sequences that the Fisher information is averaged over.
        ars: "default", "paper" or "off".
        seed: of the initial weights, of the batches and of the Fisher sketch.
        device: torch device the models live on.
        warmup_steps: linear warm-up of the models trained from scratch.
        cooldown: steps of the cooled branch as a share of the trunk's steps.
        weight_decay: decoupled, on every matrix.
        betas: of Adam.
        max_grad_norm: the gradient's norm is clipped to it.
        eval_windows: most validation windows of ``sequence_len`` bytes for the reported number.
        curve_windows: most of these used for the points of the validation curve.
    """

    depths: tuple[int, ...]
    steps: tuple[int, ...]
    batch_size: int
    sequence_len: int
    lr: float
    ewc_strength: float
    fisher_samples: int
    ars: str
    seed: int
    device: str
    warmup_steps: int = 20
    cooldown: float = 0.25
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    eval_windows: int = 256
    curve_windows: int = 32

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON has them (lists for tuples)."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }


def default_steps(depths: tuple[int, ...]) -> tuple[int, ...]:
    """Trunk steps of each depth when the user names none.

    Example:
        >>> default_steps((2, 3, 4)), default_steps((4, 5))
        ((600, 320, 320), (320, 320))
    """
    return tuple(DEFAULT_STEPS.get(depth, _OTHER_STEPS) for depth in depths)
