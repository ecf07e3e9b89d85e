"""Learning rates, and how steps are divided."""

import pytest

from trainer.series_plan import cooldown_steps, learning_rate, split_steps


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
