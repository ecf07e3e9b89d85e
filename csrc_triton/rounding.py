r"""bfloat16 as 16 bits: stochastic rounding and master weights, as device functions of a block.

Bits go through memory as int16, so that neither conversion nor rounding is the device's own.

Stochastic rounding takes 16 random bits for each of three values of an element: one call of
Philox4x32-7 for 8 elements of one value, 3/8 of a call an element. A thread that owns 8
consecutive elements, one 128-bit access of each operand, makes its own 3 calls, and nothing is
exchanged between threads. An H200 issues about 100 instructions an element in the time that 14
bytes take; the loop has 77, and would have 84 with 10 rounds.

Oracle: :mod:`ars.reference.rounding`, which defines the counters.
"""

import triton
import triton.language as tl

__all__ = [
    "MASTER", "NEAREST", "STOCHASTIC", "join_master", "random_bits", "split_master",
    "stochastic_round",
]  # fmt: skip

# How a parameter is written: rounded to its dtype, bfloat16 with its remainder, or stochastically
# together with bfloat16 moments.
NEAREST = tl.constexpr(0)
MASTER = tl.constexpr(1)
STOCHASTIC = tl.constexpr(2)

# The reference's; a test keeps them equal.
ROUNDS = tl.constexpr(7)
# Elements that one call of Philox serves.
SERVED = tl.constexpr(8)


@triton.jit
def _quiet(x):
    """Bits of float32, with one and the same quiet NaN for every NaN: no carry makes it a zero."""
    return tl.where(x == x, x.to(tl.int32, bitcast=True), 0x7FC00000)


@triton.jit
def join_master(param, remainder):
    """Master weights, float32, of the int16 bits of parameters and their remainders."""
    # A remainder that was rounded up is negative, which takes the 1 off again.
    return ((param.to(tl.int32) << 16) + remainder.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def split_master(master):
    """Bits of the nearest bfloat16, ties away from zero, and the remainder, both int16."""
    bits = _quiet(master)
    return ((bits + 0x8000) >> 16).to(tl.int16), bits.to(tl.int16)


@triton.jit
def random_bits(key, start, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """16 random bits for value KIND of each of the BLOCK elements from ``start`` on, int32."""
    seed, number, step = key  # 64 bits, and uint32
    # BLOCK divides start, and both are powers of two below 2^35: only the low word varies.
    low = (start // SERVED & 0xFFFFFFFF).to(tl.uint32)
    low += tl.arange(0, BLOCK // SERVED).to(tl.uint32)
    high = (start >> 35).to(tl.uint32) | (KIND << 30)
    a, b, c, d = tl.philox(seed, low, high, number, step, ROUNDS)
    # The last axis varies fastest: words a, b, c, d, of each the low half first.
    words = tl.join(tl.join(a, c), tl.join(b, d))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return halves.reshape(BLOCK).to(tl.int32, bitcast=True)


@triton.jit
def stochastic_round(x, bits):
    """Bits, int16, of the bfloat16 numbers that these random bits round float32 to."""
    return ((_quiet(x) + bits) >> 16).to(tl.int16)
