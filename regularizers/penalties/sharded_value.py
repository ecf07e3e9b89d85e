"""A penalty's value of which every process knows a part, with the gradient of its own parameters.

Autograd cannot differentiate a sum over processes that each holds a part of. What a part of the
parameters gets is known in closed form, and no process needs another's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ars.sharded import is_sharded, sum_of_parts, with_part

__all__ = ["total_of", "with_gradients"]


def with_gradients(value: Tensor, params: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """Return a number that is differentiable in parameters once.

    Args:
        value: The number, 0-d.
        params: The parameters, DTensors.
        parts: The gradients of the parts that are here.
    """
    result: Tensor = _Known.apply(value, parts, *params)
    return result


def total_of(values: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """Add up values of parts, over parameters and processes; differentiable as they are.

    Args:
        values: 0-d, one for each parameter.
        params: The parameters, DTensors or not.

    Returns:
        The sum, 0-d, on the first value's device.
    """
    if not any(map(is_sharded, params)):
        return torch.stack([value.to(values[0].device) for value in values]).sum()
    total = sum_of_parts([value.detach() for value in values], params)
    result: Tensor = _Total.apply(total, *values)
    return result


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, *values: Tensor) -> Tensor:
        ctx.values = [(value.device, value.dtype) for value in values]
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(outputs[0].to(*kind) for kind in ctx.values))


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, parts: Sequence[Tensor], *params: Tensor) -> Tensor:
        ctx.parts, ctx.params = parts, params
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            with_part((part * outputs[0].to(part.device)).to(param.dtype), param)
            for part, param in zip(ctx.parts, ctx.params, strict=True)
        ]
        return (None, None, *gradients)
