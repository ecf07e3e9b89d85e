"""The shape of every member of the miniseries."""

import doctest

import pytest
import torch

from ars.models import GPT, miniseries, miniseries_config

# depth -> (parameters in millions, training GFLOPs a token) of the published series, whose
# vocabulary has 32768 entries and whose context 2048 tokens.
PUBLISHED = {
    10: (91.1, 0.578), 11: (111.6, 0.721), 12: (135.3, 0.887), 13: (162.5, 1.077),
    14: (193.6, 1.294), 15: (228.8, 1.538), 16: (268.4, 1.812), 17: (312.8, 2.117),
    18: (362.2, 2.456), 19: (416.8, 2.830), 20: (477.1, 3.240),
}  # fmt: skip


@pytest.mark.parametrize("depth", PUBLISHED)
def test_sizes_are_those_of_the_published_series(depth):
    with torch.device("meta"):
        model = GPT(miniseries_config(depth, vocab_size=32768, sequence_len=2048))
    millions, gflops = PUBLISHED[depth]
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.05)
    assert model.flops_per_token() / 1e9 == pytest.approx(gflops, abs=0.0006)


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_depth_gives_everything(depth):
    config = miniseries_config(depth)
    assert (config.n_layer, config.n_head, config.n_embd) == (depth, depth, 64 * depth)
    assert config.head_dim == 64
    assert (config.vocab_size, config.sequence_len) == (256, 256)


@pytest.mark.parametrize("depth", [0, -3])
def test_rejects_depth_below_one(depth):
    with pytest.raises(ValueError, match="depth must be at least 1"):
        miniseries_config(depth)


@pytest.mark.parametrize("depth", [2.0, True, "4"])
def test_rejects_depth_that_is_no_integer(depth):
    with pytest.raises(TypeError, match="depth must be an int"):
        miniseries_config(depth)


def test_rejects_bad_sizes():
    with pytest.raises(ValueError, match="vocab_size"):
        miniseries_config(1, vocab_size=0)


def test_docstring_examples():
    result = doctest.testmod(miniseries)
    assert result.attempted > 0
    assert result.failed == 0
