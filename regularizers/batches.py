"""Checks of the labelled batches that a Fisher is fitted on."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ars.regularizers.checks import check_positive_int
from ars.regularizers.estimators import IGNORE_INDEX

__all__ = ["check_cost", "check_logits", "check_targets", "checked_batch", "take_samples"]

# Backward passes a sample may take; at a millisecond each this is four seconds.
MAX_BACKWARDS = 4096


def checked_batch(
    batch: object, index: int, *, segments: bool, differentiated: bool = True
) -> tuple[Tensor, ...]:
    """Return ``batch`` as (inputs, targets), or (inputs, targets, segments).

    Args:
        batch: Inputs (B, ...) and targets (B,) or (B, T) int64, not empty; and, if asked for,
            segments of the targets' shape and dtype.
        index: Its number, for messages.
        segments: Whether it holds segments.
        differentiated: Whether what is computed of it will be.

    Returns:
        The tensors.

    Raises:
        TypeError: Not a pair or triple of tensors, or targets or segments not int64.
        ValueError: Shapes that do not fit, or no targets at all.
    """
    names = ("inputs", "targets", "segments") if segments else ("inputs", "targets")
    if not (
        isinstance(batch, (tuple, list))
        and len(batch) == len(names)
        and all(isinstance(part, Tensor) for part in batch)
    ):
        what = f"a triple ({', '.join(names)})" if segments else "a pair (inputs, targets)"
        raise TypeError(
            f"batch {index} must be {what} of tensors, got {type(batch).__name__}; pass a single "
            f"batch as [({', '.join(names)})], and segments with unit='segment' only"
        )
    inputs, targets = batch[:2]
    if differentiated and inputs.is_inference():
        raise ValueError(
            f"inputs of batch {index} were made inside torch.inference_mode(), and nothing that "
            "depends on them can be differentiated; clone them outside"
        )
    if targets.dtype != torch.int64:
        raise TypeError(
            f"targets of batch {index} must be int64, the numbers of classes, got {targets.dtype}"
        )
    if targets.ndim not in {1, 2}:
        raise ValueError(
            f"targets of batch {index} must have shape (B,) or (B, T), got {tuple(targets.shape)}"
        )
    if inputs.ndim == 0 or len(inputs) != len(targets):
        raise ValueError(
            f"inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)} of batch {index} "
            "differ in their first dimension, the batch size"
        )
    if targets.numel() == 0:
        raise ValueError(f"batch {index} is empty: targets have shape {tuple(targets.shape)}")
    if not segments:
        return inputs, targets
    numbers = batch[2]
    if numbers.dtype != torch.int64:
        raise TypeError(f"segments of batch {index} must be int64, got {numbers.dtype}")
    if numbers.shape != targets.shape:
        raise ValueError(
            f"segments of batch {index} have shape {tuple(numbers.shape)}, its targets "
            f"{tuple(targets.shape)}; number the document of every position"
        )
    return inputs, targets, numbers


def check_cost(option: str, what: str, first: int, second: int) -> None:
    """Refuse what would take more than 4096 backward passes a sample.

    Args:
        option: The argument that asks for them.
        what: Names of the two factors.
        first: One factor.
        second: The other.

    Raises:
        ValueError: Their product is too large.
    """
    if first * second > MAX_BACKWARDS:
        raise ValueError(
            f"{option} would take {what} = {first} * {second} = {first * second} backward passes "
            f"a sample, more than {MAX_BACKWARDS}; use estimator='sketch' with unit='sequence', "
            "which is unbiased and takes one"
        )


def check_logits(logits: object, targets: Tensor) -> Tensor:
    """Return the model's output, once it has been seen to be logits for ``targets``.

    Args:
        logits: What the model returned for some samples.
        targets: Their targets, (B,) or (B, T).

    Returns:
        The logits, (B, C) or (B, T, C).

    Raises:
        TypeError: Not one floating-point tensor.
        ValueError: Another shape or device than the targets', or no trainable parameter behind it.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model must return logits as one tensor, got {type(logits).__name__}; "
            "wrap it in a module that returns the logits alone"
        )
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} do not fit targets of shape "
            f"{tuple(targets.shape)}; expected (B, C) with (B,), or (B, T, C) with (B, T)"
        )
    if logits.device != targets.device:
        raise ValueError(
            f"logits are on {logits.device}, targets on {targets.device}; "
            "move the batches to the model's device"
        )
    if not logits.requires_grad:
        raise ValueError(
            "the logits do not depend on any trainable parameter; "
            "remove torch.no_grad() or detach() from the model's forward"
        )
    return logits


def check_targets(targets: Tensor, classes: int, index: int) -> None:
    """Refuse targets outside [0, classes), the mask value aside.

    Args:
        targets: int64, (B,) or (B, T).
        classes: C, the last dimension of the logits.
        index: The batch's number, for messages.

    Raises:
        ValueError: A target is out of range.
    """
    wrong = targets[((targets < 0) & (targets != IGNORE_INDEX)) | (targets >= classes)]
    if wrong.numel():
        raise ValueError(
            f"targets of batch {index} contain {int(wrong[0])}, outside [0, {classes}); "
            f"use {IGNORE_INDEX} to mask a position"
        )


def take_samples(
    batches: Iterable[tuple[Tensor, ...]], n_samples: int | None
) -> Iterator[tuple[Tensor, ...]]:
    """Yield batches until they hold ``n_samples``, cutting the last one to fit.

    Args:
        batches: Checked tensors, whose first dimension is the samples.
        n_samples: How many samples to take, >= 1; None for all.

    Raises:
        ValueError: ``n_samples`` is not a positive integer, there are fewer, or none at all. Raised
            where the batches end.
    """
    if n_samples is not None:
        check_positive_int("n_samples", n_samples)
    seen = 0
    for batch in batches:
        if n_samples is not None:
            batch = tuple(part[: n_samples - seen] for part in batch)
        seen += len(batch[0])
        yield batch
        if seen == n_samples:
            return
    if seen == 0:
        raise ValueError("batches is empty: at least one sample is needed")
    if n_samples is not None:
        raise ValueError(
            f"n_samples={n_samples}, but batches held only {seen} samples; "
            f"provide more, or pass n_samples=None to use the {seen}"
        )
