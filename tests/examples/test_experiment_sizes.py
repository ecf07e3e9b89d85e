"""The largest model's operations, spent on models of other sizes."""

import json
from dataclasses import asdict, replace

import pytest

from analysis.records import Record
from experiment.experiment_design import SIZES, jobs_of
from experiment.findings import find_sizes, sentence_of


def record(depth: int, arm: str, bpb: float, seed: int, tokens: int = 100) -> Record:
    return Record(
        name=f"d{depth}-{arm}", depth=depth, arm=arm, parent=None, params=1, tokens=tokens,
        lineage_tokens=tokens, flops=1000, fisher_flops=0, growth_flops=0, lineage_flops=1000,
        seconds=1.0, val_bpb=bpb, seed=seed,
    )  # fmt: skip


ARMS = [
    record(3, arm, bpb + seed / 10, seed)
    for seed in (0, 1, 2)
    for arm, bpb in (("scratch", 2.6), ("grown", 2.25), ("grown+ars", 9.0), ("scratch+muon", 1.0))
] + [record(2, "scratch", 2.9, 0), record(2, "grown", 2.7, 0)]


def test_each_size_is_paired_with_the_largest_that_is_grown() -> None:
    alone = [record(2, "scratch", 2.5 + seed / 10, seed, tokens=300) for seed in (0, 1, 2)]
    small, large = find_sizes(alone, ARMS)
    assert (small.depth, large.depth) == (2, 3)
    assert small.bits.values == pytest.approx((2.5, 2.6, 2.7))
    assert large.bits.values == pytest.approx((2.6, 2.7, 2.8))
    assert small.grown is not None
    assert large.grown is not None
    assert small.grown.values == pytest.approx((-0.25,) * 3)
    assert large.grown.values == pytest.approx((-0.35,) * 3)
    assert (small.tokens, large.tokens) == (300, 100)


def test_the_best_size_is_named_with_what_growing_makes_of_it() -> None:
    alone = [record(2, "scratch", 2.0 + seed / 10, seed) for seed in (0, 1, 2)]
    rows = find_sizes(alone, ARMS)
    assert sentence_of(rows) == (
        "What is the best size for the operations of d3? d2 from scratch ends at 2.1000 bits per "
        "byte, d3 grown +0.2500 ± 0.0000 from there: grown is worse."
    )
    worse = find_sizes([record(2, "scratch", 5.0, 0)], ARMS)
    assert "d3 from scratch ends at 2.7000" in sentence_of(worse)
    assert sentence_of(worse).endswith("-0.3500 ± 0.0000 from there: grown is better.")
    one = find_sizes([record(2, "scratch", 1.0, 0)], ARMS)
    assert sentence_of(one).endswith("d3 grown +1.2500 from there: no difference shown.")
    alone = find_sizes([record(2, "scratch", 1.0, 7)], ARMS)
    assert sentence_of(alone).endswith("d2 from scratch ends at 1.0000 bits per byte.")


def test_what_diverged_or_has_no_partner_is_not_paired() -> None:
    alone = [record(2, "scratch", float("nan"), 0), record(2, "scratch", 2.5, 7)]
    small = find_sizes(alone, ARMS)[0]
    assert small.bits.values == (2.5,)
    assert small.grown is None
    assert find_sizes([], ARMS) == []
    assert find_sizes(alone, [])[0].grown is None


def test_a_grown_model_that_diverged_is_not_better() -> None:
    alone = [record(2, "scratch", 2.0 + seed / 10, seed) for seed in (0, 1, 2)]
    for lost in (float("nan"), float("inf")):
        arms = [replace(r, val_bpb=lost) if (r.arm, r.seed) == ("grown", 1) else r for r in ARMS]
        rows = find_sizes(alone, arms)
        assert rows[0].grown is not None
        assert rows[0].grown.values == pytest.approx((0.25, 0.25))
        assert sentence_of(rows).endswith("bits per byte, and d3 grown diverged in some seed.")
        json.dumps([asdict(row) for row in rows], allow_nan=False)


def test_a_size_that_diverges_is_not_the_best() -> None:
    alone = [record(2, "scratch", bpb, seed) for seed, bpb in enumerate((1.0, 1.0, float("nan")))]
    rows = find_sizes(alone, ARMS)
    assert rows[0].diverged == 1
    assert "d3 from scratch ends at 2.7000" in sentence_of(rows)
    all_of_them = sentence_of(find_sizes(alone, [r for r in ARMS if r.arm != "scratch"]))
    assert "ends at 1.0000 bits per byte where it does not diverge, as in 1 of 3" in all_of_them


@pytest.mark.parametrize("size", sorted(SIZES))
def test_each_has_the_operations_of_the_largest_from_scratch(size: str) -> None:
    arms, jobs = jobs_of("arms", size), jobs_of("sizes", size)
    whole = [plan for plan in arms[0].plans if plan.arm.name == "scratch"][-1]
    assert whole.depth == SIZES[size].depths[-1]
    flops = whole.steps * whole.flops_per_step
    for job in jobs[: len(SIZES[size].depths) - 1]:
        (plan,) = job.plans
        # Trunk and branch are whole steps each.
        assert abs(plan.steps - flops / plan.flops_per_step) <= 2
    seeds = {job.config.seed for job in arms}
    assert [(job.config.depths, job.config.seed) for job in jobs] == [
        ((depth,), seed) for seed in sorted(seeds) for depth in SIZES[size].depths[:-1]
    ]
    assert all(job.config.arms == ("scratch",) for job in jobs)
