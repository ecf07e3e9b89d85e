r"""The fused Adam step with its penalty, for a block of one tensor's elements.

For every element, with the numbers of :class:`~ars.csrc_triton.layout.Scalar` and
:class:`~ars.csrc_triton.layout.Correction` formed in float64 and rounded once:

    g <- c g + pull + lambda Omega (theta - theta*)                     (coupled EWC, 8)
    m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2                    (5)
    theta <- (1 - lr w) theta - lr / c1 m / (sqrt(v / c2) + eps)                     (7)
    theta <- theta* + (theta - theta*) / (1 + lr lambda Omega / (sqrt(v / c2) + eps))
                                                                      (proximal EWC, 9)

Bytes a parameter, read and written: 28 with everything in fp32; 36 with an fp32 penalty, 32 with
a bf16 one, 31.06 with a bf16 anchor and a uint8 importance; 22 for bf16 parameters and gradients
with fp32 moments, 26 with master weights, 14 with bf16 moments and stochastic rounding; amsgrad
adds two moments, 8 or 4; a pull adds 4.

Divisions and roots are IEEE's and nothing is contracted, so that every device, the interpreter and
the reference agree to the last bit, but for what saves a division each: the root's bias correction
is a product here, and (9) is multiplied out. How bfloat16 parameters are kept is
:mod:`ars.csrc_triton.rounding`'s.

Oracle: :func:`ars.reference.adam_step` and :func:`ars.reference.ewc_value`.
"""

import triton
import triton.language as tl

from ars.csrc_triton.helpers import load, pointer
from ars.csrc_triton.rounding import (
    MASTER,
    STOCHASTIC,
    join_master,
    random_bits,
    split_master,
    stochastic_round,
)

__all__ = ["COUPLED", "NO_PENALTY", "PROXIMAL", "THREADS", "update_block"]

NO_PENALTY = tl.constexpr(0)
COUPLED = tl.constexpr(1)
PROXIMAL = tl.constexpr(2)

