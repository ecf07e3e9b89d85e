"""What a series trains, what each model may cost, and how steps are divided."""

from dataclasses import replace

import pytest

from common.errors import UsageError
from trainer.arms import Shape, step_overhead
from trainer.series_plan import ModelPlan, cooldown_steps, learning_rate, plan_series, split_steps
from trainer.settings import SeriesConfig

CONFIG = SeriesConfig(
    arms=("scratch", "grown", "grown+ewc", "grown+ewc+subspace+ars", "grown+distill"),
    depths=(2, 3, 5),
    steps=(40, 30, 20),
    batch_size=4,
    sequence_len=100,
    ewc_strength=1.0,
    fisher_samples=6,
)


def shape(depth: int) -> Shape:
    params = 12 * depth**3
    return Shape(params, params - depth, 700 * depth**3, ((depth, 4 * depth),))


def plans(**changes: object) -> dict[str, ModelPlan]:
    return {p.name: p for p in plan_series(replace(CONFIG, **changes), shape)}  # type: ignore[arg-type]


def test_the_order_and_the_arms() -> None:
    found = plans()
    assert list(found) == [
        "d2-scratch", "d2-scratch+ars",
        "d3-scratch", "d3-grown", "d3-grown+ewc", "d3-grown+ewc+subspace+ars", "d3-grown+distill",
        "d5-scratch", "d5-grown", "d5-grown+ewc", "d5-grown+ewc+subspace+ars", "d5-grown+distill",
    ]  # fmt: skip
    assert found["d3-grown"].parent == found["d3-grown+ewc"].parent == "d2-scratch"
    assert found["d3-grown+ewc+subspace+ars"].parent == "d2-scratch+ars"
    assert found["d5-grown+ewc"].parent == "d3-grown+ewc"
    with_children = {name for name, plan in found.items() if plan.has_child}
    assert with_children == {
        "d2-scratch", "d2-scratch+ars",
        "d3-grown", "d3-grown+ewc", "d3-grown+ewc+subspace+ars", "d3-grown+distill",
    }  # fmt: skip
    assert found["d3-grown"].first_sample == 4 * 40
    assert found["d5-grown"].first_sample == 4 * (40 + found["d3-grown"].trunk)
    assert found["d5-grown"].prior_tokens == 100 * found["d5-grown"].first_sample
    assert {p.warmup for p in found.values() if p.arm.grown} == {0}
    assert found["d3-scratch"].warmup == 20


def test_one_depth_is_trained_from_scratch_alone() -> None:
    assert list(plans(depths=(3,), steps=(40,), arms=("scratch", "scratch+ars"))) == [
        "d3-scratch", "d3-scratch+ars",
    ]  # fmt: skip
    with pytest.raises(UsageError, match=r"--depths 3 is one depth.* grown\+ewc asks for growing"):
        plans(depths=(3,), steps=(40,), arms=("scratch", "grown+ewc"))


@pytest.mark.parametrize("steps", [(40, 30, 20), (3, 5, 4), (997, 30, 411)])
def test_every_arm_has_the_budget_of_the_plain_chain(steps: tuple[int, ...]) -> None:
    found = plans(steps=steps)
    tokens = 400
    step = {d: shape(d).flops_per_token * tokens for d in (2, 3, 5)}
    cooled = {d: max(1, round(n / 4)) for d, n in zip((2, 3, 5), steps, strict=True)}
    budget = {
        2: (steps[0] + cooled[2]) * step[2],
        3: steps[0] * step[2] + (steps[1] + cooled[3]) * step[3],
        5: steps[0] * step[2] + steps[1] * step[3] + (steps[2] + cooled[5]) * step[5],
    }
    for plan in found.values():
        left = budget[plan.depth] - plan.lineage_flops
        if plan.parent is None:
            assert -plan.flops_per_step < left <= 0, plan.name
        else:
            assert 0 <= left < plan.flops_per_step, plan.name


def test_the_lineage_counts_everything_once() -> None:
    found = plans()
    d2, d3, d5 = (found[n] for n in ("d2-scratch", "d3-grown+ewc", "d5-grown+ewc"))
    fisher = {d: shape(d).flops_per_token * 100 * 6 for d in (2, 3)}
    assert (d3.fisher_flops, d5.fisher_flops) == (fisher[2], fisher[3])
    assert d3.growth_flops == 4 * shape(3).params
    assert d3.prior_flops == 40 * d2.flops_per_step + fisher[2] + d3.growth_flops
    assert d5.prior_flops == (
        d3.prior_flops + d3.trunk * d3.flops_per_step + fisher[3] + d5.growth_flops
    )
    assert d5.lineage_flops == d5.prior_flops + d5.steps * d5.flops_per_step
    assert found["d3-grown"].fisher_flops == 0
    assert plans(ewc_strength=0.0)["d3-grown+ewc"].fisher_flops == 0
    assert plans(arms=("grown+ewc=0",))["d3-grown+ewc=0"].fisher_flops == 0


