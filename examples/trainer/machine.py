"""What a run is done with: a run may go on with another.

It changes rounding at most, and the device the signs of the Fisher sketch.
"""

from dataclasses import dataclass

__all__ = ["Machine"]


@dataclass(frozen=True)
class Machine:
    """Device, memory and reporting.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        threads: CPU threads; ``None`` leaves torch's own choice.
        device_batch_size: sequences a process differentiates at a time; a step's batch is
            accumulated out of these. ``None`` for all at once.
        compile: whether `torch.compile` compiles the models. The first step, in which it does,
            counts as no time.
        recompute: whether blocks keep only their inputs for the backward pass.
        keep: states of a model in training that are kept.
        checkpoint_seconds: between two of these: what a kill can cost at most.
        peak_flops: of one device, for the MFU; ``None`` for none.
        tensorboard: whether to write event files to ``tensorboard/``.
        wandb: project of Weights & Biases to report to; ``None`` for none.
    """

    device: str = "cpu"
    threads: int | None = None
    device_batch_size: int | None = None
    compile: bool = False
    recompute: bool = False
    keep: int = 2
    checkpoint_seconds: float = 15.0
    peak_flops: float | None = None
    tensorboard: bool = False
    wandb: str | None = None
