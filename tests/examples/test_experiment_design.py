"""The runs of the experiment on what growing saves."""

from dataclasses import replace
from itertools import pairwise

import pytest

from experiment.series_design import DESIGNS, STAGES, Design, Job, jobs_of
from trainer.series_plan import plans_of, shape_of


def all_jobs(design: Design) -> list[Job]:
    return [job for stage in STAGES for job in jobs_of(stage, design)]


@pytest.mark.parametrize("name", DESIGNS)
def test_every_run_has_a_name_of_its_own_and_makes_a_series(name: str) -> None:
    jobs = all_jobs(DESIGNS[name])
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        assert plans_of(job.config, 256)


def test_runs_of_two_designs_with_one_name_are_the_same() -> None:
    half = {job.name: job.config for job in all_jobs(DESIGNS["half"])}
    for job in all_jobs(DESIGNS["miniature"]):
        assert half.get(job.name, job.config) == job.config, job.name


def test_a_chain_and_its_twins_differ_by_growing_and_the_cooldown_alone() -> None:
    design = DESIGNS["half"]
    for seed in design.seeds:
        chain, *twins = (
            job.config for job in jobs_of("miniature", design) if f"seed-{seed}" in job.name
        )
        assert chain.arms == ("grown",)
        assert {size for twin in twins for size in twin.depths} == set(chain.depths)
        assert chain.lineage == design.lineage
        for twin in twins:
            scratch = {"arms": twin.arms, "depths": twin.depths}
            cooled = {"cooldown": twin.cooldown, "scratch_shares": twin.scratch_shares}
            assert twin == replace(chain, **scratch, **cooled)
    assert {job.config.seed for job in jobs_of("miniature", design)} == set(design.seeds)


def test_rates_with_muon_fall_with_the_size_more_in_the_chain_than_between_twins() -> None:
    chain, *twins = (job.config for job in jobs_of("muon", DESIGNS["half"]))
    of_chain = {plan.size: plan.settings for plan in plans_of(chain, 256)}
    params = {p.size: shape_of(p.model).scaling_params for p in plans_of(chain, 256)}
    twins = [twin for twin in twins if twin.seed == chain.seed and twin.arms != chain.arms]
    assert [twin.depths for twin in twins] == [(size,) for size in reversed(chain.depths)]
    for twin in twins:
        (plan,) = plans_of(twin, 256)
        growth = params[plan.size] / params[chain.depths[0]]
        for name, rate in (("muon_lr", 0.01), ("muon_adamw_lr", 0.006)):
            twins_rate = getattr(plan.settings, name)
            assert twins_rate == pytest.approx(rate * growth**-0.6, rel=0.005)
            assert getattr(of_chain[plan.size], name) == pytest.approx(rate / growth)


def test_seeds_of_tuning_and_search_are_not_reported() -> None:
    for design in DESIGNS.values():
        for stage in ("twin", "search"):
            seeds = {job.config.seed for job in jobs_of(stage, design)}
            assert not seeds & {*design.seeds, *design.muon_seeds}


def test_the_sizes_of_the_miniature_have_the_ratios_of_the_real_series() -> None:
    plans = plans_of(DESIGNS["miniature"].base, 256)
    sizes = [12 * p.model.n_layer * p.model.n_embd**2 + 256 * p.model.n_embd for p in plans]
    assert len(sizes) == 11
    assert sizes[-1] / sizes[0] == pytest.approx(8, rel=0.01)
    growth = [b / a for a, b in pairwise(sizes)]
    assert 1.1 < min(growth) < max(growth) < 1.4
