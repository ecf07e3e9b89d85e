"""The runs of the experiment: nothing is missing, doubled or given more than what it is held to."""

import math

import pytest

from experiment.experiment_design import SIZES, STAGES, jobs_of

ARMS = (
    "scratch", "scratch+muon", "grown", "grown+ewc=1", "grown+ewc=1+subspace=0.1",
    "grown+distill=0.03",
)  # fmt: skip
FULL = ("cpu", "gpu")


@pytest.mark.parametrize("size", sorted(SIZES))
def test_every_series_has_a_folder_and_settings_of_its_own(size: str) -> None:
    jobs = [job for stage in STAGES for job in jobs_of(stage, size)]
    for stage in STAGES:
        assert all(job.name.startswith(f"{stage}/") for job in jobs_of(stage, size))
    assert len({job.name for job in jobs}) == len({job.config for job in jobs}) == len(jobs)
    assert {job.machine.device for job in jobs} == {"cuda" if size == "gpu" else "cpu"}


@pytest.mark.parametrize("size", FULL)
def test_the_arms_are_complete_on_every_seed(size: str) -> None:
    for seed in (0, 1, 2):
        plain, controlled = (job for job in jobs_of("arms", size) if job.config.seed == seed)
        assert sorted(plain.config.arms) == sorted(ARMS)
        assert sorted(controlled.config.arms) == sorted(f"{arm}+ars" for arm in ARMS)
    assert len(jobs_of("arms", size)) == 2 * 3


@pytest.mark.parametrize("size", FULL)
def test_all_arms_have_the_budget_of_the_model_from_scratch(size: str) -> None:
    plans = [plan for job in jobs_of("arms", size)[:2] for plan in job.plans]
    for depth in SIZES[size].depths:
        costs = {plan.arm.name: plan.lineage_flops for plan in plans if plan.depth == depth}
        assert min(costs.values()) > 0.99 * max(costs.values())
        # Whole steps: rounded up from scratch and down where it is grown.
        grown = [cost for name, cost in costs.items() if name.startswith("grown")]
        assert all(cost <= costs["scratch"] for cost in grown)


@pytest.mark.parametrize("size", FULL)
def test_what_is_tuned_has_the_budget_that_it_has_in_the_comparison(size: str) -> None:
    compared = {p.name: p for p in jobs_of("arms", size)[0].plans}
    *alone, distilled = jobs_of("tune", size)
    for job in alone:
        (plan,) = job.plans
        assert plan.depth == SIZES[size].depths[-1]
        assert plan.trunk == pytest.approx(compared[plan.name].trunk, rel=0.02)
    assert {plan.depth for plan in distilled.plans} == {*SIZES[size].depths[:2]}


@pytest.mark.parametrize("size", FULL)
def test_the_rates_that_are_used_lie_inside_those_tried(size: str) -> None:
    base = SIZES[size]
    jobs = jobs_of("tune", size)
    for arm, setting in (("scratch", "lr"), ("scratch+muon", "muon_lr"),
                         ("scratch+muon", "muon_adamw_lr")):  # fmt: skip
        tried = {getattr(job.config, setting) for job in jobs if job.config.arms == (arm,)}
        assert min(tried) < getattr(base, setting) < max(tried)
        assert getattr(base, setting) in tried


@pytest.mark.parametrize("size", FULL)
def test_the_grid_holds_the_pairs_and_plain_growing_on_every_seed(size: str) -> None:
    jobs = jobs_of("grid", size)
    for seed in (100, 101, 102):
        own = [job for job in jobs if job.config.seed == seed]
        arms = [arm for job in own for arm in job.config.arms]
        assert len(arms) == len(set(arms)) == math.prod((5, 4))
        assert arms.count("grown") == 1
        for ewc, subspace in ((0.5, 0.05), (1, 0.1), (2, 0.2)):
            assert f"grown+ewc={ewc}+subspace={subspace}" in arms
            assert f"grown+ewc={ewc}" in arms
            assert f"grown+subspace={subspace}" in arms
    assert {job.config.seed for job in jobs} == {100, 101, 102}
    assert {job.config.depths for job in jobs} == {SIZES[size].depths[:2]}


@pytest.mark.parametrize("size", FULL)
def test_nothing_is_chosen_on_the_seeds_of_the_comparison(size: str) -> None:
    chosen = {job.config.seed for stage in ("tune", "grid") for job in jobs_of(stage, size)}
    assert chosen.isdisjoint(job.config.seed for job in jobs_of("arms", size))
