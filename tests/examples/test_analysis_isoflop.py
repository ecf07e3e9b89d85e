"""The isoFLOP method on laws whose optimum is known."""

import json

import numpy as np
import pytest
from numpy.typing import NDArray

from analysis.scaling import ScalingLawValidator

Array = NDArray[np.float64]


def sweep(
    budgets: Array, width: float = 2.0, sizes: int = 7, shift: float = 1.0
) -> tuple[Array, Array, Array, Array]:
    """N, D, L, C around the optimum of 1.7 + 400 N^-0.3 + 400 D^-0.3: N* = D* = sqrt(C/6)."""
    n = np.concatenate([np.sqrt(c / 6) * np.geomspace(1 / width, width, sizes) for c in budgets])
    c = np.repeat(budgets, sizes)
    n = n * shift
    d = c / (6 * n)
    return n, d, 1.7 + 400 * n**-0.3 + 400 * d**-0.3, c


BUDGETS = np.geomspace(1e18, 1e20, 5)


def test_the_optimum_of_a_symmetric_law() -> None:
    found = ScalingLawValidator(bootstraps=50).isoflop(*sweep(BUDGETS))
    assert (found.a, found.b) == pytest.approx((0.5, 0.5), abs=1e-6)
    for budget in found.budgets:
        assert budget["params"] == pytest.approx(np.sqrt(budget["flops"] / 6), rel=1e-3)
        assert budget["tokens"] == pytest.approx(np.sqrt(budget["flops"] / 6), rel=1e-3)
        assert budget["runs"] == 7
    low, high = found.intervals["a"]
    assert low <= 0.5 <= high
    assert high - low < 0.02
    assert found.left_out == ()
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_noise_widens_the_interval_which_still_covers() -> None:
    n, d, loss, c = sweep(BUDGETS, width=4.0)
    covered = 0
    for seed in range(20):
        noisy = loss * np.exp(0.002 * np.random.default_rng(seed).standard_normal(n.size))
        found = ScalingLawValidator(bootstraps=200, confidence=0.9).isoflop(n, d, noisy, c)
        low, high = found.intervals["a"]
        covered += low <= 0.5 <= high
        assert high - low > 0.005
    assert covered >= 14  # of 18 expected; 13 or fewer has probability 0.002


def test_budgets_within_a_tenth_are_one() -> None:
    n, d, loss, c = sweep(BUDGETS)
    jitter = np.exp(0.02 * np.sin(np.arange(n.size)))
    assert len(ScalingLawValidator(bootstraps=0).isoflop(n, d, loss, c * jitter).budgets) == 5


def test_a_minimum_at_the_edge_is_left_out() -> None:
    good = sweep(BUDGETS[:4])
    bad = sweep(BUDGETS[4:], shift=10.0)
    both = [np.concatenate(pair) for pair in zip(good, bad, strict=True)]
    found = ScalingLawValidator(bootstraps=0).isoflop(*both)
    assert found.left_out == pytest.approx((1e20,))
    assert len(found.budgets) == 4


def test_what_cannot_show_a_minimum_is_refused() -> None:
    validator = ScalingLawValidator(bootstraps=0)
    with pytest.raises(ValueError, match="3 of 3 budgets have 5 or more sizes"):
        validator.isoflop(*sweep(BUDGETS[:3]))
    with pytest.raises(ValueError, match="0 of 5 budgets have 5 or more sizes"):
        validator.isoflop(*sweep(BUDGETS, sizes=4))
    with pytest.raises(ValueError, match="only 0 budgets have their minimum"):
        validator.isoflop(*sweep(BUDGETS, shift=10.0))
