"""Arithmetic of scalars that are numbers on a CPU and 0-d tensors elsewhere.

Reading a number from a CPU's memory waits for nothing, and a Python operation costs a tenth of one
on a 0-d tensor; on any other device reading it would stop the host. The definitions are written
once, for both.
"""

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "Scalar",
    "at_least",
    "at_most",
    "choose",
    "copysign",
    "exp",
    "is_finite",
    "is_host",
    "read",
]

Scalar: TypeAlias = float | Tensor


def is_host(tensor: Tensor) -> bool:
    """Whether the tensor lies where reading it waits for nothing."""
    return tensor.device.type == "cpu"


def read(value: Tensor) -> Any:
    """Return a 0-d tensor as a number if it lies on a CPU, else as it is."""
    return value.item() if is_host(value) else value


def at_least(x: Any, minimum: float) -> Any:
    """Return the larger one; NaN stays NaN."""
    return x.clamp(min=minimum) if isinstance(x, Tensor) else max(x, minimum)


def at_most(x: Any, maximum: float) -> Any:
    """Return the smaller one; NaN stays NaN."""
    return x.clamp(max=maximum) if isinstance(x, Tensor) else min(x, maximum)


def choose(condition: Any, x: Any, y: Any) -> Any:
    """Return x where the condition holds, else y."""
    if isinstance(condition, Tensor):
        return torch.where(condition, x, y)
    return x if condition else y


def exp(x: Any) -> Any:
    """Return e to the power of a number that is not large."""
    return x.exp() if isinstance(x, Tensor) else math.exp(x)


def copysign(x: Any, sign: Any) -> Any:
    """Return the magnitude of x with the sign of the other."""
    return torch.copysign(x, sign) if isinstance(x, Tensor) else math.copysign(x, sign)


def is_finite(x: Any) -> Any:
    """Whether it is neither infinite nor NaN."""
    return torch.isfinite(x) if isinstance(x, Tensor) else math.isfinite(x)
