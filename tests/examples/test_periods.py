"""The signs of resonance by closed forms, their chance level, and what compares them."""

import csv
import math
from pathlib import Path

import pytest
import torch

import stability
from ars import ARSConfig
from ars.controller import ARSController
from ars.reference import controller as definition
from stress import periods
from stress.periods import Losses, autocorrelations, brakes_at, measured, strengths, thresholds

ROOT = Path(__file__).resolve().parents[2]


def noise(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 50, generator=generator, dtype=torch.float64)


def sine(period: float, steps: int = 50) -> torch.Tensor:
    angle = 2 * math.pi * torch.arange(steps, dtype=torch.float64) / period
    return (angle + 0.4).sin()[None]


def test_the_first_autocorrelation_is_the_controllers() -> None:
    windows = noise(5) + torch.linspace(0, 9, 50, dtype=torch.float64)
    for window, found in zip(windows, autocorrelations(windows), strict=True):
        residuals = definition.trend(window, 50, linear=True)[0]
        rho = definition.autocorrelation(residuals, 50, float(window.abs().amax()))
        assert float(found[0]) == pytest.approx(float(rho), abs=1e-12)


@pytest.mark.parametrize("period", [2, 4, 6, 10])
def test_an_oscillation_has_its_period(period: int) -> None:
    r = autocorrelations(sine(period))[0]
    assert r[period // 2 - 1] < -0.95
    assert r[period - 1] > 0.95
    found, at = strengths(sine(period))
    assert int(at) == period
    assert float(found[0, 2]) == pytest.approx(math.sqrt(50 - period), rel=0.05)
    assert bool(found[0, 0] > thresholds()[0]) == (period == 2)


def test_the_signs_have_about_one_chance_level_and_the_first_is_the_gates() -> None:
    """Removing the line makes r_1 a little negative; docs/stability.md has these shares."""
    found, _ = strengths(noise(20_000))
    shares = (found > thresholds(0.01)).double().mean(0)
    assert shares.tolist() == pytest.approx([0.018, 0.003, 0.023], rel=0.2)
    assert thresholds()[0] == pytest.approx(-brakes_at(ARSConfig()) * math.sqrt(50))


def test_the_gate_closes_where_it_is_said() -> None:
    sign = torch.tensor([(-1.0) ** k for k in range(50)], dtype=torch.float64)
    closed = []
    windows = noise(12) + torch.linspace(1.0, 1.7, 12, dtype=torch.float64)[:, None] * sign
    for window in windows:
        controller = ARSController(ARSConfig())
        closed.append([controller.observe(float(value)).phi for value in window][-1] < 0.9)
    expected = autocorrelations(windows)[:, 0] < brakes_at(ARSConfig())
    assert closed == expected.tolist()
    assert 2 < sum(closed) < 10


def test_alarms_are_counted_by_run_or_by_window() -> None:
    oscillates = sine(6, 60) + 3
    breaks = oscillates.clone()
    breaks[0, 5:] = math.inf
    still = torch.linspace(3, 1, 60, dtype=torch.float64)[None] ** 2  # a fall that is no line
    values = torch.cat((oscillates, breaks, still))
    row = measured(Losses("x", values))
    assert (row["count"], row["alternation"], row["period"], row["usual period"]) == (3, 0, 1, 6.0)
    assert row["peak"] == 2  # it takes the bend of the fall for resonance
    assert row["late / first loss"] == pytest.approx(
        float(oscillates[0, -20:].mean() / oscillates[0, 0]),
        rel=1e-9,  # the middle one
    )
    single = measured(Losses("x", values, single=True))
    assert (single["count"], single["period"]) == (33, 11)
    assert math.isnan(float(single["late / first loss"]))


def test_the_program_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "_WHITE": 100, "_FALLING": 100, "_SINES": 50, "_RUNS": 3, "_STEPS": 60, "_GPT_RUNS": 1,
        "_GPT_STEPS": 52, "_LOST_RUNS": 1,
    }.items():  # fmt: skip
        monkeypatch.setattr(periods, name, value)
    assert stability.main(["--periods", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    with open(tmp_path / "out/periods.csv", newline="") as file:
        rows = {row["losses"]: row for row in csv.DictReader(file)}
    assert rows["ordinary training of a GPT"]["count"] == "3"
    assert int(rows["a sine of period 6"]["period"]) > 40
    assert int(rows["a sine of period 6"]["alternation"]) == 0
    assert rows["quadratic, heavy ball, 0.1 edge"]["count"] == "3"
    assert float(rows["quadratic, heavy ball, 1.02 edge"]["late / first loss"]) > 1e3
    assert float(rows["quadratic, heavy ball, 0.9 edge"]["late / first loss"]) < 10
    assert all(name in said for name in rows)


def test_the_page_has_the_published_table() -> None:
    page = (ROOT / "docs/stability.md").read_text()
    with open(ROOT / "benchmarks/results/ars/periods.csv", newline="") as file:
        for row in csv.DictReader(file):
            cells = [row["losses"], row["count"], *(row[sign] for sign in periods.SIGNS)]
            assert f"| {' | '.join(cells)} |" in page
