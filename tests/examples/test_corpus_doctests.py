"""The examples in the docstrings of the corpus."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["order", "pieces", "tokenizer", "tokens"])
def test_the_examples_run(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(f"corpus.{name}"))
    assert outcome.attempted > 0
    assert outcome.failed == 0
