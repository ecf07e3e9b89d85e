"""The self-oscillation: its surprise falls, its weights explode, and only resonance shows it."""

import csv
import itertools
from pathlib import Path

import matplotlib.image
import pytest

import narcissus
from stress import oscillation
from stress.oscillation import ARMS, oscillate


@pytest.mark.parametrize("seed", [100, 102])
def test_the_default_brakes_where_a_gate_on_surprise_alone_stays_open(seed: int) -> None:
    plain, surprise, default = (
        oscillate(arm, 16.0, seed, steps=200) for arm in ("sgd", "sgd-surprise", "sgd-default")
    )
    losses = plain.losses
    # A period of two around a mean that falls, while the weights grow.
    swings = [b - a for a, b in itertools.pairwise(losses)]
    assert sum(a * b < 0 for a, b in itertools.pairwise(swings[3:80])) > 60
    assert sum(losses[100:200]) < 0.95 * sum(losses[:100])
    assert plain.norms[-1] > 10 * plain.norms[0]
    assert min(surprise.gates) == 1.0
    assert surprise.norms[-1] > 0.9 * plain.norms[-1]
    assert min(default.gates) < 0.5
    assert default.metrics["braked"] is not None
    assert max(default.norms) < 0.6 * max(plain.norms)
    assert default.metrics["late_loss"] < surprise.metrics["late_loss"] / 1.5  # type: ignore[operator]


def test_below_the_edge_nothing_brakes() -> None:
    plain, default = (oscillate(arm, 0.5, 100, steps=150) for arm in ("sgd", "sgd-default"))
    assert min(default.gates) == 1.0
    assert default.losses == plain.losses


def test_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(oscillation, "RATES", (0.5, 16.0))
    monkeypatch.setattr(oscillation, "STEPS", 40)
    monkeypatch.setattr(oscillation.oscillate, "__defaults__", (40,))
    words = ["--oscillation", "--out", str(tmp_path / "a"), "--seeds", "2", "--first-seed", "7"]
    assert narcissus.main(words) == 0
    printed = capsys.readouterr().out
    with (tmp_path / "a" / "oscillation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["seed"]) for row in rows[:4]] == [
        ("sgd", "7"), ("sgd", "8"), ("sgd-surprise", "7"), ("sgd-surprise", "8"),
    ]  # fmt: skip
    assert len(rows) == 2 * 2 * len(ARMS)
    assert (tmp_path / "a" / "tables.md").read_text() in printed
    assert "| 16 | SGD, default | 2 of 2 |" in printed
    assert matplotlib.image.imread(tmp_path / "a" / "oscillation.png").shape[1] > 1000
