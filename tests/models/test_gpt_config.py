"""Configurations: sizes that do not fit are refused, and the miniseries is as it was published."""

import dataclasses
import math

import pytest
import torch

from ars.models import GPT, GPTConfig, miniseries_config

SMALL = GPTConfig(vocab_size=17, sequence_len=8, n_layer=2, n_head=3, n_embd=24)

# depth -> (parameters in millions, training GFLOPs a token) of the published series, whose
# vocabulary has 32768 entries and whose context 2048 tokens.
PUBLISHED = {
    10: (91.1, 0.578), 11: (111.6, 0.721), 12: (135.3, 0.887), 13: (162.5, 1.077),
    14: (193.6, 1.294), 15: (228.8, 1.538), 16: (268.4, 1.812), 17: (312.8, 2.117),
    18: (362.2, 2.456), 19: (416.8, 2.830), 20: (477.1, 3.240),
}  # fmt: skip


def test_is_a_frozen_value():
    assert SMALL.head_dim == 8
    assert (SMALL.norm_eps, SMALL.rope_base) == (1e-6, 10000.0)
    assert dataclasses.replace(SMALL) == SMALL
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.n_layer = 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1"),
        ({"sequence_len": -1}, ValueError, "sequence_len must be at least 1"),
        ({"n_layer": 0}, ValueError, "n_layer must be at least 1"),
        ({"n_head": 0}, ValueError, "n_head must be at least 1"),
        ({"n_embd": 0}, ValueError, "n_embd must be at least 1"),
        ({"n_layer": 1.0}, TypeError, "n_layer must be an int"),
        ({"n_layer": True}, TypeError, "n_layer must be an int"),
        ({"n_embd": 25}, ValueError, "n_embd=25 is not a multiple of n_head=3"),
        ({"n_embd": 21}, ValueError, "head_dim = n_embd / n_head = 7 is odd"),
        ({"norm_eps": -1e-6}, ValueError, "norm_eps must be finite"),
        ({"norm_eps": math.nan}, ValueError, "norm_eps must be finite"),
        ({"norm_eps": "1e-6"}, TypeError, "norm_eps must be a float"),
        ({"rope_base": 1.0}, ValueError, "rope_base must be finite and > 1"),
        ({"rope_base": math.inf}, ValueError, "rope_base must be finite and > 1"),
    ],
)
def test_config_rejects(change, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(SMALL, **change)


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


def test_a_series_rejects():
    for depth in (0, -3):
        with pytest.raises(ValueError, match="depth must be at least 1"):
            miniseries_config(depth)
    for depth in (2.0, True, "4"):
        with pytest.raises(TypeError, match="depth must be an int"):
            miniseries_config(depth)
    with pytest.raises(ValueError, match="vocab_size"):
        miniseries_config(1, vocab_size=0)


@pytest.mark.parametrize(
    ("depth", "options", "expected"),  # expected: blocks, heads and width
    [
        (5, {"width_per_depth": 16, "head_dim": 16}, (5, 5, 80)),
        (3, {"width_per_depth": 64, "head_dim": 8}, (3, 24, 192)),
        (4, {"width": 56, "head_dim": 8}, (4, 7, 56)),
        (8, {"width": 88, "head_dim": 8}, (8, 11, 88)),
        (3, {"width": 64}, (3, 1, 64)),
        (1, {"width_per_depth": 2, "head_dim": 2}, (1, 1, 2)),
    ],
)
def test_widths_of_other_series(depth, options, expected):
    config = miniseries_config(depth, vocab_size=11, sequence_len=9, **options)
    assert (config.n_layer, config.n_head, config.n_embd) == expected
    assert config.head_dim == options.get("head_dim", 64)
    assert (config.vocab_size, config.sequence_len) == (11, 9)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"width_per_depth": 16}, ValueError, r"width 80 of depth 5 is not a mul.*head_dim=64"),
        ({"width": 56, "head_dim": 16}, ValueError, r"width 56 of depth 5 .*=16; choose a head"),
        ({"width": 60, "head_dim": 5}, ValueError, r"head_dim=5 is odd; .*choose an even one"),
        (
            {"width": 64, "width_per_depth": 64},
            ValueError,
            r"width=64 and width_per_depth=64 .*one",
        ),
        ({"head_dim": 0}, ValueError, "head_dim must be at least 1, got 0"),
        ({"width": 0}, ValueError, "width must be at least 1, got 0"),
        ({"width_per_depth": -16}, ValueError, "width_per_depth must be at least 1, got -16"),
        ({"head_dim": True}, TypeError, "head_dim must be an int, got True"),
        ({"head_dim": None}, TypeError, "head_dim must be an int, got None"),
        ({"width": 64.0}, TypeError, "width must be an int, got 64.0"),
        ({"width_per_depth": True}, TypeError, "width_per_depth must be an int, got True"),
    ],
)
def test_rejects_widths_that_do_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        miniseries_config(5, **options)
