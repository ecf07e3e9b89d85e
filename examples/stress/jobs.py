"""What one run is, how large it is, and where its record lies."""

from dataclasses import dataclass
from typing import Any

from ars.models import GPTConfig

__all__ = ["SIZES", "Job", "Size"]


@dataclass(frozen=True)
class Size:
    """Model and length of a run.

    Args:
        layers: of the GPT.
        width: of its residual stream; heads have 32 channels.
        sequence_len: bytes a sequence.
        batch_size: sequences a step.
        steps: updates; a stress begins half-way.
        device: where it runs.
    """

    layers: int
    width: int
    sequence_len: int
    batch_size: int
    steps: int
    device: str = "cpu"

    def model(self) -> GPTConfig:
        """The model's settings."""
        return GPTConfig(
            vocab_size=256,
            sequence_len=self.sequence_len,
            n_layer=self.layers,
            n_head=self.width // 32,
            n_embd=self.width,
        )


SIZES = {
    "tiny": Size(1, 32, 32, 4, 80),  # 29 thousand parameters
    "small": Size(2, 64, 64, 8, 200),  # 131 thousand
    "medium": Size(3, 128, 128, 8, 400),  # 655 thousand
    "large": Size(3, 256, 128, 16, 600),  # 2.5 million
    "gpu": Size(8, 512, 256, 32, 2000, "cuda"),  # 25 million
}


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        scenario: a name of `scenarios.SCENARIOS`.
        arm: a name of `arms.ARMS`.
        rate: learning rate, as a multiple of the one that is best for the arm's optimizer.
        seed: of weights, batches and samples.
        size: of the model and the run.
        changes: settings of the controller that differ from the arm's.
    """

    scenario: str
    arm: str
    rate: float
    seed: int
    size: Size
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def file(self) -> str:
        """Where its record lies in the folder of the runs."""
        changed = "".join(f"-{name}={_plain(value)}" for name, value in self.changes)
        return f"{self.scenario}/{self.arm}{changed}-x{self.rate:g}-{self.seed}.json"


def _plain(value: Any) -> str:
    return "+".join(value) if isinstance(value, tuple) else str(value)
