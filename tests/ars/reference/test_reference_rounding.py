"""Rounding to bfloat16 against arithmetic, master weights over all bit patterns, and Philox.

Philox4x32-10 is compared with published known answers.
"""

import math

import pytest
import torch
from torch import Tensor

from ars.reference import (
    join_master,
    philox,
    philox_uniform,
    rounding_bits,
    split_master,
    stochastic_round,
)

# Ties, denormals, the largest numbers, infinities, and every sign of them.
SPECIAL = [
    0x00000000, 0x00000001, 0x00007FFF, 0x00008000, 0x00008001, 0x0000FFFF, 0x007FFFFF,
    0x00800000, 0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F80FFFF, 0x7F7F7FFF, 0x7F7F8000,
    0x7F7FFFFF, 0x7F800000,
]  # fmt: skip
NANS = [0x7F800001, 0x7F808000, 0x7FC00000, 0x7FFF7FFF, 0x7FFF8000, 0x7FFFFFFF]


def patterns(values: list[int]) -> Tensor:
    """Numbers of these bit patterns, and their negatives."""
    both = torch.tensor([*values, *(value | 1 << 31 for value in values)])
    return ((both ^ 1 << 31) - (1 << 31)).to(torch.int32).view(torch.float32)


def bits_of(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def every_upper_half() -> Tensor:
    """All 2^16 upper halves, each with lower halves at the tie, at the ends and at random."""
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int64)[:, None] << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]).expand(1 << 16, -1)
    lower = torch.cat((lower, torch.randint(1 << 16, (1 << 16, 1))), 1)
    x = (upper + lower).flatten().to(torch.int32).view(torch.float32)
    return x[~x.isnan()]


def test_master_weights_lose_nothing() -> None:
    for x in (every_upper_half(), patterns(SPECIAL)):
        param, remainder = split_master(x)
        assert param.dtype == torch.bfloat16
        assert remainder.dtype == torch.int16
        assert torch.equal(bits_of(join_master(param, remainder)), bits_of(x))


def test_the_parameter_is_the_nearest_number_and_a_tie_goes_away_from_zero() -> None:
    x = every_upper_half()
    param, remainder = split_master(x)
    tie = remainder == -(1 << 15)
    assert int(tie.sum()) > 60000
    assert torch.equal(param[~tie], x[~tie].to(torch.bfloat16))
    assert (param[tie].double().abs() > x[tie].double().abs()).all()


def test_a_master_weight_that_is_nan_shows() -> None:
    x = patterns(NANS)
    param, remainder = split_master(x)
    assert param.isnan().all()
    assert join_master(param, remainder).isnan().all()
    assert stochastic_round(x, torch.bfloat16, torch.full(x.shape, 0xFFFF)).isnan().all()


@pytest.mark.parametrize("bits", [0, 1, 0x7FFF, 0x8000, 0xFFFF])
def test_what_is_representable_stays_whatever_the_bits(bits: int) -> None:
    x = (torch.arange(-(1 << 15), 1 << 15) << 16).to(torch.int32).view(torch.float32)
    x = x[~x.isnan()]
    rounded = stochastic_round(x, torch.bfloat16, torch.full(x.shape, bits, dtype=torch.int32))
    assert torch.equal(bits_of(rounded.float()), bits_of(x))
    assert {math.inf, -math.inf} <= set(x.tolist())


def test_the_share_of_bits_that_round_up_is_the_part_cut_off() -> None:
    """All 2^16 bits together: the mean is the number itself, exactly."""
    bits = torch.arange(1 << 16, dtype=torch.int32)
    smallest = float(patterns([1])[0])
    for number in (math.pi, -1.7e-5, 2.0**100 / 3, 1 + 2.0**-23, -255.0 * smallest):
        x = torch.full((1 << 16,), number)
        assert stochastic_round(x, torch.bfloat16, bits).double().mean() == x[0].double()


