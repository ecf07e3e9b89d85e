"""What is run: the settings all runs share, and what one run is."""

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Run", "Settings"]


@dataclass(frozen=True)
class Settings:
    """Everything that holds for all runs of one output folder.

    Args:
        epochs: passes over the training images for each permutation.
        batch_size: images a step.
        width: units of each of the two hidden layers.
        lr: Adam's learning rate, constant; the optimizer starts afresh with each permutation.
        validation: train on three quarters of the training images and measure on the other quarter,
            never on the test images: for choosing strengths.
    """

    epochs: int = 20
    batch_size: int = 64
    width: int = 256
    lr: float = 1e-3
    validation: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Run:
    """One sequence of permutations, learned by one method.

    Args:
        method: a name in ``continual.methods.METHODS``.
        strength: of its penalty; 0 where there is none.
        tasks: how many permutations; the first is the identity.
        seed: of the other permutations, the weights and the order of the images.
    """

    method: str
    strength: float
    tasks: int
    seed: int

    @property
    def title(self) -> str:
        """What the progress bar calls it."""
        strength = f" {self.strength:g}" if self.strength else ""
        return f"{self.method}{strength}, {self.tasks} tasks, seed {self.seed}"
