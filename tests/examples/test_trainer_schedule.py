"""Learning rates, and the equal-FLOPs plan of a series."""

from dataclasses import replace

import pytest

from trainer.config import SeriesConfig
from trainer.plan import INHERITED, SCRATCH, plan_series
from trainer.schedule import cooldown_steps, learning_rate, split_steps

CONFIG = SeriesConfig(
    depths=(2, 3, 5),
    steps=(40, 30, 20),
    batch_size=4,
    sequence_len=10,
    lr=1e-3,
    ewc_strength=1.0,
    fisher_samples=6,
    ars="default",
    seed=0,
    device="cpu",
)


def flops(depth: int) -> int:
    return 7 * depth**3


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


def test_the_order_and_the_arms() -> None:
    plans = plan_series(CONFIG, flops)
    assert [p.name for p in plans] == [
        "d2-scratch", "d3-inherited", "d3-scratch", "d5-inherited", "d5-scratch",
    ]  # fmt: skip
    assert [p.parent for p in plans] == [None, "d2-scratch", None, "d3-inherited", None]
    assert [p.has_child for p in plans] == [True, True, False, False, False]
    assert [p.warmup for p in plans] == [20, 0, 20, 0, 20]
    assert [p.first_batch for p in plans] == [0, 40, 0, 70, 0]


def test_the_lineage_counts_trunks_fisher_passes_and_one_branch() -> None:
    by_name = {p.name: p for p in plan_series(CONFIG, flops)}
    step = {d: flops(d) * 40 for d in (2, 3, 5)}  # 4 sequences of 10 tokens
    fisher = {d: flops(d) * 60 for d in (2, 3, 5)}  # 6 sequences of 10 tokens
    d2, d3, d5 = (by_name[n] for n in ("d2-scratch", "d3-inherited", "d5-inherited"))
    assert d2.lineage_flops == d2.flops == 50 * step[2]
    assert d3.flops == (30 + 8) * step[3]
    assert d3.fisher_flops == fisher[2]
    assert d3.lineage_flops == 40 * step[2] + fisher[2] + 38 * step[3]
    assert d5.lineage_flops == (
        40 * step[2] + fisher[2] + 30 * step[3] + fisher[3] + (20 + 5) * step[5]
    )


@pytest.mark.parametrize("steps", [(40, 30, 20), (1, 1, 1), (997, 3, 411)])
@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_both_arms_get_the_same_flops_up_to_one_step(
    steps: tuple[int, ...], strength: float
) -> None:
    plans = plan_series(replace(CONFIG, steps=steps, ewc_strength=strength), flops)
    for depth in (3, 5):
        arms = {p.arm: p for p in plans if p.depth == depth}
        more = arms[SCRATCH].lineage_flops - arms[INHERITED].lineage_flops
        assert 0 <= more < arms[SCRATCH].flops_per_step
        assert arms[SCRATCH].prior_flops == 0


def test_without_a_penalty_no_fisher_pass_is_charged() -> None:
    plans = plan_series(replace(CONFIG, ewc_strength=0.0), flops)
    assert [p.fisher_flops for p in plans] == [0] * 5
    assert plans[1].prior_flops == 40 * flops(2) * 40
