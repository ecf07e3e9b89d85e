"""The examples in the docstrings of the trainer."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["arms", "overhead", "rules", "schedule", "signals", "state"])
def test_the_examples_run(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(f"trainer.{name}"))
    assert outcome.attempted > 0
    assert outcome.failed == 0
