"""Checks of what users pass, and the mode that a model is measured in.

Messages name the offending thing and the remedy.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "IGNORE_INDEX",
    "check_can_differentiate",
    "check_cost",
    "check_draws",
    "check_generator",
    "check_logits",
    "check_positive_int",
    "check_targets",
    "check_trainable",
    "checked_batch",
    "checked_batches",
    "checked_choice",
    "checked_module",
    "evaluation_mode",
    "trainable",
]

# torch.nn.functional.cross_entropy's default: a target with this value masks its position.
IGNORE_INDEX = -100
# Backward passes a sample may take; at a millisecond each this is four seconds.
MAX_BACKWARDS = 4096


# Names, as importing the class of what torch.compile returns would import Dynamo.
_WRAPPERS = {"DataParallel", "DistributedDataParallel", "OptimizedModule"}


def checked_module(model: object, what: str = "model") -> nn.Module:
    """Return the module that names the parameters: ``model``, or what a wrapper of torch's holds.

    ``torch.compile``, DataParallel and DistributedDataParallel put a prefix before every name. What
    is measured and kept goes by the names without, so that it fits the model with and without them.

    Raises:
        TypeError: It is not a module.
    """
    if isinstance(model, nn.Module):
        while type(model).__name__ in _WRAPPERS:
            inside = getattr(model, "_orig_mod", None) or model.module
            assert isinstance(inside, nn.Module)
            model = inside
        return model
    if isinstance(model, type):
        raise TypeError(f"{what} must be a torch.nn.Module, got the class {model.__name__}")
    raise TypeError(
        f"{what} must be a torch.nn.Module, got {type(model).__name__}; pass the module itself, "
        "neither its parameters nor its state dict, and a function in a module that calls it"
    )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters with ``requires_grad``, each once, under its first name.

    Args:
        model: Any module.

    Returns:
        At least one parameter by name, in the model's order.

    Raises:
        ValueError: There is none.
        TypeError: One is complex.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check_trainable(parameters)
    for name, p in parameters.items():
        if p.is_complex():
            raise TypeError(f"parameter {name!r} is complex; only real parameters are supported")
    return parameters


def check_trainable(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse parameters that cannot be differentiated by.

    Args:
        parameters: Those with ``requires_grad``, by name.

    Raises:
        ValueError: There is none, or one was made in inference mode.
    """
    if not parameters:
        raise ValueError(
            "the model has no parameter with requires_grad=True; call requires_grad_() on those "
            "that are to be measured"
        )
    for name, p in parameters.items():
        if p.is_inference():
            raise ValueError(
                f"parameter {name!r} was made inside torch.inference_mode() and can never be "
                "differentiated; make the model outside"
            )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode, and every module back as it was afterwards.

    Recurrent layers stay in training mode with their dropout at 0, which computes the same: cuDNN
    differentiates them in no other mode. Hugging Face's models keep no caches meanwhile, which
    they would write in place.
    """
    training = {module: module.training for module in model.modules()}
    dropout = {m: m.dropout for m in model.modules() if isinstance(m, nn.RNNBase)}
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    caching = [c for c in configs.values() if getattr(c, "use_cache", None) is True]
    model.eval()
    try:
        for config in caching:
            config.use_cache = False
        for recurrent in dropout:
            recurrent.train()
            recurrent.dropout = 0.0
        yield
    finally:
        for config in caching:
            config.use_cache = True
        for recurrent, probability in dropout.items():
            recurrent.dropout = probability
        for module, flag in training.items():
            module.training = flag


def checked_choice(what: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """Return ``value`` if it is one of ``choices``.

    Args:
        what: Its name, for messages.
        value: The value.
        choices: What it may be.

    Returns:
        ``value``.

    Raises:
        ValueError: It is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"unknown {what} {value!r}; choose one of {list(choices)}")
    return value


def check_positive_int(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is an integer >= 1."""  # noqa: DOC501
    if callable(value):
        raise ValueError(
            f"{name} must be a positive integer, got {getattr(value, '__name__', value)}; pass a "
            "loss by its name, loss_fn=, and only if it is not the cross-entropy of the logits"
        )
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_generator(generator: object) -> None:
    """Raise TypeError unless ``generator`` is a torch.Generator or None."""  # noqa: DOC501
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}; "
            "for a seed pass torch.Generator().manual_seed(seed)"
        )


def check_draws(draws: int, estimator: str) -> None:
    """Raise ValueError unless the estimator can be averaged over as many draws."""  # noqa: DOC501
    check_positive_int("draws", draws)
    if draws > 1 and estimator not in {"sketch", "mc"}:
        raise ValueError(f"estimator={estimator!r} draws nothing; leave draws=1")


def check_can_differentiate(what: str) -> None:
    """Raise RuntimeError in inference mode, whose tensors are never differentiated or changed."""  # noqa: DOC501
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{what} is not possible inside torch.inference_mode(): what is computed there can be "
            "neither differentiated nor changed; do it outside (torch.no_grad() does no harm)"
        )


def checked_batches(batches: Any) -> Iterable[Any]:
    """Return ``batches``, or raise TypeError if that is no iterable of batches."""  # noqa: DOC501
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise TypeError(
            "batches must be an iterable of pairs (inputs, targets), or of other batches, got "
            f"{type(batches).__name__}; pass a DataLoader, or a single batch in a list, as "
            "[(inputs, targets)]"
        )
    return batches


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
        other = "" if segments else "; or pass a mapping with 'labels', or any batch with a loss_fn"
        raise TypeError(
            f"batch {index} must be {what} of tensors, got {type(batch).__name__}; pass a single "
            f"batch as [({', '.join(names)})], and segments with unit='segment' only{other}"
        )
    inputs, targets = batch[:2]
    if differentiated and inputs.is_inference():
        raise ValueError(
            f"inputs of batch {index} were made inside torch.inference_mode(), and nothing that "
            "depends on them can be differentiated; clone them outside"
        )
    if targets.dtype != torch.int64:
        raise TypeError(
            f"targets of batch {index} must be int64, the numbers of classes, got {targets.dtype}; "
            "pass another loss than the cross-entropy as loss_fn, with estimator='empirical'"
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
            "the model must return logits as one tensor, or an object with them in .logits, got "
            f"{type(logits).__name__}; wrap it in a module that returns the logits alone"
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
