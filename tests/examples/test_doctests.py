"""The examples in the docstrings of the programs' modules."""

import doctest
import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODULES = sorted(
    ".".join(path.relative_to(EXAMPLES).with_suffix("").parts)
    for path in EXAMPLES.glob("*/*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.usefixtures("own_folder")
@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.attempted > 0
    assert outcome.failed == 0