THREADS = tl.constexpr(128)  # of a program of the update
SCALED = tl.constexpr(64)  # elements that share a scale of their uint8 importance


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
def _importance(
    address, scale, start, numel, offs, mask,
    IMPORTANCE: tl.constexpr, COMPUTE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Load the importance of a block; in uint8 it is ``scale[i // 64] (q_i / 255)^2``."""
    values = load(pointer(address, IMPORTANCE, WIDE) + offs, mask)
    if IMPORTANCE == tl.uint8:
        # Every thread loads the one scale of its neighbouring elements, and hands it on to each.
        each: tl.constexpr = BLOCK // THREADS
        head = start + each * tl.arange(0, THREADS)
        inside = None if WIDE else head < numel
        scales = load(pointer(scale, tl.float32, False) + head // SCALED, inside)
        for i in tl.static_range(3):
            if 1 << i < each:
                scales = tl.join(scales, scales)
        root = _divide(values.to(tl.float32), 255.0)
        omega = scales.reshape(BLOCK) * root * root
    else:
        omega = values
    return omega.to(COMPUTE)


@triton.jit
def _store(
    ptr, x, mask, key, start,
    KIND: tl.constexpr,  # which of an element's values this is
    STORED: tl.constexpr, ROUNDING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store a block in its dtype, rounded stochastically if that is how."""
    if ROUNDING == STOCHASTIC:
        rounded = stochastic_round(x, random_bits(key, start, KIND, BLOCK))
        tl.store(ptr.to(tl.pointer_type(tl.int16)), rounded, mask=mask)
    else:
        tl.store(ptr, x.to(STORED), mask=mask)


@triton.jit
def update_block(
    addresses, numbers, key, start, numel,  # as loaded by the kernel; the block's first element
    PARAM: tl.constexpr, MOMENT: tl.constexpr, ANCHOR: tl.constexpr, IMPORTANCE: tl.constexpr,
    AMSGRAD: tl.constexpr, DECOUPLED: tl.constexpr, PENALTY: tl.constexpr, PULLED: tl.constexpr,
    ROUNDING: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,  # 16 divides every address, and the block is whole
):  # fmt: skip
    """Update one block of one tensor; return its terms of the penalty's sum."""
    (param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, anchor, importance, pull, remainder,
     scale) = addresses  # fmt: skip
    (beta1, one_minus_beta1, beta2, one_minus_beta2,
     decay, eps, strength, clip, metric, step_size, inverse_root) = numbers  # fmt: skip
    offs = start + tl.arange(0, BLOCK)
    mask = None if WIDE else offs < numel
    p_ptr = pointer(param, tl.int16 if ROUNDING == MASTER else PARAM, WIDE) + offs
    m_ptr = pointer(exp_avg, MOMENT, WIDE) + offs
    v_ptr = pointer(exp_avg_sq, MOMENT, WIDE) + offs

    # Upcast at the load: the interpreter has no bf16 arithmetic, and COMPUTE's is the contract.
    if ROUNDING == MASTER:
        r_ptr = pointer(remainder, tl.int16, WIDE) + offs
        theta = join_master(load(p_ptr, mask), load(r_ptr, mask))
    else:
        theta = load(p_ptr, mask).to(COMPUTE)
    g = load(pointer(grad, PARAM, WIDE) + offs, mask).to(COMPUTE)
    m = load(m_ptr, mask).to(COMPUTE)
    v = load(v_ptr, mask).to(COMPUTE)
    if AMSGRAD:
        x_ptr = pointer(max_exp_avg_sq, MOMENT, WIDE) + offs
        largest = load(x_ptr, mask).to(COMPUTE)
    if PENALTY != NO_PENALTY:
        a = load(pointer(anchor, ANCHOR, WIDE) + offs, mask).to(COMPUTE)
        omega = _importance(
            importance, scale, start, numel, offs, mask, IMPORTANCE, COMPUTE, WIDE, BLOCK
        )
    if PULLED:
        # One condition for the whole block costs no width, and 0 no bytes.
        there = tl.full((BLOCK,), pull, tl.int64) != 0
        there = there if WIDE else mask & there
        pulled = load(pointer(pull, COMPUTE, WIDE) + offs, there)

    g *= clip
    if PULLED:
        g += pulled
    terms = tl.zeros(offs.shape, COMPUTE)
    if PENALTY != NO_PENALTY:
        delta = theta - a
        terms = omega * delta * delta
        if PENALTY == COUPLED:
            g += strength * (omega * delta)  # eq. 8; the other way overflows at the anchor
    if DECOUPLED:
        theta *= decay
    else:
        g += decay * theta

    m = beta1 * m + one_minus_beta1 * g  # eq. 5
    v = beta2 * v + one_minus_beta2 * g * g
    _store(m_ptr, m, mask, key, start, 1, MOMENT, ROUNDING, BLOCK)
    _store(v_ptr, v, mask, key, start, 2, MOMENT, ROUNDING, BLOCK)
    if AMSGRAD:
        v = tl.maximum(largest, v, propagate_nan=tl.PropagateNan.ALL)
        # The bits of v again: the maximum of what is stored.
        _store(x_ptr, v, mask, key, start, 2, MOMENT, ROUNDING, BLOCK)

    denominator = _sqrt(v) * inverse_root + eps
    theta -= step_size * _divide(m, denominator)  # eq. 7
    if PENALTY == PROXIMAL:
        # eq. 9, multiplied out to save a division, and from the end that the result is nearer to:
        # exactly theta where q is 0, and theta* where it is beyond all bounds.
        q = metric * omega
        denominator = tl.minimum(denominator, 3.4028234663852886e38)  # the largest float32
        part = (theta - a) * _divide(tl.minimum(q, denominator), denominator + q)
        theta = tl.where(q > denominator, a + part, theta - part)
    if ROUNDING == MASTER:
        rounded, rest = split_master(theta)
        tl.store(p_ptr, rounded, mask=mask)
        tl.store(r_ptr, rest, mask=mask)
    else:
        _store(p_ptr, theta, mask, key, start, 0, PARAM, ROUNDING, BLOCK)
    return terms
