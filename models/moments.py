"""How a tensor, and the moments that Adam keeps of its gradient, grow into a larger one."""

import torch
from torch import Tensor

__all__ = ["MOMENTS", "embed", "grow_moment"]

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
