"""Models of a finished series, brought back for evaluation."""

from pathlib import Path

from analysis.bundle import Task
from analysis.core import CoreResult, byte_tokens, evaluate
from ars.models import GPT, miniseries_config
from trainer.checkpoint import load_checkpoint
from trainer.errors import UsageError

__all__ = ["evaluate_checkpoint", "load_model"]

_BYTES = 256
_BOS = ord("\n")  # a byte model has no token of its own for the beginning of a text
_BLOCK = "blocks."


def load_model(path: Path, sequence_len: int) -> GPT:
    """The model in a checkpoint of ``examples/miniseries.py``.

    Args:
        path: such as ``checkpoints/d4-inherited.pt``.
        sequence_len: longest input that will be read; the training's own is the longest sensible.

    Raises:
        UsageError: the file is damaged or holds no byte-level model of the miniseries.
    """
    content = load_checkpoint(path, remedy="name a checkpoint of a finished run")
    weights = content.get("model")
    if not isinstance(weights, dict) or "wte.weight" not in weights:
        raise UsageError(f"{path} holds no model: name a file of a run's checkpoints folder")
    vocab_size = weights["wte.weight"].shape[0]
    if vocab_size != _BYTES:
        raise UsageError(
            f"{path} has {vocab_size} tokens, not bytes: call analysis.core.evaluate with its "
            "tokenizer"
        )
    depth = len({name.split(".")[1] for name in weights if name.startswith(_BLOCK)})
    model = GPT(miniseries_config(max(1, depth), sequence_len=sequence_len))
    try:
        model.load_state_dict(weights)
    except RuntimeError:
        raise UsageError(f"{path} holds another kind of model than the miniseries'") from None
    return model


def evaluate_checkpoint(
    path: Path, tasks: list[Task], *, sequence_len: int, max_per_task: int | None
) -> CoreResult:
    """Evaluate a checkpoint on the tasks of a bundle, on the CPU.

    Args:
        path: see `load_model`.
        tasks: of the bundle.
        sequence_len: longest input.
        max_per_task: items of each task at most; ``None`` for all.

    Raises:
        UsageError: see `load_model`, or ``max_per_task`` is too small for a task.
    """
    try:
        return evaluate(
            load_model(path, sequence_len),
            tasks,
            byte_tokens,
            bos=_BOS,
            max_tokens=sequence_len,
            max_per_task=max_per_task,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
