"""Philox4x32-10 against published known answers and against itself."""

import pytest
import torch

from ars.reference import philox_uniform

# Counter (0, 0, 0, 0) and (all ones): Random123's kat_vectors, first output word.
ZERO_KEY_WORD = 0x6627E8D5


def test_known_answer():
    assert philox_uniform(0, 0) == ZERO_KEY_WORD * 2.0**-32


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 7, 2**63 - 1])
def test_tensor_equals_integers(seed):
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
