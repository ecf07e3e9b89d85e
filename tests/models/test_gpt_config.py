"""Sizes that do not fit are refused when the configuration is made."""

import dataclasses
import doctest
import math

import pytest

from ars.models import GPTConfig, config

SMALL = GPTConfig(vocab_size=17, sequence_len=8, n_layer=2, n_head=3, n_embd=24)


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


def test_docstring_examples():
    result = doctest.testmod(config)
    assert result.attempted > 0
    assert result.failed == 0
