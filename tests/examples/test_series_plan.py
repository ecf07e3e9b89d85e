"""What a series trains, where each model begins, and what it costs: counted by hand."""

from dataclasses import replace

import pytest

from common.errors import UsageError
from trainer.series_plan import ModelPlan, learning_rate, plans_of
from trainer.settings import SeriesConfig

TOKENS = 4 * 100  # a step
CONFIG = SeriesConfig(
    arms=("scratch", "grown", "grown+ewc", "grown+ewc+subspace+ars", "grown+distill"),
    depths=(2, "3x8", "3x12"),
    width_per_depth=4,
    steps=(40, 30, 20),
    cooldown=0.1,
    lineage=None,
    shares=(0.2, 0.5),
    batch_size=4,
    sequence_len=100,
    ewc_strength=1.0,
    fisher_samples=6,
)
# Of d2, 3x8 and 3x12 over 10 tokens: 12 L D^2 + 10 D in products, as many and 10 D in all, and
# 6 (12 L D^2 + 10 D) + 12 L D 100 operations a token.
PRODUCTS = {"d2": 1536 + 80, "3x8": 2304 + 80, "3x12": 5184 + 120}
PARAMETERS = {"d2": 1696, "3x8": 2464, "3x12": 5424}
STEP = {"d2": 400 * (9696 + 19200), "3x8": 400 * (14304 + 28800), "3x12": 400 * (31824 + 43200)}


def plans(**changes: object) -> dict[str, ModelPlan]:
    return {p.name: p for p in plans_of(replace(CONFIG, **changes), 10)}  # type: ignore[arg-type]


def test_the_order_and_the_parents() -> None:
    found = plans()
    grown = ("grown", "grown+ewc", "grown+ewc+subspace+ars", "grown+distill")
    assert list(found) == [
        "d2-scratch", "d2-scratch+ars",
        *(f"3x8-{arm}" for arm in ("scratch", *grown)),
        *(f"3x12-{arm}" for arm in ("scratch", *grown)),
    ]  # fmt: skip
    assert found["3x8-grown"].parent == found["3x8-grown+ewc"].parent == "d2-scratch"
    assert found["3x8-grown+ewc+subspace+ars"].parent == "d2-scratch+ars"
    assert found["3x12-grown+ewc"].parent == "3x8-grown+ewc"
    assert {(p.depth, p.model.n_embd, p.model.n_head) for p in found.values()} == {
        (2, 8, 2), (3, 8, 2), (3, 12, 3),
    }  # fmt: skip
    muon = plans(arms=("grown+muon+distill",))
    assert list(muon) == ["d2-scratch+muon", "3x8-grown+muon+distill", "3x12-grown+muon+distill"]


def test_shares_are_of_the_twins_steps_and_contain_the_cooled_branch() -> None:
    found = plans()
    twin, grown = found["3x8-scratch"], found["3x8-grown"]
    assert (twin.share, twin.full_steps, twin.trunk, twin.cooldown) == (1.0, 30, 27, 3)
    assert (grown.share, grown.full_steps, grown.trunk, grown.cooldown) == (0.5, 30, 12, 3)
    assert (twin.warmup, grown.warmup) == (20, 0)
    (branch,) = grown.branch_plans
    assert (branch.name, branch.branch_of) == ("3x8-grown@0.2", "3x8-grown")
    assert (branch.trunk, branch.cooldown, branch.steps) == (3, 3, 6)
    assert (branch.first_sample, branch.prior_flops) == (grown.first_sample, grown.prior_flops)
    assert twin.branch_plans == branch.branch_plans == ()
    curve = plans(scratch_shares=(0.5, 0.75, 1.0))["3x8-scratch"]
    assert curve.branches == ((0.5, 12), (0.75, 19))
    assert curve.steps == 30


