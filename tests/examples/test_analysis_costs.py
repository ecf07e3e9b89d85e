"""Costs of a series, model by model, worked out by hand."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from analysis_records import DEMO, grown_series, trained, write

from analysis.costs import CostAnalyzer
from analysis.records import read_metrics


def test_costs_count_growth_and_fisher_and_add_up(tmp_path: Path) -> None:
    records = read_metrics([write(tmp_path / "metrics.json", grown_series(fisher=10**6))])
    analyzer = CostAnalyzer(peak_flops=1e9, price_per_hour=3.6, devices=2)
    costs = {(c.arm, c.name): c for c in analyzer.analyze(records)}
    assert list(costs) == [
        ("scratch", "d2-scratch"), ("scratch", "d4-scratch"), ("scratch", "d6-scratch"),
        ("grown", "d2-scratch"), ("grown", "d4-grown"), ("grown", "d6-grown"),
    ]  # fmt: skip
    grown = costs["grown", "d4-grown"]
    assert grown.growth_flops == 4 * 8000
    assert grown.training_flops == 40 * 6 * 4000 * 400
    assert grown.flops == grown.training_flops + 32_000 + 10**6
    # As a single model it pays for d2's trunk too, of 90 steps.
    assert grown.lineage_flops == grown.flops + 90 * 6 * 2000 * 200
    assert grown.flops_per_second == pytest.approx(grown.flops / 6.4)
    assert grown.mfu == pytest.approx(grown.flops / (6.4 * 2 * 1e9))
    assert grown.price == pytest.approx(6.4 / 3600 * 2 * 3.6)
    last = costs["grown", "d6-grown"]
    series = [c for (arm, _), c in costs.items() if arm == "grown"]
    assert last.cumulative_flops == sum(c.flops for c in series)
    assert last.cumulative_seconds == pytest.approx(4.0 + 6.4 + 14.4)
    assert last.cumulative_price == pytest.approx(sum(c.price or 0.0 for c in series))
    assert costs["scratch", "d2-scratch"].cumulative_seconds == 4.0


def test_devices_are_those_of_each_record(tmp_path: Path) -> None:
    records = grown_series()
    records[1]["devices"] = 4
    found = read_metrics([write(tmp_path / "metrics.json", records)])
    costs = {c.name: c for c in CostAnalyzer(peak_flops=1e9, price_per_hour=3600).analyze(found)}
    assert (costs["d2-scratch"].devices, costs["d4-grown"].devices) == (1, 4)
    assert costs["d4-grown"].mfu == pytest.approx(costs["d4-grown"].flops / (6.4 * 4 * 1e9))
    assert costs["d2-scratch"].price == pytest.approx(4.0)
    assert costs["d4-grown"].cumulative_price == pytest.approx(4.0 + 4 * 6.4)
    costs = {c.name: c for c in CostAnalyzer(price_per_hour=3600, devices=2).analyze(found)}
    assert costs["d4-grown"].cumulative_price == pytest.approx(2 * 10.4)


def test_what_is_not_given_is_not_invented() -> None:
    costs = CostAnalyzer().analyze(read_metrics([DEMO]))
    assert {(c.mfu, c.price, c.cumulative_price) for c in costs} == {(None, None, None)}
    assert json.dumps([asdict(c) for c in costs], allow_nan=False)


def test_a_free_device_has_a_price_of_zero(tmp_path: Path) -> None:
    record = {**grown_series()[0], "seconds": 0}
    records = read_metrics([write(tmp_path / "metrics.json", [record])])
    (cost,) = CostAnalyzer(peak_flops=1e12, price_per_hour=0.0).analyze(records)
    assert (cost.price, cost.mfu, cost.flops_per_second) == (0.0, None, None)


def test_an_impossible_utilisation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"d2-scratch did .* times the operations"):
        CostAnalyzer(peak_flops=1e9).analyze(read_metrics([DEMO]))


@pytest.mark.parametrize(
    "settings",
    [{"peak_flops": 0.0}, {"devices": 0}, {"price_per_hour": -1.0}, {"peak_flops": float("inf")}],
)
def test_unfit_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        CostAnalyzer(**settings)


def test_what_an_arm_adds_to_its_steps_is_told_by_the_plain_model(tmp_path: Path) -> None:
    muon, other = (trained(f"{s}-scratch+muon", 2.4, extra=10**7) for s in ("d4", "d5"))
    records = read_metrics([write(tmp_path / "metrics.json", [*grown_series(), muon, other])])
    costs = {c.name: c for c in CostAnalyzer().analyze(records)}
    assert costs["d4-scratch"].overhead_flops == costs["d4-grown"].overhead_flops == 0
    assert costs["d4-scratch+muon"].overhead_flops == 100 * 10**7
    assert costs["d5-scratch+muon"].overhead_flops is None
