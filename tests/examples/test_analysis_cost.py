"""Costs of measured series and of series on paper."""

import json
from itertools import pairwise

import pytest
from analysis_records import DEMO, entry, two_arms, write

from analysis.cost import PEAK_FLOPS, CostAnalyzer
from analysis.paper import PlannedModel, chain_saving, plan_cost, plan_depths, plan_doubling
from analysis.records import read_metrics
from ars.models import GPT, miniseries_config


def test_costs_count_growth_and_fisher_and_add_up(tmp_path) -> None:
    records = read_metrics([write(tmp_path / "metrics.json", two_arms())])
    analyzer = CostAnalyzer(peak_flops=1e9, price_per_hour=3.6, devices=2)
    costs = {(c.arm, c.name): c for c in analyzer.analyze(records)}
    assert list(costs) == [
        ("scratch", "d2-scratch"), ("scratch", "d3-scratch"), ("scratch", "d4-scratch"),
        ("grown", "d2-scratch"), ("grown", "d3-grown"), ("grown", "d4-grown"),
    ]  # fmt: skip
    grown = costs["grown", "d3-grown"]
    assert grown.growth_flops == 4 * 3000
    assert grown.flops == 3 * 10**9 + 10**8 + 12_000
    assert grown.flops_per_second == grown.flops / 30.0
    assert grown.mfu == pytest.approx(grown.flops / (30.0 * 2 * 1e9))
    assert grown.price == pytest.approx(30.0 / 3600 * 2 * 3.6)
    last = costs["grown", "d4-grown"]
    series = [c for (arm, _), c in costs.items() if arm == "grown"]
    assert last.cumulative_flops == sum(c.flops for c in series)
    assert last.cumulative_seconds == 90.0
    assert last.cumulative_price == pytest.approx(sum(c.price or 0.0 for c in series))
    assert costs["scratch", "d2-scratch"].cumulative_seconds == 20.0


def test_devices_are_those_of_each_record(tmp_path) -> None:
    records = two_arms()
    records[1]["devices"] = 4
    found = read_metrics([write(tmp_path / "metrics.json", records)])
    costs = {c.name: c for c in CostAnalyzer(peak_flops=1e9, price_per_hour=3600).analyze(found)}
    assert (costs["d2-scratch"].devices, costs["d3-grown"].devices) == (1, 4)
    assert costs["d3-grown"].mfu == pytest.approx(costs["d3-grown"].flops / (30.0 * 4 * 1e9))
    assert costs["d2-scratch"].price == pytest.approx(20.0)
    assert costs["d3-grown"].cumulative_price == pytest.approx(20.0 + 4 * 30.0)
    costs = {c.name: c for c in CostAnalyzer(price_per_hour=3600, devices=2).analyze(found)}
    assert costs["d3-grown"].cumulative_price == pytest.approx(2 * 50.0)


def test_what_is_not_given_is_not_invented() -> None:
    costs = CostAnalyzer().analyze(read_metrics([DEMO]))
    assert {(c.mfu, c.price, c.cumulative_price) for c in costs} == {(None, None, None)}
    assert json.dumps([c.to_dict() for c in costs], allow_nan=False)


def test_a_free_device_has_a_price_of_zero(tmp_path) -> None:
    record = {**two_arms()[0], "seconds": 0}
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
def test_unfit_settings_are_refused(settings) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        CostAnalyzer(**settings)


def test_the_first_nanochat_miniseries_on_paper() -> None:
    plan = plan_depths()
    assert [model.name for model in plan] == [f"d{depth}" for depth in range(10, 21)]
    millions = [91.1, 111.6, 135.3, 162.5, 193.6, 228.8, 268.4, 312.8, 362.2, 416.8, 477.1]
    assert [round(model.params / 1e6, 1) for model in plan] == millions
    assert [round(m.tokens / 1e9, 2) for m in plan][::5] == [0.73, 1.83, 3.82]
    assert plan[-1].flops == pytest.approx(1.24e19, rel=5e-3)
    cost = plan_cost(plan, peak_flops=PEAK_FLOPS["h100"], devices=8, mfu=0.4, price_per_hour=3.0)
    assert f"{cost['flops']:.3g}" == "4.64e+19"
    assert cost["hours"] == pytest.approx(4.07, abs=0.01)
    assert 90 < cost["price"] < 110
    assert cost["models"][-1]["cumulative_flops"] == sum(m["flops"] for m in cost["models"])
    assert cost["price"] == pytest.approx(sum(m["price"] for m in cost["models"]))


def test_the_plan_counts_as_the_model_does() -> None:
    for depth in (1, 3):
        config = miniseries_config(depth, vocab_size=300, sequence_len=64)
        model = GPT(config)
        (planned,) = plan_depths([depth], ratio=1.0, vocab_size=300, sequence_len=64)
        assert planned.params == model.num_parameters() == planned.tokens
        assert planned.scaling_params == model.num_scaling_parameters()
        assert planned.flops == planned.tokens * model.flops_per_token()
        (scaling,) = plan_depths([depth], ratio=2.0, count="scaling", vocab_size=300)
        assert scaling.tokens == 2 * model.num_scaling_parameters()


def test_the_doubling_series() -> None:
    plan = plan_doubling()
    assert len(plan) == 11
    assert (plan[0].params, plan[-1].params) == (7_000_000, 7_168_000_000)
    assert (plan[0].name, plan[-1].name) == ("7.0M", "7.2B")
    assert all(b.params == 2 * a.params for a, b in pairwise(plan))
    assert plan[3].tokens == 20 * plan[3].params
    assert plan[3].flops == 6 * plan[3].params * plan[3].tokens


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: plan_depths([0]), "depth"),
        (lambda: plan_depths(ratio=0.0), "ratio"),
        (lambda: plan_depths(count="most"), "count"),
        (lambda: plan_doubling(models=0), "models"),
        (lambda: plan_cost(plan_depths(), mfu=1.5), "mfu"),
        (lambda: plan_cost(plan_depths(), devices=0), "devices"),
    ],
)
def test_unfit_plans_are_refused(call, name) -> None:
    with pytest.raises(ValueError, match=name):
        call()


def test_what_an_arm_adds_to_its_steps_is_told_by_the_plain_model(tmp_path) -> None:
    muon = {**entry("d3-scratch+muon", 2.4), "flops": 4 * 10**9}
    other = entry("d5-scratch+muon", 2.0)
    records = read_metrics([write(tmp_path / "metrics.json", [*two_arms(), muon, other])])
    costs = {c.name: c for c in CostAnalyzer().analyze(records)}
    assert costs["d3-scratch"].overhead_flops == costs["d3-grown"].overhead_flops == 0
    assert costs["d3-scratch+muon"].overhead_flops == 10**9
    assert costs["d5-scratch+muon"].overhead_flops is None


def test_the_ladder_of_the_transfer_efficiency() -> None:
    assert [round(100 * chain_saving(e)) for e in (0, 0.25, 0.5, 0.75, 1)] == [0, 17, 34, 51, 68]
    assert 0.6 / chain_saving(1.0) == pytest.approx(0.88, abs=0.005)
    # Two models of 10 and 20 tokens at 1 and 2 operations: 8 of the second's trunk are inherited.
    plan = [PlannedModel("a", 1, 1, 10, 10), PlannedModel("b", 2, 2, 20, 40)]
    assert chain_saving(0.5, plan) == pytest.approx(0.5 * 8 * 2 / 50)
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="efficiency"):
            chain_saving(bad)
