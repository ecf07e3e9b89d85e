r"""bfloat16 parameters without their loss: stochastic rounding, and exact master weights.

The 16 bits that bfloat16 cuts off a float32 number decide how it is rounded, or are kept:

* Stochastic rounding adds 16 random bits to the number's own before cutting, so that it rounds
  away from zero with a probability equal to the part cut off: the expectation is the number.
* A master weight is the rounded parameter and the 16 bits, together the float32 number itself.
"""

from typing import Any, TypeAlias, overload

import torch
from torch import Tensor

Words: TypeAlias = tuple[Any, Any, Any, Any]

# Values of one element that a step rounds: the parameter and the two moments.
ROUNDED = 3
# Rounding needs no more than a generator that passes BigCrush, and every round is paid for.
ROUNDS = 7
_QUIET_NAN = 0x7FC00000


def _multiply_high_low(a: int, b: Any) -> tuple[Any, Any]:
    """Return the high and low 32 bits of a 32 x 32 bit product, without leaving 63 bits."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(seed: int, counter: Words, rounds: int = 10) -> Words:
    """Apply Philox4x32 to a counter: four words of 32 bits, a pure function of its arguments.

    Args:
        seed: Key, 64 bits.
        counter: Four words in [0, 2^32): ints, or int64 tensors of shapes that broadcast.
        rounds: 10 is the generator's default; 7 are the fewest that pass all tests of BigCrush.

    Returns:
        Four words in [0, 2^32), ints or int64 tensors.

    Example:
        >>> [hex(word) for word in philox(0, (0, 0, 0, 0))]  # Random123's known answer
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']

    References:
        Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    key0, key1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    words = counter
    for _ in range(rounds):
        high0, low0 = _multiply_high_low(0xD2511F53, words[0])
        high1, low1 = _multiply_high_low(0xCD9E8D57, words[2])
        words = (high1 ^ words[1] ^ key0, low1, high0 ^ words[3] ^ key1, low0)
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return words


@overload
def philox_uniform(seed: int, counter: int) -> float: ...


@overload
def philox_uniform(seed: int, counter: Tensor) -> Tensor: ...