def test_a_lineage_reads_so_many_times_the_tokens_of_the_twin() -> None:
    found = plans(arms=("scratch", "grown+ars", "grown+ewc+ars"), steps=(40, 60, 100),
                  lineage=(1.2, 1.5), shares=None)  # fmt: skip
    assert [name for name in found if name.startswith("d2")] == ["d2-scratch", "d2-grown+ars"]
    first, second, third = (found[f"{size}-grown+ars"] for size in ("d2", "3x8", "3x12"))
    assert (first.parent, first.warmup, first.share, first.full_steps) == (None, 20, 1.5, 40)
    assert (first.trunk, first.cooldown, first.branches) == (56, 4, ((1.2, 44),))
    assert (second.parent, second.prior_tokens, second.warmup) == ("d2-grown+ars", 56 * 400, 0)
    assert (second.trunk, second.cooldown) == (90 - 56 - 6, 6)
    assert (second.share, second.branches) == (0.5667, ((0.2667, 72 - 56 - 6),))
    assert (third.trunk, third.cooldown, third.branches) == (56, 10, ((0.36, 26),))
    for plan in (first, second, third):
        assert plan.prior_tokens + plan.steps * 400 == 1.5 * plan.full_steps * 400
    other = found["3x8-grown+ewc+ars"]
    assert (other.parent, other.trunk) == ("d2-grown+ars", second.trunk)
    assert found["3x12-scratch"].steps == 100


def test_what_is_kept_is_where_branches_and_children_begin() -> None:
    found = plans()
    assert found["d2-scratch"].kept == (36,)
    assert found["3x8-grown"].kept == (3, 12)
    assert found["3x12-grown"].kept == (2,)
    assert found["3x12-scratch"].kept == ()
    half = plans(grow_at=0.5)
    assert half["d2-scratch"].kept == (18,)
    assert half["3x8-grown"].kept == (3, 6)
    assert half["3x8-grown"].trunk == 12  # and the model itself goes on


@pytest.mark.parametrize(("grow_at", "left"), [(1.0, (36, 12)), (0.5, (18, 6))])
def test_the_lineage_counts_everything_once(grow_at: float, left: tuple[int, int]) -> None:
    found = plans(grow_at=grow_at)
    first, second, third = (found[n] for n in ("d2-scratch", "3x8-grown+ewc", "3x12-grown+ewc"))
    assert (second.grown_at, third.grown_at) == left
    assert (second.fisher_flops, third.fisher_flops) == (6 * STEP["d2"] / 4, 6 * STEP["3x8"] / 4)
    assert second.growth_flops == 4 * PARAMETERS["3x8"]
    assert first.prior_flops == first.prior_tokens == first.first_sample == 0
    assert second.prior_flops == (left[0] * STEP["d2"] + second.fisher_flops + second.growth_flops)
    assert second.prior_tokens == TOKENS * left[0]
    assert third.prior_flops == second.prior_flops + (
        left[1] * (STEP["3x8"] + 5 * PARAMETERS["3x8"]) + third.fisher_flops + third.growth_flops
    )
    assert third.prior_tokens == TOKENS * sum(left)
    assert third.flops == 10 * (STEP["3x12"] + 5 * PARAMETERS["3x12"])
    assert third.lineage_flops == third.prior_flops + third.flops
    assert found["3x8-grown"].fisher_flops == 0
    assert plans(ewc_strength=0.0)["3x8-grown+ewc"].fisher_flops == 0
    assert plans(arms=("grown+ewc=0",))["3x8-grown+ewc=0"].fisher_flops == 0


