r"""The fused Adam step with its penalty: one launch for all tensors of a dtype class.

For every element, with the numbers of :class:`~ars.csrc_triton.layout.Scalar` and
:class:`~ars.csrc_triton.layout.Correction` formed in float64 and rounded once:

    g <- c g + lambda Omega (theta - theta*)                            (coupled EWC, 8)
    m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2                    (5)
    theta <- (1 - lr w) theta - lr / c1 m / (sqrt(v / c2) + eps)                     (7)
    theta <- theta* + (theta - theta*) / (1 + lr lambda Omega / (sqrt(v / c2) + eps))
                                                                      (proximal EWC, 9)

Bytes a parameter, read and written: 28 with everything in fp32; 36 with an fp32 penalty, 32 with
a bf16 one; 22 for bf16 parameters and gradients with fp32 moments; amsgrad adds 8.

Divisions and roots are IEEE's and nothing is contracted, so that every device, the interpreter and
the reference agree to the last bit, but for what saves a division each: the root's bias correction
is a product here, and (9) is multiplied out. The penalty's value is one partial sum a program,
added up in a fixed order: bitwise reproducible.

Oracle: :func:`ars.reference.adam_step` and :func:`ars.reference.ewc_value`.
"""

import triton
import triton.language as tl

from ars.csrc_triton.device import (
    CORRECTION,
    DIAGNOSTIC,
    SCALAR,
    TABLE,
    load,
    pointer,
    sum_in_order,
)

__all__ = ["COUPLED", "NO_PENALTY", "PROXIMAL", "adam_kernel"]

NO_PENALTY = tl.constexpr(0)
COUPLED = tl.constexpr(1)
PROXIMAL = tl.constexpr(2)


@triton.jit
def _sqrt(x):
    # tl.sqrt is approximate in fp32 and exact in fp64, for which sqrt_rn does not exist.
    if x.dtype == tl.float32:
        root = tl.sqrt_rn(x)
    else:
        root = tl.sqrt(x)
    return root


@triton.jit
def _divide(x, y):
    # As above: fp32's / is approximate.
    if x.dtype == tl.float32:
        quotient = tl.div_rn(x, y)
    else:
        quotient = x / y
    return quotient


@triton.jit
def _update_block(
    addresses, numbers, offs, mask,  # as loaded by the kernel; element offsets
    PARAM: tl.constexpr, MOMENT: tl.constexpr, ANCHOR: tl.constexpr, IMPORTANCE: tl.constexpr,
    AMSGRAD: tl.constexpr, DECOUPLED: tl.constexpr, PENALTY: tl.constexpr,
    WIDE: tl.constexpr,  # 16 divides every address
):  # fmt: skip
    """Update the elements ``offs`` of one tensor; return their terms of the penalty's sum."""
    param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, anchor, importance = addresses
    (beta1, one_minus_beta1, beta2, one_minus_beta2,
     decay, eps, strength, clip, metric, step_size, inverse_root) = numbers  # fmt: skip
    p_ptr = pointer(param, PARAM, WIDE) + offs
    m_ptr = pointer(exp_avg, MOMENT, WIDE) + offs
    v_ptr = pointer(exp_avg_sq, MOMENT, WIDE) + offs

    # Upcast at the load: the interpreter has no bf16 arithmetic, and MOMENT's is the contract.
    theta = load(p_ptr, mask).to(MOMENT)
    g = load(pointer(grad, PARAM, WIDE) + offs, mask).to(MOMENT)
    m = load(m_ptr, mask)
    v = load(v_ptr, mask)
    if AMSGRAD:
        x_ptr = pointer(max_exp_avg_sq, MOMENT, WIDE) + offs
        largest = load(x_ptr, mask)
    if PENALTY != NO_PENALTY:
        a = load(pointer(anchor, ANCHOR, WIDE) + offs, mask).to(MOMENT)
        omega_ptr = pointer(importance, IMPORTANCE, WIDE) + offs
        omega = load(omega_ptr, mask).to(MOMENT)

    g *= clip
    terms = tl.zeros(offs.shape, MOMENT)
    if PENALTY != NO_PENALTY:
        delta = theta - a
        terms = omega * delta * delta
        if PENALTY == COUPLED:
            g += strength * omega * delta  # eq. 8
    if DECOUPLED:
        theta *= decay
    else:
        g += decay * theta

    m = beta1 * m + one_minus_beta1 * g  # eq. 5
    v = beta2 * v + one_minus_beta2 * g * g
    tl.store(m_ptr, m, mask=mask)
    tl.store(v_ptr, v, mask=mask)
    if AMSGRAD:
        v = tl.maximum(largest, v, propagate_nan=tl.PropagateNan.ALL)
        tl.store(x_ptr, v, mask=mask)

    denominator = _sqrt(v) * inverse_root + eps
    theta -= step_size * _divide(m, denominator)  # eq. 7
    if PENALTY == PROXIMAL:
        # eq. 9, multiplied out to save a division.
        theta = a + _divide((theta - a) * denominator, denominator + metric * omega)
    tl.store(p_ptr, theta.to(PARAM), mask=mask)
    return terms


