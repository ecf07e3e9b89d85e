"""The per-sample squares of a matrix's gradient, eq. (11)."""

import itertools

import torch
from torch import Tensor


def squared_products(g: Tensor, a: Tensor, offsets: Tensor | None = None) -> Tensor:
    r"""Sum of the squared gradients of single samples, :math:`\sum_n (\sum_t g_{nt} a_{nt}^T)^2`.

    (11). The gradient of a matrix W in y = W a is the sum over positions t of g a^T, g being the
    gradient of y; the square is by element and taken before the samples are added.

    Args:
        g: Gradients of the outputs, shape (N, T, p); or, with ``offsets``, (rows, p).
        a: Inputs, shape (N, T, d); or (rows, d).
        offsets: int64, (N + 1,), non-decreasing from 0 to rows: sample n has rows
            ``offsets[n]`` to ``offsets[n + 1]``.

    Returns:
        Shape (p, d), in the dtype of the operands.

    Example:
        >>> import torch
        >>> from ars.reference import squared_products
        >>> g = torch.tensor([[[1.0], [1.0]], [[1.0], [-1.0]]])  # two samples of two positions
        >>> squared_products(g, torch.ones(2, 2, 1))  # (1 + 1)^2 + (1 - 1)^2
        tensor([[4.]])
    """
    if offsets is None:
        return torch.einsum("ntp,ntd->npd", g, a).square().sum(0)
    bounds = offsets.tolist()
    total = g.new_zeros(g.shape[1], a.shape[1])
    for start, end in itertools.pairwise(bounds):
        total += (g[start:end].mT @ a[start:end]).square()
    return total