def test_what_an_arm_adds_to_a_step_is_counted() -> None:
    found = plans(arms=(*CONFIG.arms, "grown+muon"))
    more = {name: plan.flops_per_step - STEP[plan.size] for name, plan in found.items()}
    assert more["d2-scratch"] == more["3x8-scratch"] == more["3x8-grown"] == 0
    assert more["3x8-grown+ewc"] == 5 * PARAMETERS["3x8"]
    assert more["3x8-grown+ewc+subspace+ars"] == 9 * PARAMETERS["3x8"]
    assert more["3x8-grown+distill"] == STEP["d2"] / 3
    # Per block four matrices of 8 x 8 and two of 8 x 32, m <= n: 5 (4 m^2 n + 2 m^3) each.
    assert more["3x8-grown+muon"] == 3 * 5 * (4 * 6 * 8**3 + 2 * (4 * 64 * 32 + 2 * 8**3))
    assert plans(arms=("grown+ewc=0",))["3x8-grown+ewc=0"].flops_per_step == STEP["3x8"]


def test_the_parents_are_chosen() -> None:
    found = plans(arms=("grown",), depths=(2, 3, 4, 6), steps=(40, 40, 40, 40), parents=(2, 4))
    assert {n: p.parent for n, p in found.items()} == {
        "d2-scratch": None,
        "d3-grown": "d2-scratch",
        "d4-grown": "d2-scratch",
        "d6-grown": "d4-grown",
    }


def test_a_ratio_counts_all_tokens_of_a_model_from_scratch() -> None:
    found = plans(steps=None, ratio=20.0)
    for size, products in PRODUCTS.items():
        assert found[f"{size}-scratch"].steps == round(20 * products / TOKENS)
    assert found["3x8-grown"].full_steps == found["3x8-scratch"].steps


def test_a_child_reads_on_where_its_parents_trunk_was_left_whatever_their_batches() -> None:
    chain = list(plans(
        arms=("grown",), depths=(6, 12, 20), width_per_depth=64, steps=(8, 50, 50), cooldown=0.1,
        batch_size="rule", sequence_len=2**13,
    ).values())  # fmt: skip
    assert [plan.settings.batch_size for plan in chain] == [32, 64, 128]
    assert chain[0].trunk == 7
    assert chain[1].first_sample == 256  # the parent read 224, and its batches are of 64
    read = 256 + 64 * chain[1].trunk
    assert read <= chain[2].first_sample < read + 128
    assert chain[2].first_sample % 128 == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"depths": ("3x8",), "steps": (9,)}, r"--depths 3x8 is one size.* grown asks for growing"),
        (
            {"steps": (40, 4, 40)},
            r"3x8-grown: the 4 steps .* branches of 1 at the shares 0\.2,0\.5",
        ),
        ({"steps": (1, 40, 40)}, r"d2-scratch: the 1 steps of a model from scratch are too few"),
        ({"shares": (0.3, 0.31, 0.5)}, r"3x8-grown: the 30 steps .* or name fewer shares"),
        (
            {"lineage": (1.2, 1.5), "shares": None, "steps": (40, 30, 20)},
            r"3x8-grown: the 30 steps .* 1\.87 and up to --lineage 1\.2,1\.5: name larger numbers",
        ),
    ],
)
def test_series_that_have_no_steps_to_divide(changes: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        plans(**changes)


def test_one_size_is_trained_from_scratch_alone() -> None:
    assert list(plans(depths=("3x8",), steps=(40,), arms=("scratch", "scratch+ars"))) == [
        "3x8-scratch", "3x8-scratch+ars",
    ]  # fmt: skip


def test_the_rate_warms_up_stays_and_cools_to_zero() -> None:
    def rates(shape: str) -> list[float]:
        return [
            learning_rate(s, peak=4.0, warmup=4, trunk=8, cooldown=4, shape=shape)  # type: ignore[arg-type]
            for s in range(14)
        ]

    assert rates("linear") == [1, 2, 3, 4, 4, 4, 4, 4, 4, 3, 2, 1, 0, 0]
    falls = [4, 2, 4 - 8**0.5, 4 - 12**0.5, 0, 0]
    assert rates("1-sqrt") == pytest.approx([1, 2, 3, 4, 4, 4, 4, 4, *falls])
    grown = learning_rate(0, peak=4.0, warmup=0, trunk=8, cooldown=4)
    assert grown == 4.0
