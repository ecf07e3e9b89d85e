"""What is published of the digits agrees with the raw results, and the results with the targets."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from continual.digit_tasks import Settings
from continual.digits_results import average_accuracy, markdown_table
from continual.memory_methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "digits"


def content(name: str) -> Any:
    return json.loads((RESULTS / name / "results.json").read_text())


@pytest.fixture(scope="module")
def means() -> dict[tuple[int, str, float], float]:
    groups: dict[tuple[int, str, float], list[float]] = {}
    for run in content("methods")["runs"]:
        key = run["tasks"], run["method"], run["strength"]
        groups.setdefault(key, []).append(average_accuracy(run["accuracy"]))
    assert {len(values) for values in groups.values()} == {5}
    return {key: fmean(values) for key, values in groups.items()}


@pytest.mark.parametrize("name", ["methods", "strengths", "classes"])
def test_tables_are_those_of_the_raw_results(name: str) -> None:
    found = content(name)
    table = markdown_table(Settings(**found["settings"]), found["runs"])
    assert (RESULTS / name / "table.md").read_text() == table


@pytest.mark.parametrize("name", ["methods", "classes"])
def test_the_documentation_shows_the_table(name: str) -> None:
    rows = (RESULTS / name / "table.md").read_text().split("\n\n")[0]
    assert rows in (ROOT / "docs" / "continual.md").read_text()


def test_strengths_are_those_that_the_sweep_found_best() -> None:
    """Or as good: within the distance that two seeds cannot tell apart."""
    groups: dict[str, dict[float, list[float]]] = {}
    for run in content("strengths")["runs"]:
        values = groups.setdefault(run["method"], {}).setdefault(run["strength"], [])
        values.append(average_accuracy(run["accuracy"]))
    for method, by_strength in groups.items():
        accuracy = {strength: fmean(values) for strength, values in by_strength.items()}
        assert accuracy[METHODS[method].strength] > max(accuracy.values()) - 1.5, method


def test_what_was_aimed_at(means: dict[tuple[int, str, float], float]) -> None:
    five = {m: mean for (tasks, m, s), mean in means.items() if tasks == 5 and s < 1e6}
    assert five["none"] < 50
    assert five["ewc"] > 65
    assert five["kfac"] > 90
    assert five["activations"] > 92
    assert max(five["subspace-outside"], five["subspace-output"]) < 60 < 85 < five["subspace"]
    assert max(mean for (tasks, m, _), mean in means.items() if tasks == 10 and m != "joint") > 85
