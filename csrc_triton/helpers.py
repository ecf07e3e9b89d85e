"""What more than one kernel uses: the layout, and device functions."""

from enum import IntEnum
from types import SimpleNamespace

import triton
import triton.language as tl

from ars.csrc_triton import layout

__all__ = [
    "CONFIG", "CORRECTION", "DIAGNOSTIC", "GATE_STATE", "HYPER", "SCALAR", "TABLE", "load",
    "pointer", "sum_in_order",
]  # fmt: skip


def _readable(columns: type[IntEnum]) -> tl.constexpr:
    """Make columns readable in kernels, as ``TABLE.value.PARAM``, and their number as ``WIDTH``.

    One constant for all of them, because Triton compares every global constant that a kernel uses
    with what it was compiled with, at every launch.
    """
    members = {column.name: column.value for column in columns}
    return tl.constexpr(SimpleNamespace(**members, WIDTH=len(columns)))


CONFIG = _readable(layout.Config)
CORRECTION = _readable(layout.Correction)
DIAGNOSTIC = _readable(layout.Diagnostic)
GATE_STATE = _readable(layout.GateState)
HYPER = _readable(layout.Hyper)
SCALAR = _readable(layout.Scalar)
TABLE = _readable(layout.Table)


@triton.jit
def pointer(address, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Turn an address from a table into a pointer; ``WIDE`` promises that 16 divides it.

    Without the promise every access is scalar, as a loaded address carries no divisibility. It is
    attached to the conversion, hence one conversion per branch: an aligned branch must not lend
    its promise to the other one.
    """
    result = address.to(tl.pointer_type(DTYPE))
    if WIDE:
        result = tl.multiple_of(result, 16)
    return result


@triton.jit
def load(ptr, mask):
    """Load a block, 0 where ``mask`` is false; a mask of None is no mask at all."""
    if mask is None:
        result = tl.load(ptr)
    else:
        result = tl.load(ptr, mask=mask, other=0.0)
    return result


@triton.jit
def sum_in_order(partials, count, BLOCK: tl.constexpr):
    """Sum ``count`` float64 partials in an order that depends on nothing but ``count``.

    For the last program to arrive: the loads bypass L1, which holds nothing of the other programs'.
    """
    total = tl.zeros((BLOCK,), tl.float64)
    start = 0
    while start < count:
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(partials + offs, mask=offs < count, other=0.0, cache_modifier=".cg")
        start += BLOCK
    return tl.sum(total)