def philox_uniform(seed: int, counter: int | Tensor) -> float | Tensor:
    """Uniform number in [0, 1) from Philox4x32-10: a pure function of (seed, counter).

    Args:
        seed: Key, 64 bits.
        counter: First counter word, in [0, 2^32): an int, or an int64 tensor of any shape.

    Returns:
        The first output word times 2^-32: a float, or a float64 tensor of the counter's shape.

    Example:
        >>> philox_uniform(0, 0) * 2**32 == 0x6627E8D5  # Random123's known answer
        True

    References:
        Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    zero = counter * 0
    word = philox(seed, (counter, zero, zero, zero))[0]
    return (word.double() if isinstance(word, Tensor) else float(word)) * 2.0**-32


def rounding_bits(
    like: Tensor, *, seed: int, step: int | Tensor, number: int
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Random bits that round a parameter and its two moments: 16 for each value of each element.

    Elements i of a parameter are counted in the order of its memory. One call of Philox4x32-7
    serves 8 of them with one value k (0 the parameter, 1 and 2 its moments):

    .. math::
        w = \mathrm{Philox}(\text{seed};\;
            \lfloor i / 8 \rfloor \bmod 2^{32},\;
            \lfloor i / 2^{35} \rfloor + 2^{30} k,\; \text{number},\; \text{step}),
        \quad \text{bits}_i = \lfloor w_{\lfloor (i \bmod 8) / 2 \rfloor} / 2^{16 (i \bmod 2)}
            \rfloor \bmod 2^{16}

    so that they do not depend on how the work is divided, and replicas draw the same ones.

    Args:
        like: A tensor of the parameter's shape and memory order; its values are not read. Gaps are
            not counted.
        seed: Key, 64 bits.
        step: Steps that the parameter has taken, this one included; an int, or a 0-d tensor on
            ``like``'s device.
        number: Index of the parameter in its optimizer, in [0, 2^32).

    Returns:
        Bits of the parameter, of the first and of the second moment: int32 in [0, 2^16), like
        ``like`` in shape and memory order.

    Example:
        >>> bits, _, _ = rounding_bits(torch.empty(10), seed=0, step=1, number=0)
        >>> more, _, _ = rounding_bits(torch.empty(20), seed=0, step=1, number=0)
        >>> torch.equal(bits, more[:10])
        True

    References:
        Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    strides = torch.empty_like(like, device="meta").stride()  # its own unless it has gaps
    group = torch.arange((like.numel() + 7) // 8, device=like.device)
    third = group * 0 + number
    fourth = group * 0 + (step.long() if isinstance(step, Tensor) else step)
    found = []
    for kind in range(ROUNDED):
        counter = (group & 0xFFFFFFFF, (group >> 32) | (kind << 30), third, fourth)
        words = torch.stack(philox(seed, counter, ROUNDS), 1)
        halves = torch.stack((words & 0xFFFF, words >> 16), 2).to(torch.int32)
        bits = halves.flatten()[: like.numel()]
        found.append(bits.as_strided(like.shape, strides))
    return found[0], found[1], found[2]


def stochastic_round(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Round to bfloat16, up or down with probabilities that make the expectation ``x``.

    A representable number stays, infinities and NaN among them; beyond the largest one, rounding
    away from zero is infinity, as it is when rounding to nearest.

    Args:
        x: Numbers, float32, any shape.
        dtype: ``torch.bfloat16``, the dtype for which 16 bits are cut off.
        bits: Random integers in [0, 2^16), int32, of the same shape.

    Returns:
        The rounded numbers, bfloat16.

    Raises:
        TypeError: If ``x`` is not float32 or ``dtype`` not bfloat16.

    Example:
        >>> x = torch.full((2,), 1.001953125)  # a quarter of the way from 1 to the next number
        >>> stochastic_round(x, torch.bfloat16, torch.tensor([49151, 49152], dtype=torch.int32))
        tensor([1.0000, 1.0078], dtype=torch.bfloat16)
    """
    if x.dtype != torch.float32 or dtype != torch.bfloat16:
        raise TypeError(f"cannot round {x.dtype} to {dtype}; only float32 to bfloat16")
    return ((_quiet(x) + bits) >> 16).to(torch.int16).view(dtype)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split a master weight into the parameter nearest to it and the 16 bits that are missing.

    Args:
        master: Master weights, float32, any shape.

    Returns:
        The parameter, bfloat16, ties rounded away from zero; and the remainder, int16. Nothing is
        lost but the payload of a NaN, which the parameter would not always show as NaN.

    Raises:
        TypeError: If ``master`` is not float32.

    Example:
        >>> param, remainder = split_master(torch.tensor([3.14159]))
        >>> param, remainder
        (tensor([3.1406], dtype=torch.bfloat16), tensor([4048], dtype=torch.int16))
        >>> join_master(param, remainder)
        tensor([3.1416])
    """
    if master.dtype != torch.float32:
        raise TypeError(f"master is {master.dtype}; convert it to torch.float32")
    bits = _quiet(master)
    param = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    return param, (((bits & 0xFFFF) ^ 0x8000) - 0x8000).to(torch.int16)


def join_master(param: Tensor, remainder: Tensor) -> Tensor:
    """Return the master weight that :func:`split_master` split, exactly.

    A remainder with its top bit set was rounded up: as a signed number it is negative, which takes
    the 1 off the upper half again.

    Args:
        param: Parameter, bfloat16, any shape.
        remainder: Its remainder, int16, same shape.

    Returns:
        The master weights, float32.

    Raises:
        TypeError: If a dtype is another.
    """
    if param.dtype != torch.bfloat16 or remainder.dtype != torch.int16:
        raise TypeError(
            f"param is {param.dtype} and remainder {remainder.dtype}; pass torch.bfloat16 and "
            "torch.int16"
        )
    bits = param.detach().view(torch.int16).to(torch.int32) * 0x10000 + remainder.to(torch.int32)
    return bits.view(torch.float32)


def _quiet(x: Tensor) -> Tensor:
    """Return the bits, int32, with one and the same quiet NaN for every NaN."""
    return torch.where(x.isnan(), _QUIET_NAN, x.detach().view(torch.int32))
