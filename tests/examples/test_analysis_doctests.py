"""The examples in the docstrings of the analysis."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name", ["checkpoints", "intervals", "pairings", "paper", "scaling", "training_log"]
)
def test_the_examples_run(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(f"analysis.{name}"))
    assert outcome.attempted > 0
    assert outcome.failed == 0
