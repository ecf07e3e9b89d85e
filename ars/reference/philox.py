"""Counter-based random numbers: the same on every device and for every launch geometry."""

from typing import Any, TypeAlias, overload

from torch import Tensor

Words: TypeAlias = tuple[Any, Any, Any, Any]


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