def test_what_an_arm_adds_to_a_step_is_counted() -> None:
    found = plans(arms=(*CONFIG.arms, "scratch+muon"))
    plain = found["d3-grown"].flops_per_step
    assert plain == shape(3).flops_per_token * 400
    assert found["d3-grown+ewc"].flops_per_step - plain == 5 * shape(3).params
    assert found["d3-grown+ewc+subspace+ars"].flops_per_step - plain == 9 * shape(3).params
    teacher = found["d3-grown+distill"].flops_per_step - plain
    assert teacher == shape(2).flops_per_token * 400 // 3
    assert found["d3-scratch+muon"].flops_per_step - plain == 5 * (4 * 9 * 12 + 2 * 27)
    few = {"batch_size": 1, "sequence_len": 8, "steps": (400, 400, 400)}
    muon = plans(arms=("scratch+muon", "grown"), **few)
    assert muon["d2-scratch+muon"].steps < muon["d2-scratch"].steps
    assert step_overhead(found["d3-scratch"].arm, shape(3), None, 400, 1.0) == 0
    none = plans(arms=("grown", "grown+ewc=0"))  # its penalty is not built
    assert none["d3-grown+ewc=0"].flops_per_step == plain
    assert none["d3-grown+ewc=0"].steps == none["d3-grown"].steps
    assert plans(arms=("grown+ewc",), ewc_strength=0.0)["d3-grown+ewc"].flops_per_step == plain


def test_the_parents_are_chosen() -> None:
    found = plans(arms=("grown",), depths=(2, 3, 4, 6), steps=(9, 9, 9, 9), parents=(2, 4))
    assert {n: p.parent for n, p in found.items()} == {
        "d2-scratch": None,
        "d3-grown": "d2-scratch",
        "d4-grown": "d2-scratch",
        "d6-grown": "d4-grown",
    }
    assert [p.name for p in found.values() if p.has_child] == ["d2-scratch", "d4-grown"]


def test_a_ratio_counts_all_tokens_of_a_model() -> None:
    found = plans(arms=("grown",), steps=None, ratio=200.0)
    for depth in (2, 3, 5):
        plan = found[f"d{depth}-scratch" if depth == 2 else f"d{depth}-grown"]
        expected = 200.0 * shape(depth).scaling_params / 400
        overhead = plan.growth_flops / plan.flops_per_step
        assert abs(plan.steps + overhead - expected) <= 1.5
        assert abs(plan.cooldown - plan.trunk / 4) <= 1


def test_a_fisher_pass_beyond_the_budget_is_refused() -> None:
    with pytest.raises(UsageError, match=r"d3-grown\+ewc cost as much.*--fisher-samples"):
        plans(fisher_samples=10_000)


def test_without_a_grown_arm_each_depth_has_its_own_budget() -> None:
    found = plans(arms=("scratch", "scratch+muon"))
    for depth, steps in zip((2, 3, 5), (50, 38, 25), strict=True):
        assert found[f"d{depth}-scratch"].steps == steps
        more = found[f"d{depth}-scratch+muon"].flops - found[f"d{depth}-scratch"].flops
        assert 0 <= more < found[f"d{depth}-scratch+muon"].flops_per_step
    by_ratio = plans(arms=("scratch",), steps=None, ratio=200.0)
    for depth in (2, 3, 5):
        tokens = by_ratio[f"d{depth}-scratch"].steps * 400
        assert abs(tokens - 200.0 * shape(depth).scaling_params) <= 200


def test_a_child_reads_on_where_its_parent_stopped_whatever_their_batches() -> None:
    found = plans(
        arms=("grown",), depths=(6, 12, 20), steps=(7, 5, 3), batch_size="rule", sequence_len=2**13
    )
    chain = list(found.values())
    assert [plan.settings.batch_size for plan in chain] == [32, 64, 128]
    assert chain[1].first_sample == 256  # the parent read 224, and its batches are of 64
    read = 256 + 64 * chain[1].trunk
    assert read <= chain[2].first_sample < read + 128
    assert chain[2].first_sample % 128 == 0
    assert chain[2].parent_depth == 12


def test_the_rate_warms_up_stays_and_cools_linearly_to_zero() -> None:
    def rate(step: int) -> float:
        return learning_rate(step, peak=3.0, warmup=3, trunk=8, cooldown=4)

    assert [rate(s) for s in range(13)] == [1, 2, 3, 3, 3, 3, 3, 3, 3, 2.25, 1.5, 0.75, 0]


def test_a_grown_model_has_no_warm_up() -> None:
    assert learning_rate(0, peak=3.0, warmup=0, trunk=8, cooldown=4) == 3.0


@pytest.mark.parametrize("total", range(2, 400, 7))
def test_a_total_is_divided_without_loss(total: int) -> None:
    trunk, cooldown = split_steps(total, 0.25)
    assert trunk + cooldown == total
    assert trunk >= 1
    assert cooldown >= 1
    assert abs(cooldown - 0.25 * trunk) <= 1.25


def test_a_branch_has_at_least_one_step() -> None:
    assert cooldown_steps(1, 0.25) == 1
    assert cooldown_steps(200, 0.25) == 50
