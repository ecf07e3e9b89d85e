"""How a tensor, and what an optimizer keeps of it, grow into larger ones."""

import torch
from torch import Tensor

from ars.reference import join_master, split_master

__all__ = ["MOMENTS", "embed", "grow_master", "grow_moment"]

# Power of 1/c by which each optimizer state of a parameter's shape transforms, after g' = g / c.
MOMENTS = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}


def embed(old: Tensor, rest: Tensor) -> Tensor:
    """Return a copy of ``rest`` (R', C') with its leading block replaced by ``old`` (R, C)."""
    grown = rest.clone()
    grown[: old.size(0), : old.size(1)] = old
    return grown


def grow_moment(key: str, value: Tensor, scale: float, shape: torch.Size) -> Tensor:
    """Map a moment of a weight that is multiplied by c.

    On the old block exp_avg / c and exp_avg_sq / c^2. On new coordinates exp_avg is 0 and
    exp_avg_sq the largest of the mapped means of the tensor and of the coordinate's old row or
    column: rows of a frequent token have far larger gradients than the mean of the table.

    Args:
        key: a name of `MOMENTS`.
        value: (R, C).
        scale: c.
        shape: (R', C').

    Returns:
        (R', C'), in the dtype and on the device of ``value``.

    Example:
        >>> value = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
        >>> grow_moment("exp_avg_sq", value, 2.0, torch.Size((3, 3))).tolist()
        [[1.0, 0.0, 0.5], [0.0, 0.0, 0.25], [0.5, 0.25, 0.25]]
    """
    old = value / scale ** MOMENTS[key]
    if MOMENTS[key] == 1:
        return embed(old, old.new_zeros(shape))
    wide = old.double()  # a sum of many small squares loses them in bf16
    expected = wide.mean().expand(shape).clone()
    rows, columns = old.shape
    expected[:rows] = expected[:rows].maximum(wide.mean(1, keepdim=True))
    expected[:, :columns] = expected[:, :columns].maximum(wide.mean(0, keepdim=True))
    return embed(old, expected.to(old.dtype))


def grow_master(
    old: Tensor, remainder: Tensor, scale: float, rest: Tensor
) -> tuple[Tensor, Tensor]:
    """Multiply a master weight by c in float32, and split it again.

    Args:
        old: (R, C) bfloat16, the upper half of the master weight.
        remainder: (R, C) int16, the lower half.
        scale: c.
        rest: (R', C') bfloat16, whose new coordinates are kept: they have no lower half.

    Returns:
        (R', C') bfloat16 and (R', C') int16.

    Example:
        >>> old, remainder = torch.ones(1, 1, dtype=torch.bfloat16), torch.full((1, 1), 3).short()
        >>> rest = torch.zeros(1, 2, dtype=torch.bfloat16)
        >>> grow_master(old, remainder, 2.0, rest)
        (tensor([[2., 0.]], dtype=torch.bfloat16), tensor([[3, 0]], dtype=torch.int16))
    """
    upper, lower = split_master(scale * join_master(old, remainder))
    return embed(upper, rest), embed(lower, lower.new_zeros(rest.shape))
