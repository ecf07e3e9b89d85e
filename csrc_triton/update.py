"""The update kernel: finds the tile of each program, and what its tensor needs, and walks it.

What happens to an element is :mod:`ars.csrc_triton.adam`'s. The penalty's value is one partial sum
a program, added up in a fixed order by the last one to arrive: bitwise reproducible.
"""

import triton
import triton.language as tl

from ars.csrc_triton.adam import NO_PENALTY, update_block
from ars.csrc_triton.helpers import (
    CORRECTION,
    DIAGNOSTIC,
    SCALAR,
    TABLE,
    pointer,
    sum_in_order,
)
from ars.csrc_triton.rounding import STOCHASTIC

__all__ = ["adam_kernel"]


@triton.jit
def _update_tile(
    addresses, numbers, key, first, numel,  # tile's first element; elements of the tensor
    PARAM: tl.constexpr, MOMENT: tl.constexpr, ANCHOR: tl.constexpr, IMPORTANCE: tl.constexpr,
    AMSGRAD: tl.constexpr, DECOUPLED: tl.constexpr, PENALTY: tl.constexpr, PULLED: tl.constexpr,
    ROUNDING: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Update one tile; return the sum of its terms of the penalty."""
    # Alignment is read off the addresses themselves, so it is never assumed, one misaligned view
    # slows down nobody else, and gradients may move without another table or compilation.
    bits = addresses[0]
    for i in tl.static_range(1, 9):
        bits |= addresses[i]
    left = tl.minimum(numel - first, TILE).to(tl.int32)
    whole = tl.where((bits & 15) == 0, left // BLOCK, 0)

    PART: tl.constexpr = BLOCK // 2
    total = tl.zeros((BLOCK,), COMPUTE)
    rest = tl.zeros((PART,), COMPUTE)
    i = 0
    # Unmasked: a mask of unknown length would make every access scalar.
    while i < whole:
        total += update_block(
            addresses, numbers, key, first + i * BLOCK, numel,
            PARAM, MOMENT, ANCHOR, IMPORTANCE, AMSGRAD, DECOUPLED, PENALTY, PULLED, ROUNDING,
            COMPUTE, BLOCK, WIDE=True,
        )  # fmt: skip
        i += 1
    # Half as many elements a thread: it is this loop that would take the most registers.
    done = whole * BLOCK
    while done < left:
        rest += update_block(
            addresses, numbers, key, first + done, numel,
            PARAM, MOMENT, ANCHOR, IMPORTANCE, AMSGRAD, DECOUPLED, PENALTY, PULLED, ROUNDING,
            COMPUTE, PART, WIDE=False,
        )  # fmt: skip
        done += PART
    return tl.sum(total) + tl.sum(rest) if PENALTY != NO_PENALTY else 0.0


@triton.jit(do_not_specialize=["first_partial", "partial_count"])
def adam_kernel(
    table, grad_table, tiles,  # see tiles.py
    scalars, corrections,  # (G, 10) and (T, 2), float32, or float64 if any MOMENT is
    seed,  # (1,) int64, of the stochastic rounding
    partials, ticket, diagnostics,  # (partial_count,) float64, (1,) int32 at 0, (10,) float64
    first_partial, partial_count,  # this launch's first partial; how many all launches write
    PARAM: tl.constexpr, MOMENT: tl.constexpr, ANCHOR: tl.constexpr, IMPORTANCE: tl.constexpr,
    AMSGRAD: tl.constexpr, DECOUPLED: tl.constexpr, PENALTY: tl.constexpr, PULLED: tl.constexpr,
    ROUNDING: tl.constexpr,  # see rounding.py
    LAST: tl.constexpr,  # of the launches that have a penalty
    TILE: tl.constexpr, BLOCK: tl.constexpr, SUM_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program updates one tile of TILE elements, BLOCK at a time."""
    COMPUTE: tl.constexpr = tl.float64 if MOMENT == tl.float64 else tl.float32
    skip = tl.load(scalars + SCALAR.value.SKIP)
    program = tl.program_id(0)
    tensor = tl.load(tiles + 2 * program.to(tl.int64)).to(tl.int64)
    # int64 before the multiply: a tensor may have more than 2^31 elements.
    first = tl.load(tiles + 2 * program.to(tl.int64) + 1).to(tl.int64) * TILE
    row = table + tensor * TABLE.value.WIDTH
    numel = tl.load(row + TABLE.value.NUMEL)
    number = scalars + tl.load(row + TABLE.value.GROUP) * SCALAR.value.WIDTH
    correction = corrections + tensor * CORRECTION.value.WIDTH
    anchor = tl.load(row + TABLE.value.ANCHOR)
    addresses = (
        tl.load(row + TABLE.value.PARAM),
        tl.load(grad_table + tensor),
        tl.load(row + TABLE.value.EXP_AVG),
        tl.load(row + TABLE.value.EXP_AVG_SQ),
        tl.load(row + TABLE.value.MAX_EXP_AVG_SQ),
        anchor,
        tl.load(row + TABLE.value.IMPORTANCE),
        tl.load(row + TABLE.value.PULL),
        tl.load(row + TABLE.value.REMAINDER),
        tl.load(row + TABLE.value.SCALE),
    )
    key = None
    if ROUNDING == STOCHASTIC:
        steps = pointer(tl.load(row + TABLE.value.STEP), tl.float32, False)
        count = tl.load(row + TABLE.value.NUMBER).to(tl.uint32)
        key = (tl.load(seed), count, tl.load(steps).to(tl.uint32))
    strength = tl.load(number + SCALAR.value.STRENGTH)
    numbers = (
        tl.load(number + SCALAR.value.BETA1).to(COMPUTE),
        tl.load(number + SCALAR.value.ONE_MINUS_BETA1).to(COMPUTE),
        tl.load(number + SCALAR.value.BETA2).to(COMPUTE),
        tl.load(number + SCALAR.value.ONE_MINUS_BETA2).to(COMPUTE),
        tl.load(number + SCALAR.value.DECAY).to(COMPUTE),
        tl.load(number + SCALAR.value.EPS).to(COMPUTE),
        strength.to(COMPUTE),
        tl.load(number + SCALAR.value.CLIP).to(COMPUTE),
        tl.load(number + SCALAR.value.METRIC).to(COMPUTE),
        tl.load(correction + CORRECTION.value.STEP_SIZE).to(COMPUTE),
        tl.load(correction + CORRECTION.value.INVERSE_ROOT).to(COMPUTE),
    )

    if skip != 0:
        return
    if PENALTY == NO_PENALTY:
        _update_tile(
            addresses, numbers, key, first, numel, PARAM, MOMENT, ANCHOR, IMPORTANCE,
            AMSGRAD, DECOUPLED, NO_PENALTY, PULLED, ROUNDING, COMPUTE, BLOCK, TILE,
        )  # fmt: skip
    else:
        value = tl.zeros((), tl.float64)
        if anchor != 0:
            total = _update_tile(
                addresses, numbers, key, first, numel, PARAM, MOMENT, ANCHOR, IMPORTANCE,
                AMSGRAD, DECOUPLED, PENALTY, PULLED, ROUNDING, COMPUTE, BLOCK, TILE,
            )  # fmt: skip
            value = 0.5 * strength.to(tl.float64) * total.to(tl.float64)
        else:
            _update_tile(
                addresses, numbers, key, first, numel, PARAM, MOMENT, ANCHOR, IMPORTANCE,
                AMSGRAD, DECOUPLED, NO_PENALTY, PULLED, ROUNDING, COMPUTE, BLOCK, TILE,
            )  # fmt: skip
        tl.store(partials + first_partial + program, value)
        if LAST:
            arrived = tl.atomic_add(ticket, 1, sem="acq_rel")
            if arrived == tl.num_programs(0) - 1:
                tl.store(ticket, 0)  # for the next launch
                penalty = sum_in_order(partials, partial_count, SUM_BLOCK)
                tl.store(diagnostics + DIAGNOSTIC.value.PENALTY, penalty)