@triton.jit
def _update_tile(
    addresses, numbers, first, numel,  # tile's first element; elements of the tensor
    PARAM: tl.constexpr, MOMENT: tl.constexpr, ANCHOR: tl.constexpr, IMPORTANCE: tl.constexpr,
    AMSGRAD: tl.constexpr, DECOUPLED: tl.constexpr, PENALTY: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update one tile; return the sum of its terms of the penalty."""
    # Alignment is read off the addresses themselves, so it is never assumed, one misaligned view
    # slows down nobody else, and gradients may move without another table or compilation.
    bits = addresses[0]
    for i in tl.static_range(1, 7):
        bits |= addresses[i]
    left = tl.minimum(numel - first, TILE).to(tl.int32)
    whole = tl.where((bits & 15) == 0, left // BLOCK, 0)
    blocks = tl.cdiv(left, BLOCK)
    index = tl.arange(0, BLOCK)

    total = tl.zeros((BLOCK,), MOMENT)
    i = 0
    # Unmasked: a mask of unknown length would make every access scalar.
    while i < whole:
        offs = first + i * BLOCK + index
        total += _update_block(
            addresses, numbers, offs, None,
            PARAM, MOMENT, ANCHOR, IMPORTANCE, AMSGRAD, DECOUPLED, PENALTY, WIDE=True,
        )  # fmt: skip
        i += 1
    while i < blocks:
        offs = first + i * BLOCK + index
        total += _update_block(
            addresses, numbers, offs, offs < numel,
            PARAM, MOMENT, ANCHOR, IMPORTANCE, AMSGRAD, DECOUPLED, PENALTY, WIDE=False,
        )  # fmt: skip
        i += 1
    return tl.sum(total) if PENALTY != NO_PENALTY else 0.0


@triton.jit(do_not_specialize=["first_partial", "partial_count"])
def adam_kernel(
    table, grad_table, tiles,  # see tiles.py
    scalars, corrections,  # (G, 10) and (T, 2), float32, or float64 if any MOMENT is
    partials, ticket, diagnostics,  # (partial_count,) float64, (1,) int32 at 0, (10,) float64
    first_partial, partial_count,  # this launch's first partial; how many all launches write
    PARAM: tl.constexpr, MOMENT: tl.constexpr, ANCHOR: tl.constexpr, IMPORTANCE: tl.constexpr,
    AMSGRAD: tl.constexpr, DECOUPLED: tl.constexpr, PENALTY: tl.constexpr,
    LAST: tl.constexpr,  # of the launches that have a penalty
    TILE: tl.constexpr, BLOCK: tl.constexpr, SUM_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program updates one tile of TILE elements, BLOCK at a time."""
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
    )
    strength = tl.load(number + SCALAR.value.STRENGTH)
    numbers = (
        tl.load(number + SCALAR.value.BETA1).to(MOMENT),
        tl.load(number + SCALAR.value.ONE_MINUS_BETA1).to(MOMENT),
        tl.load(number + SCALAR.value.BETA2).to(MOMENT),
        tl.load(number + SCALAR.value.ONE_MINUS_BETA2).to(MOMENT),
        tl.load(number + SCALAR.value.DECAY).to(MOMENT),
        tl.load(number + SCALAR.value.EPS).to(MOMENT),
        strength.to(MOMENT),
        tl.load(number + SCALAR.value.CLIP).to(MOMENT),
        tl.load(number + SCALAR.value.METRIC).to(MOMENT),
        tl.load(correction + CORRECTION.value.STEP_SIZE).to(MOMENT),
        tl.load(correction + CORRECTION.value.INVERSE_ROOT).to(MOMENT),
    )

    if skip != 0:
        return
    if PENALTY == NO_PENALTY:
        _update_tile(
            addresses, numbers, first, numel, PARAM, MOMENT, ANCHOR, IMPORTANCE,
            AMSGRAD, DECOUPLED, NO_PENALTY, TILE, BLOCK,
        )  # fmt: skip
    else:
        value = tl.zeros((), tl.float64)
        if anchor != 0:
            total = _update_tile(
                addresses, numbers, first, numel, PARAM, MOMENT, ANCHOR, IMPORTANCE,
                AMSGRAD, DECOUPLED, PENALTY, TILE, BLOCK,
            )  # fmt: skip
            value = 0.5 * strength.to(tl.float64) * total.to(tl.float64)
        else:
            _update_tile(
                addresses, numbers, first, numel, PARAM, MOMENT, ANCHOR, IMPORTANCE,
                AMSGRAD, DECOUPLED, NO_PENALTY, TILE, BLOCK,
            )  # fmt: skip
        tl.store(partials + first_partial + program, value)
        if LAST:
            arrived = tl.atomic_add(ticket, 1, sem="acq_rel")
            if arrived == tl.num_programs(0) - 1:
                tl.store(ticket, 0)  # for the next launch
                penalty = sum_in_order(partials, partial_count, SUM_BLOCK)
                tl.store(diagnostics + DIAGNOSTIC.value.PENALTY, penalty)