def test_rounding_is_unbiased() -> None:
    """The mean relative error of a million numbers is within four of its standard errors."""
    x = torch.randn(1 << 20) * torch.exp2(torch.randint(-20, 20, (1 << 20,)).float())
    seen = []
    for bits in rounding_bits(x, seed=1, step=7, number=3):
        error = (stochastic_round(x, torch.bfloat16, bits).double() - x.double()) / x.double()
        assert abs(error.mean()) <= 4 * error.std() / math.sqrt(x.numel()) <= 3e-5
        seen.append(error)
    correlations = torch.corrcoef(torch.stack(seen))
    assert (correlations - torch.eye(3)).abs().max() <= 4 / math.sqrt(x.numel())


def test_bits_are_the_words_of_philox() -> None:
    seed, step, number = 0x0123456789ABCDEF, 2**24, 2**32 - 1
    found = rounding_bits(torch.empty(21), seed=seed, step=step, number=number)
    for kind, bits in enumerate(found):
        assert bits.dtype == torch.int32
        for index, value in enumerate(bits.tolist()):
            words = philox(seed, (index // 8, kind << 30, number, step), 7)
            assert value == (words[index % 8 // 2] >> 16 * (index % 2)) & 0xFFFF


@pytest.mark.parametrize("change", ["seed", "step", "number"])
def test_every_part_of_the_key_counts(change: str) -> None:
    key = {"seed": 1, "step": 1, "number": 1}
    like = torch.empty(4096)
    old = torch.cat(rounding_bits(like, **key))
    new = torch.cat(rounding_bits(like, **key | {change: 2}))
    again = torch.cat(rounding_bits(like, **key | {"step": torch.tensor(float(key["step"]))}))
    assert torch.equal(old, again)
    assert (old == new).float().mean() < 1e-3


def test_bits_follow_the_memory_and_not_the_shape() -> None:
    flat = torch.empty(6)
    transposed = flat.view(2, 3).t()
    key = {"seed": 5, "step": 2, "number": 0}
    for bits, expected in zip(
        rounding_bits(transposed, **key), rounding_bits(flat, **key), strict=True
    ):
        assert torch.equal(bits.t().flatten(), expected)
    assert rounding_bits(torch.empty(0), **key)[0].shape == (0,)
    assert rounding_bits(torch.empty(()), **key)[0].shape == ()


def test_other_dtypes_are_refused() -> None:
    x, bits = torch.ones(2), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(TypeError, match="only float32 to bfloat16"):
        stochastic_round(x.double(), torch.bfloat16, bits)
    with pytest.raises(TypeError, match="only float32 to bfloat16"):
        stochastic_round(x, torch.float16, bits)
    with pytest.raises(TypeError, match=r"convert it to torch\.float32"):
        split_master(x.double())
    param, remainder = split_master(x)
    with pytest.raises(TypeError, match=r"param is torch\.float16"):
        join_master(param.half(), remainder)
    with pytest.raises(TypeError, match=r"remainder torch\.int32"):
        join_master(param, remainder.int())


# Counter (0, 0, 0, 0) and (all ones): Random123's kat_vectors, first output word.
ZERO_KEY_WORD = 0x6627E8D5


def test_known_answer_of_philox():
    assert philox_uniform(0, 0) == ZERO_KEY_WORD * 2.0**-32


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 7, 2**63 - 1])
def test_random_numbers_of_tensors_equal_those_of_integers(seed):
    counters = torch.tensor([0, 1, 2, 1000, 2**31, 2**32 - 1])
    expected = [philox_uniform(seed, int(c)) for c in counters]
    assert philox_uniform(seed, counters).tolist() == expected


def test_uniform():
    draws = philox_uniform(3, torch.arange(200_000))
    assert draws.dtype == torch.float64
    assert 0 <= float(draws.min()) < float(draws.max()) < 1
    histogram = torch.histc(draws, bins=50, min=0, max=1)
    chi_square = float(((histogram - 4000) ** 2 / 4000).sum())
    assert chi_square < 94.6  # the 0.9999 quantile with 49 degrees of freedom is 94.6


def test_both_halves_of_the_seed_matter():
    draws = [philox_uniform(seed, 5) for seed in (0, 1, 2**32, 2**62)]
    assert len(set(draws)) == 4
