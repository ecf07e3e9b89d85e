r"""Which implementation adds up the per-sample squares of a matrix's gradient.

    total += sum_n (sum_t g_nt a_nt^T)^2                                     (eq. 11)

T = 1 is the product of two squared matrices. Otherwise no formula is cheaper than the N gradients
themselves, 2 N T p d operations; what differs is where they live:

    scratch   some rows of one, or a few small ones, in memory, squared by a second operation
    kernel    in registers (:mod:`ars.csrc_triton.fisher`), on a GPU in half precision

Nothing of the size of N gradients is ever held.
"""

import functools
import importlib.util
import itertools
from typing import Literal

import torch
from torch import Tensor

__all__ = ["add_squared_products_", "choose_squares", "has_triton"]

# Elements of the scratch, and below which several samples share it. On a CPU it and its part of
# the sum, 1 MiB each, stay in a core's cache; a GPU wants large products.
SCRATCH = {"cpu": 2**18}
SHARED = {"cpu": 2**14}
GPU_SCRATCH = 2**24
GPU_SHARED = 2**18
# The scratch costs 16 bytes of traffic an element and sample whatever T, its product as much as the
# kernel's, but on a library that may be a quarter faster: at 4.8 TB/s and 700 Tflop/s, by count of
# bytes and operations, the two ways meet near T = 3500.
LONG = 3500
# Elements below which a matrix has too few tiles for a GPU; products of a batch fill it better.
SMALL = 2**16


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; it is imported only when a kernel is launched."""
    return importlib.util.find_spec("triton") is not None


def choose_squares(
    device: torch.device, dtype: torch.dtype, positions: int, numel: int, *, aligned: bool
) -> Literal["squared", "scratch", "kernel"]:
    """Choose how to add up the squares.

    Args:
        device: Of all operands.
        dtype: Of g and a, the narrower if they differ.
        positions: T.
        numel: Elements of the sum, p d.
        aligned: Whether 16 bytes divide every row of g and a: the kernel reads others by element.

    Returns:
        ``squared`` for two squared matrices, ``scratch`` or ``kernel``. fp32 goes to the scratch:
        without tensor cores there is nothing to gain on the library's product.
    """
    if positions == 1:
        return "squared"
    if (
        device.type == "cuda"
        and dtype in {torch.bfloat16, torch.float16}
        and positions <= LONG
        and numel >= SMALL
        and aligned
        and has_triton()
    ):
        return "kernel"
    return "scratch"


def add_squared_products_(
    total: Tensor, g: Tensor, a: Tensor, offsets: Tensor | None = None
) -> None:
    r"""Add :math:`\sum_n (\sum_t g_{nt} a_{nt}^T)^2` to ``total`` in place.

    Products are summed in the dtype of ``total``. On a GPU, of operands that differ in precision
    the wider may be rounded to the narrower, as autocast does before the product itself.

    Args:
        total: Shape (p, d), float32 or float64, contiguous.
        g: Gradients of a matrix product's outputs, floating point, shape (N, T, p); or, with
            ``offsets``, (rows, p).
        a: Its inputs, shape (N, T, d); or (rows, d).
        offsets: int64, (N + 1,), non-decreasing from 0 to rows: sample n has rows
            ``offsets[n]`` to ``offsets[n + 1]``.

    Raises:
        ValueError: The shapes do not fit.

    Example:
        >>> import torch
        >>> from ars.squares import add_squared_products_
        >>> total = torch.zeros(1, 1)
        >>> g = torch.tensor([[[1.0], [1.0]], [[1.0], [-1.0]]])  # two samples of two positions
        >>> add_squared_products_(total, g, torch.ones(2, 2, 1))
        >>> total  # (1 + 1)^2 + (1 - 1)^2
        tensor([[4.]])
    """
    _check(total, g, a, offsets)
    samples = len(g) if offsets is None else len(offsets) - 1
    if not (samples and g.shape[-2] and total.numel()):
        return
    positions = g.shape[1] if offsets is None else max(2, len(g) // samples)
    narrow = min(g.dtype, a.dtype, key=lambda dtype: dtype.itemsize)
    aligned = all(t.stride(-2) * narrow.itemsize % 16 == 0 and t.stride(-1) == 1 for t in (g, a))
    way = choose_squares(total.device, narrow, positions, total.numel(), aligned=aligned)
    if way == "kernel" and total.dtype == torch.float32:
        from ars.csrc_triton import fisher

        fisher.add_squared_products_(total, g.to(narrow), a.to(narrow), offsets)
        return
    if way == "squared":
        g, a = g[:, 0].to(total.dtype), a[:, 0].to(total.dtype)
        total.addmm_(g.square().mT, a.square())
        return
    # A GPU multiplies half precision into fp32; elsewhere the operands are converted.
    halves = total.device.type == "cuda" and total.dtype == torch.float32 and narrow.itemsize == 2
    operand = narrow if halves else total.dtype
    g, a = g.to(operand), a.to(operand)
    if offsets is None:
        _add_by_scratch(total, g, a)
        return
    for start, end in itertools.pairwise(offsets.tolist()):
        _add_by_scratch(total, g[None, start:end], a[None, start:end])


def _add_by_scratch(total: Tensor, g: Tensor, a: Tensor) -> None:
    size = SCRATCH.get(total.device.type, GPU_SCRATCH)
    if total.numel() <= SHARED.get(total.device.type, GPU_SHARED):
        together = max(1, size // total.numel())
        for gradients, inputs in zip(g.split(together), a.split(together), strict=True):
            if g.dtype == total.dtype:
                products = torch.bmm(gradients.mT, inputs)
            else:
                products = torch.bmm(gradients.mT, inputs, out_dtype=total.dtype)
            total += products.square_().sum(0)
        return
    rows = max(1, size // total.shape[1])
    for part, columns in zip(total.split(rows), g.split(rows, dim=2), strict=True):
        scratch = torch.empty_like(part)
        for gradient, inputs in zip(columns, a, strict=True):
            if g.dtype == total.dtype:
                torch.mm(gradient.mT, inputs, out=scratch)
            else:
                torch.mm(gradient.mT, inputs, out_dtype=total.dtype, out=scratch)
            part.addcmul_(scratch, scratch)


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
