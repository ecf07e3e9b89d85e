r"""Which implementation adds up the per-sample squares of a matrix's gradient.

    total += sum_n (sum_t g_nt a_nt^T)^2                                     (eq. 11)

T = 1 is two squared matrices' product. Otherwise no formula is cheaper than the N gradients
themselves, 2 N T p d operations; what differs is where they live:

    small p d          a few gradients at a time in one batched product
    large p d          one gradient at a time in one scratch matrix, squared by ``addcmul_``

Nothing of the size of N gradients is ever held.
"""

import itertools

import torch
from torch import Tensor

__all__ = ["add_squared_products_"]

# Elements of the scratch for several samples. 1 MiB of fp32 stays in a core's cache, where squaring
# and adding cost least.
SCRATCH = 2**18


def add_squared_products_(
    total: Tensor, g: Tensor, a: Tensor, offsets: Tensor | None = None
) -> None:
    r"""Add :math:`\sum_n (\sum_t g_{nt} a_{nt}^T)^2` to ``total`` in place.

    Computed in the dtype of ``total``, whatever the operands'.

    Args:
        total: Shape (p, d), float32 or float64.
        g: Gradients of a matrix product's outputs, floating point, shape (N, T, p); or, with
            ``offsets``, (rows, p).
        a: Its inputs, shape (N, T, d); or (rows, d).
        offsets: int64, (N + 1,), non-decreasing from 0 to rows: sample n has rows
            ``offsets[n]`` to ``offsets[n + 1]``.

    Raises:
        ValueError: The shapes do not fit.

    Example:
        >>> import torch
        >>> from ars.functional import add_squared_products_
        >>> total = torch.zeros(1, 1)
        >>> g = torch.tensor([[[1.0], [1.0]], [[1.0], [-1.0]]])  # two samples of two positions
        >>> add_squared_products_(total, g, torch.ones(2, 2, 1))
        >>> total  # (1 + 1)^2 + (1 - 1)^2
        tensor([[4.]])
    """
    _check(total, g, a, offsets)
    if offsets is not None:
        bounds = offsets.tolist()
        for start, end in itertools.pairwise(bounds):
            add_squared_products_(total, g[None, start:end], a[None, start:end])
        return
    samples, positions = g.shape[:2]
    if not (samples and positions and total.numel()):
        return
    g, a = g.to(total.dtype), a.to(total.dtype)
    if positions == 1:
        total.addmm_(g[:, 0].square().mT, a[:, 0].square())
        return
    together = max(1, SCRATCH // total.numel())
    if together == 1:
        scratch = torch.empty_like(total)
        for gradient, inputs in zip(g, a, strict=True):
            torch.mm(gradient.mT, inputs, out=scratch)
            total.addcmul_(scratch, scratch)
        return
    for gradients, inputs in zip(g.split(together), a.split(together), strict=True):
        total += torch.bmm(gradients.mT, inputs).square_().sum(0)


def _check(total: Tensor, g: Tensor, a: Tensor, offsets: Tensor | None) -> None:
    dimensions = 3 if offsets is None else 2
    if (
        g.ndim != dimensions
        or a.ndim != dimensions
        or g.shape[:-1] != a.shape[:-1]
        or total.shape != (g.shape[-1], a.shape[-1])
    ):
        expected = "(N, T, p), (N, T, d)" if offsets is None else "(rows, p), (rows, d)"
        raise ValueError(
            f"g {tuple(g.shape)}, a {tuple(a.shape)} and total {tuple(total.shape)} do not fit; "
            f"expected {expected} and (p, d)"
        )
    if offsets is not None and (
        offsets.ndim != 1 or len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(g)
        or (offsets.diff() < 0).any()
    ):  # fmt: skip
        raise ValueError(
            f"offsets must rise from 0 to the {len(g)} rows, got shape {tuple(offsets.shape)}"
        )
