"""Checks of what users pass. Messages name the offending thing and the remedy."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "check_can_differentiate",
    "check_draws",
    "check_generator",
    "check_positive_int",
    "checked_batches",
    "checked_choice",
    "checked_module",
]


def checked_module(model: object, what: str = "model") -> nn.Module:
    """Return ``model``, or raise TypeError if it is not a module."""  # noqa: DOC501
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, type):
        raise TypeError(f"{what} must be a torch.nn.Module, got the class {model.__name__}")
    raise TypeError(
        f"{what} must be a torch.nn.Module, got {type(model).__name__}; pass the module itself, "
        "neither its parameters nor its state dict, and a function in a module that calls it"
    )


def check_can_differentiate(what: str) -> None:
    """Raise RuntimeError in inference mode, whose tensors are never differentiated or changed."""  # noqa: DOC501
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{what} is not possible inside torch.inference_mode(): what is computed there can be "
            "neither differentiated nor changed; do it outside (torch.no_grad() does no harm)"
        )


def checked_batches(batches: Any) -> Iterable[Any]:
    """Return ``batches``, or raise TypeError if that is no iterable of batches."""  # noqa: DOC501
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise TypeError(
            "batches must be an iterable of pairs (inputs, targets), got "
            f"{type(batches).__name__}; pass a DataLoader, or a single batch as [(inputs, targets)]"
        )
    return batches


def check_generator(generator: object) -> None:
    """Raise TypeError unless ``generator`` is a torch.Generator or None."""  # noqa: DOC501
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}; "
            "for a seed pass torch.Generator().manual_seed(seed)"
        )


def check_positive_int(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is an integer >= 1."""  # noqa: DOC501
    if callable(value):
        raise ValueError(
            f"{name} must be a positive integer, got {getattr(value, '__name__', value)}; a loss "
            "function is not needed, as the targets of a Fisher are the model's own classes"
        )
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_draws(draws: int, estimator: str) -> None:
    """Raise ValueError unless the estimator can be averaged over as many draws."""  # noqa: DOC501
    check_positive_int("draws", draws)
    if draws > 1 and estimator not in {"sketch", "mc"}:
        raise ValueError(f"estimator={estimator!r} draws nothing; leave draws=1")


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
