"""Costs of a series, and operations and tokens to a loss, worked out by hand."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from analysis_records import DEMO, entry, two_arms, write

from analysis.costs import CostAnalyzer, Point, Saving, find_savings, reach, trunk_of
from analysis.records import Log, Record, read_metrics


def test_costs_count_growth_and_fisher_and_add_up(tmp_path: Path) -> None:
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


def test_devices_are_those_of_each_record(tmp_path: Path) -> None:
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
    assert json.dumps([asdict(c) for c in costs], allow_nan=False)


def test_a_free_device_has_a_price_of_zero(tmp_path: Path) -> None:
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
def test_unfit_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        CostAnalyzer(**settings)


def test_what_an_arm_adds_to_its_steps_is_told_by_the_plain_model(tmp_path: Path) -> None:
    muon = {**entry("d3-scratch+muon", 2.4), "flops": 4 * 10**9}
    other = entry("d5-scratch+muon", 2.0)
    records = read_metrics([write(tmp_path / "metrics.json", [*two_arms(), muon, other])])
    costs = {c.name: c for c in CostAnalyzer().analyze(records)}
    assert costs["d3-scratch"].overhead_flops == costs["d3-grown"].overhead_flops == 0
    assert costs["d3-scratch+muon"].overhead_flops == 10**9
    assert costs["d5-scratch+muon"].overhead_flops is None


def curve(*points: tuple[float, float, float | None]) -> Log:
    """Rows of (operations, tokens, loss)."""
    return [
        {"step": i, "flops": flops, "tokens": tokens, "val_bpb": bpb, "lr": None}
        for i, (flops, tokens, bpb) in enumerate(points)
    ]


def test_the_first_crossing_is_interpolated_in_log_flops() -> None:
    log = curve((0, 0, 8.0), (1e10, 10, 4.0), (3e10, 30, None), (1e12, 1000, 2.0),
                (1e13, 10_000, 2.5), (1e14, 100_000, 1.0))  # fmt: skip
    assert reach(log, 4.0) == Point(1e10, 10, is_bound=True)
    point = reach(log, 3.0)
    assert point is not None
    assert (point.flops, point.tokens) == pytest.approx((1e11, 100)), "tokens go with operations"
    assert reach(log, 2.0) == Point(pytest.approx(1e12), pytest.approx(1000))
    late = reach(log, 1.25)
    assert late is not None
    assert late.flops == pytest.approx(10**13.8333333, rel=1e-6)
    assert reach(log, 0.9) is None
    assert reach(log, 5.0) == Point(1e10, 10, is_bound=True), "nothing is known before"
    assert reach([], 5.0) is None
    silent = curve((1e9, 1, float("nan")), (1e10, 10, 3.0))
    assert reach(silent, 3.5) == Point(1e10, 10, is_bound=True)
    assert reach(curve((1e10, 10, 4.0), (1e10, 10, 3.0)), 3.5) == Point(1e10, 10), "free growth"


def test_the_trunk_ends_before_the_cooled_branch() -> None:
    # Two steps of warm-up, trunk to step 4, three steps cooled: 1, 2/3, 1/3 of the rate.
    rates = [None, 0.5, 1.0, 1.0, 1.0, 1.0, 2 / 3, 1 / 3]
    log = [{"step": i, "lr": rate} for i, rate in enumerate(rates)]
    assert [row["step"] for row in trunk_of(log)] == [0, 1, 2, 3, 4]
    assert trunk_of([{"step": 0, "lr": None}]) == []


def runs(tmp_path: Path, seeds: int) -> list[Record]:
    return read_metrics([write(tmp_path / f"{i}.json", two_arms(i)) for i in range(seeds)])


def only(records: list[Record], logs: dict[tuple[str, int], Log]) -> Saving:
    (saving,) = find_savings(records, logs)
    return saving


# d3: the lineage has 6e9 operations in either arm; of the grown model's, 3e9 are its own training,
# 1e8 its Fisher pass and 12,000 growing. It has 50,000 tokens of its own and 40,000 inherited ones.
SCRATCH = curve((1e9, 10_000, 5.0), (6e9, 50_000, 3.0))


def test_ratios_with_and_without_parents(tmp_path: Path) -> None:
    logs = {}
    for seed, (reached, tokens) in enumerate(((4.5e9, 70_000), (4.8e9, 72_000))):
        logs["d3-scratch", seed] = SCRATCH
        logs["d3-grown", seed] = curve(
            (3e9, 41_000, 4.0), (reached, tokens, 3.0), (6e9, 90_000, 2.9)
        )
    saving = only(runs(tmp_path, 2), logs)
    assert (saving.arm, saving.depth, saving.seeds, saving.reached) == ("grown", 3, 2, 2)
    ratios = saving.final
    assert ratios is not None
    assert ratios.with_parents.values == pytest.approx((0.75, 0.8))
    parents = 6e9 - 3e9 - 1e8 - 12_000
    assert ratios.without_parents.values == pytest.approx(
        ((4.5e9 - parents) / 6e9, (4.8e9 - parents) / 6e9)
    )
    assert ratios.tokens_with_parents.values == pytest.approx((1.4, 1.44))
    assert ratios.tokens_without_parents.values == pytest.approx((0.6, 0.64))
    interval = ratios.with_parents.interval
    assert interval is not None
    assert interval[1] - interval[0] == pytest.approx(2 * 12.7062 * 0.025, rel=1e-4)
    assert saving.trunk is None, "the logs have no learning rates"
    assert saving.efficiency is None
    assert (saving.ancestors, saving.diverged, ratios.is_bound) == (1, 0, False)


def with_trunk(*rows: tuple[float, float, float]) -> Log:
    """A trunk of these rows, then a cooled branch of one step."""
    log = curve(*rows, (rows[-1][0] * 1.2, rows[-1][1] * 1.2, 1.0))
    for row in log:
        row["lr"] = 1e-3 if row["step"] else None
    return log


def test_trunk_against_trunk_at_the_worse_of_the_two_losses(tmp_path: Path) -> None:
    scratch = with_trunk((0, 0, 8.0), (1e9, 10_000, 5.0), (5e9, 40_000, 3.0))
    better = with_trunk((2.9e9, 40_000, 4.0), (3.5e9, 50_000, 3.0), (5e9, 80_000, 2.5))
    saving = only(runs(tmp_path, 1), {("d3-scratch", 0): scratch, ("d3-grown", 0): better})
    assert saving.trunk is not None
    assert saving.trunk.with_parents.mean == pytest.approx(3.5 / 5)
    assert saving.trunk.tokens_with_parents.mean == pytest.approx(50 / 40)
    # 40,000 fresh tokens did what 10,000 own and 40,000 inherited ones did.
    assert saving.efficiency is not None
    assert saving.efficiency.mean == pytest.approx(30 / 40)

    early = with_trunk((5e8, 5_000, 7.0), (1e9, 10_000, 5.0), (5e9, 40_000, 3.0))
    worse = with_trunk((2.9e9, 40_000, 6.0), (5e9, 80_000, 5.0))
    late = only(runs(tmp_path, 1), {("d3-scratch", 0): scratch, ("d3-grown", 0): worse})
    assert late.trunk is None, "the baseline was there before its first measurement"
    scratch = early
    saving = only(runs(tmp_path, 1), {("d3-scratch", 0): scratch, ("d3-grown", 0): worse})
    assert saving.trunk is not None
    assert saving.trunk.with_parents.mean == pytest.approx(5.0)
    # 10,000 fresh tokens did what 40,000 own and 40,000 inherited ones did.
    assert saving.efficiency is not None
    assert saving.efficiency.mean == pytest.approx(-30 / 40)


def test_a_loss_that_is_not_reached_gives_no_ratio(tmp_path: Path) -> None:
    logs = {("d3-scratch", seed): SCRATCH for seed in (0, 1)}
    logs["d3-grown", 0] = curve((3e9, 41_000, 4.0), (6e9, 90_000, 2.9))
    logs["d3-grown", 1] = curve((3e9, 41_000, 4.0), (6e9, 90_000, 3.1))
    saving = only(runs(tmp_path, 2), logs)
    assert (saving.seeds, saving.reached, saving.final) == (2, 1, None)


PARENTS = 6e9 - 3e9 - 1e8 - 12_000  # operations of d2 when d3 is grown out of it


def test_a_loss_reached_within_the_parents_trunk_is_found_there(tmp_path: Path) -> None:
    logs = {
        ("d3-scratch", 0): with_trunk((5e8, 5_000, 5.0), (5e9, 40_000, 3.0)),
        ("d3-grown", 0): with_trunk((3e9, 40_000, 2.5), (5e9, 80_000, 2.0)),
        # What the parent did after its child was grown is no part of the lineage.
        ("d2-scratch", 0): curve(
            (1e9, 10_000, 4.0), (2e9, 25_000, 2.0), (PARENTS, 40_000, 2.5), (4e9, 50_000, 1.0)
        ),
    }
    logs["d2-scratch", 0][1]["val_bpb"] = 3.0
    saving = only(runs(tmp_path, 1), logs)
    assert saving.trunk is not None
    assert not saving.trunk.is_bound
    assert saving.trunk.with_parents.mean == pytest.approx(2 / 5)
    assert saving.trunk.tokens_with_parents.mean == pytest.approx(25 / 40)
    assert saving.trunk.without_parents.mean == saving.trunk.tokens_without_parents.mean == 0.0
    # 40,000 fresh tokens did what the lineage's first 25,000 did.
    assert saving.efficiency is not None
    assert saving.efficiency.mean == pytest.approx(40 / 25)
    # The baseline's final loss, 1.0, was reached by the child's cooled branch alone.
    assert saving.final is not None
    assert saving.final.with_parents.mean == pytest.approx(1.0)


def test_a_loss_reached_in_an_ancestor_without_a_log_is_a_bound(tmp_path: Path) -> None:
    logs = {
        ("d3-scratch", 0): with_trunk((5e8, 5_000, 5.0), (5e9, 40_000, 3.0)),
        ("d3-grown", 0): with_trunk((3e9, 40_000, 2.5), (5e9, 80_000, 2.0)),
    }
    saving = only(runs(tmp_path, 1), logs)
    assert saving.trunk is not None
    assert saving.trunk.is_bound
    assert saving.trunk.with_parents.mean == pytest.approx(3 / 5)
    assert saving.trunk.without_parents.mean == pytest.approx((1e8 + 12_000) / 5e9)
    assert saving.efficiency is None
    assert saving.final is not None
    assert not saving.final.is_bound, "that was reached later"


def test_a_curve_goes_back_no_further_than_its_logs(tmp_path: Path) -> None:
    # d4 out of d3 out of d2: without d3's log d2's says nothing of what lies between.
    scratch = with_trunk((5e8, 5_000, 9.0), (5e9, 40_000, 3.0))
    logs = {
        ("d4-scratch", 0): scratch,
        ("d4-grown", 0): with_trunk((5e9, 80_000, 2.5), (8e9, 120_000, 2.0)),
        ("d2-scratch", 0): curve((1e9, 10_000, 8.0), (2e9, 25_000, 5.0)),
    }
    (saving,) = find_savings(runs(tmp_path, 1), logs)
    assert saving.ancestors == 2
    assert saving.trunk is not None
    assert saving.trunk.is_bound
    logs["d3-grown", 0] = curve((3e9, 41_000, 4.0), (3.5e9, 60_000, 3.0))
    saving = next(s for s in find_savings(runs(tmp_path, 1), logs) if s.depth == 4)
    assert saving.trunk is not None
    assert not saving.trunk.is_bound
    assert saving.trunk.with_parents.mean == pytest.approx(3.5 / 5)
    assert saving.efficiency is not None
    assert saving.efficiency.mean == pytest.approx(40 / 60)


@pytest.mark.parametrize("name", ["d3-grown", "d3-scratch"])
def test_a_seed_that_diverged_is_not_left_out(tmp_path: Path, name: str) -> None:
    records = runs(tmp_path, 3)
    log = curve((3e9, 41_000, 4.0), (6e9, 90_000, 2.9))
    logs = {("d3-scratch", seed): SCRATCH for seed in range(3)}
    logs |= {("d3-grown", seed): log for seed in range(3)}
    broken = [
        replace(r, val_bpb=float("nan")) if (r.name, r.seed) == (name, 1) else r for r in records
    ]
    saving = only(broken, logs)
    assert (saving.seeds, saving.diverged, saving.reached) == (3, 1, 2)
    assert saving.final is saving.trunk is saving.efficiency is None


def test_without_both_logs_nothing_is_said(tmp_path: Path) -> None:
    records = runs(tmp_path, 1)
    assert find_savings(records, {}) == []
    assert find_savings(records, {("d3-scratch", 0): SCRATCH}) == []
    silent = {("d3-scratch", 0): curve((6e9, 5, None)), ("d3-grown", 0): SCRATCH}
    assert find_savings(records, silent) == []
    again = find_savings(records, {("d3-scratch", 0): SCRATCH, ("d3-grown", 0): SCRATCH})
    assert [s.depth for s in again] == [3]


def test_arms_are_held_against_the_model_from_scratch_alone(tmp_path: Path) -> None:
    more: list[dict[str, Any]] = [entry("d3-scratch+muon", 2.4), entry("d3-scratch+ars", 2.4)]
    records = read_metrics([write(tmp_path / "m.json", [*two_arms(), *more])])
    logs = {(r.name, 0): SCRATCH for r in records if r.depth == 3}
    pairs = {(s.arm, s.baseline) for s in find_savings(records, logs)}
    assert pairs == {(arm, "scratch") for arm in ("grown", "scratch+muon", "scratch+ars")}
    del logs["d3-grown", 0]
    assert "grown" not in {s.arm for s in find_savings(records, logs)}
