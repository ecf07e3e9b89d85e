r"""The per-sample squares of a matrix's gradient, without any sample's gradient in memory.

    total += sum_n (sum_t g_nt a_nt^T)^2                                     (eq. 11)

A program owns a tile of the matrix and some samples: it adds up the tile of one sample's gradient
on the tensor cores, in fp32, squares it where it lies, in registers, adds that to the tile of the
sum, and goes on to the next sample. 2 N T p d + 2 N p d operations; memory beyond the operands and
the sum only where a matrix has too few tiles for the device's processors: then the samples are
split among several programs a tile, each writes a partial sum of its own, and these are added in a
fixed order. No atomics: bitwise reproducible. (Positions could not be split so: their sum comes
before the square.)

bf16 and fp16 operands are multiplied as they are, fp32 in full fp32 (no TF32). Samples may be
ragged. Addresses are 64-bit.

Oracle: :func:`ars.reference.squared_products`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["DTYPES", "add_squared_products_", "block_t", "squared_products_kernel"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# 2 fp32 accumulators of 128 x 128 are 128 registers for each of 256 threads.
BLOCK_P = BLOCK_D = 128
THREADS = 256
# Tiles in a row of the launch's order that read the same columns of g, out of L2.
GROUP = 8
# Most bytes of partial sums, whatever the number of processors.
WORKSPACE = 2**26

WARP = 32 if torch.version.hip is None else 64
# Contraction may only change how acc * acc is rounded before it is added.
OPTIONS = {
    "num_warps": THREADS // WARP,
    "num_stages": 3 if torch.version.hip is None else 2,
    "enable_fp_fusion": True,
}


@triton.jit
def squared_products_kernel(
    out, g, a,  # (splits, p, d) fp32; (N, T, p) and (N, T, d), or (rows, p) and (rows, d)
    offsets,  # (N + 1,) int64: the first row of each sample; read if RAGGED
    samples, positions, p, d,  # positions is T; unread if RAGGED
    g_sample, g_row, a_sample, a_row,  # strides in elements; the last dimension's is 1
    per_split,  # samples of one program
    RAGGED: tl.constexpr,
    ADD: tl.constexpr,  # to out, instead of writing it: there is one split
    UPCAST: tl.constexpr,  # operands to fp32, as the interpreter has no bf16 arithmetic
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Program (tile, split) sums the squares of one tile over its samples."""
    tile, split = tl.program_id(0), tl.program_id(1)
    tiles_p, tiles_d = tl.cdiv(p, BLOCK_P), tl.cdiv(d, BLOCK_D)
    first_p = tile // (GROUP * tiles_d) * GROUP
    rows_of_tiles = tl.minimum(tiles_p - first_p, GROUP)
    within = tile % (GROUP * tiles_d)
    offs_p = (first_p + within % rows_of_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_d = within // rows_of_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_p, mask_d = offs_p < p, offs_d < d
    index = tl.arange(0, BLOCK_T)

    first = split * per_split
    last = tl.minimum(first + per_split, samples)
    # int64 before the multiply, and no further multiply by anything large.
    g_first, a_first = g + first.to(tl.int64) * g_sample, a + first.to(tl.int64) * a_sample
    squares = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for n in range(first, last):
        count = positions
        if RAGGED:
            start = tl.load(offsets + n)
            count = (tl.load(offsets + n + 1) - start).to(tl.int32)
            g_first, a_first = g + start * g_row, a + start * a_row
        g_ptrs = g_first + index[:, None] * g_row + offs_p[None, :]
        a_ptrs = a_first + index[:, None] * a_row + offs_d[None, :]
        product = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
        for t in range(0, count, BLOCK_T):
            keep = index < count - t
            g_tile = tl.load(g_ptrs, mask=keep[:, None] & mask_p[None, :], other=0.0)
            a_tile = tl.load(a_ptrs, mask=keep[:, None] & mask_d[None, :], other=0.0)
            if UPCAST:
                g_tile, a_tile = g_tile.to(tl.float32), a_tile.to(tl.float32)
            product = tl.dot(tl.trans(g_tile), a_tile, product, input_precision="ieee")
            g_ptrs += BLOCK_T * g_row
            a_ptrs += BLOCK_T * a_row
        squares += product * product
        if not RAGGED:
            g_first += g_sample
            a_first += a_sample

    rows = split.to(tl.int64) * p + offs_p.to(tl.int64)
    out_ptrs = out + rows[:, None] * d + offs_d[None, :]
    mask = mask_p[:, None] & mask_d[None, :]
    if ADD:
        squares += tl.load(out_ptrs, mask=mask, other=0.0)
    tl.store(out_ptrs, squares, mask=mask)


_DEVICE_TYPE = "cuda" if isinstance(squared_products_kernel, triton.JITFunction) else "cpu"


def _check(total: Tensor, g: Tensor, a: Tensor, offsets: Tensor | None) -> None:
    if total.dtype != torch.float32 or not total.is_contiguous():
        raise ValueError(
            f"total is {total.dtype} with strides {total.stride()}; it must be contiguous float32"
        )
    if g.dtype != a.dtype or g.dtype not in DTYPES:
        raise TypeError(
            f"g is {g.dtype} and a {a.dtype}; convert both to one of bfloat16, float16, float32"
        )
    for name, tensor in (("total", total), ("g", g), ("a", a), ("offsets", offsets)):
        if tensor is not None and (
            tensor.device != total.device or tensor.device.type != _DEVICE_TYPE
        ):
            raise ValueError(
                f"{name} is on {tensor.device}; all must be on one {_DEVICE_TYPE} device"
            )
    dimensions = 3 if offsets is None else 2
    if (
        g.ndim != dimensions
        or a.ndim != dimensions
        or g.shape[:-1] != a.shape[:-1]
        or total.shape != (g.shape[-1], a.shape[-1])
    ):
        raise ValueError(
            f"g {tuple(g.shape)}, a {tuple(a.shape)} and total {tuple(total.shape)} do not fit"
        )
    if offsets is not None and (offsets.dtype != torch.int64 or not offsets.is_contiguous()):
        raise ValueError(f"offsets are {offsets.dtype}; they must be contiguous int64")


def block_t(itemsize: int, capability: tuple[int, int] | None) -> int:
    """Positions a tile: as many as fit beside the accumulators without spilling.

    Args:
        itemsize: Of the operands, in bytes: 2 or 4.
        capability: Of an NVIDIA device; None for others.
    """
    if itemsize == 4:
        return 16
    return 64 if capability is not None and capability >= (9, 0) else 32


def _splits(samples: int, tiles: int, numel: int, device: torch.device) -> int:
    """How many programs share a tile: as many as the device needs to be full, if memory allows."""
    processors = 1
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = min(samples, processors // tiles)
    return max(1, min(wanted, WORKSPACE // (4 * numel)))


def add_squared_products_(
    total: Tensor,
    g: Tensor,
    a: Tensor,
    offsets: Tensor | None = None,
    *,
    splits: int | None = None,
) -> None:
    r"""Add :math:`\sum_n (\sum_t g_{nt} a_{nt}^T)^2` to ``total`` in place, in fp32.

    Args:
        total: (p, d), float32, contiguous.
        g: (N, T, p), or with ``offsets`` (rows, p); bfloat16, float16 or float32.
        a: (N, T, d), or (rows, d); of the dtype of ``g``.
        offsets: int64, (N + 1,), non-decreasing from 0 to rows (not checked: that would wait for
            the device). Sample n has the rows from ``offsets[n]`` to ``offsets[n + 1]``.
        splits: Programs a tile, >= 1; chosen by the device if None. The result's last bits depend
            on it.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: Shapes, layouts or devices do not fit.
    """
    _check(total, g, a, offsets)
    samples = len(g) if offsets is None else len(offsets) - 1
    positions = g.shape[-2] if offsets is None else 0
    p, d = total.shape
    if samples < 1 or g.numel() == 0 or a.numel() == 0:
        return
    g, a = (t if t.stride(-1) == 1 else t.contiguous() for t in (g, a))
    tiles = triton.cdiv(p, BLOCK_P) * triton.cdiv(d, BLOCK_D)
    if splits is None:
        splits = _splits(samples, tiles, total.numel(), total.device)
    per_split = triton.cdiv(samples, splits)
    splits = triton.cdiv(samples, per_split)
    out = total if splits == 1 else total.new_empty(splits, p, d)
    ragged = offsets is not None
    nvidia = total.is_cuda and torch.version.hip is None
    capability = torch.cuda.get_device_capability(total.device) if nvidia else None
    with torch.cuda.device_of(total):
        squared_products_kernel[tiles, splits](
            out, g, a, offsets, samples, positions, p, d,
            0 if ragged else g.stride(0), g.stride(-2), 0 if ragged else a.stride(0), a.stride(-2),
            per_split, RAGGED=ragged, ADD=splits == 1, UPCAST=_DEVICE_TYPE == "cpu",
            BLOCK_P=BLOCK_P, BLOCK_D=BLOCK_D, BLOCK_T=block_t(g.element_size(), capability),
            GROUP=GROUP, **OPTIONS,
        )  # fmt: skip
    if splits > 1:
        total += out.sum(0)
