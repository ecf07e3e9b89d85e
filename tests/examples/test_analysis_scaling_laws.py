"""Scaling laws: known laws come back, intervals cover, and what cannot be told is refused."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from analysis_records import DEMO, trained, write
from numpy.typing import NDArray
from scipy.optimize import least_squares

from analysis.power_laws import ChinchillaLaw, ComputeLaw, fit_power_law, refine
from analysis.records import read_metrics
from analysis.scaling_laws import ArmLaws, HoldOut, ScalingLawValidator, fit_series

Array = NDArray[np.float64]
Law = tuple[float, float, float, float, float]

EPOCH: Law = (1.8169, 482.01, 2085.43, 0.3478, 0.3658)
LAWS: list[Law] = [
    EPOCH,
    (1.69, 406.4, 410.7, 0.34, 0.28),
    (0.5, 50.0, 30.0, 0.2, 0.2),  # equal exponents, E far below the data
    (2.0, 1e4, 20.0, 0.6, 0.15),  # one term dominates
    (0.8, 5e5, 5e6, 0.9, 0.8),  # steep
]


def losses(law: Law, n: Array, d: Array) -> Array:
    constant, a, b, alpha, beta = law
    return np.asarray(constant + a * n**-alpha + b * d**-beta)


def grid(sizes: int = 6, counts: int = 6) -> tuple[Array, Array]:
    n, d = np.meshgrid(np.geomspace(4e7, 1e10, sizes), np.geomspace(1e9, 4e11, counts))
    return n.ravel(), d.ravel()


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_a_law_without_noise_comes_back(law: Law) -> None:
    n, d = grid()
    found = ScalingLawValidator(bootstraps=0).fit(n, d, losses(law, n, d))
    assert (found.E, found.A, found.B, found.alpha, found.beta) == pytest.approx(law, rel=1e-3)
    assert found.rms_relative_error < 1e-9
    assert found.r_squared == pytest.approx(1.0, abs=1e-12)
    assert found.flaws == ()
    assert found.predict(1e12, 1e13) == pytest.approx(losses(law, np.array(1e12), np.array(1e13)))


def test_runs_of_an_isoflop_sweep_are_enough() -> None:
    budgets = np.repeat([1e18, 2.15e18, 4.64e18, 1e19], 6)
    n = np.tile(np.geomspace(9e7, 5e8, 6), 4)
    d = budgets / (6 * n)
    found = ScalingLawValidator(bootstraps=0).fit(n, d, losses(EPOCH, n, d))
    assert (found.E, found.alpha, found.beta) == pytest.approx((1.8169, 0.3478, 0.3658), rel=1e-3)


def test_outliers_do_not_move_the_law() -> None:
    n, d = grid()
    y = losses(EPOCH, n, d)
    y[[3, 17, 30]] *= [1.3, 0.8, 1.5]
    found = ScalingLawValidator(bootstraps=0).fit(n, d, y)
    assert (found.E, found.alpha, found.beta) == pytest.approx((1.8169, 0.3478, 0.3658), rel=0.01)
    squares = ScalingLawValidator(bootstraps=0, huber_delta=10.0).fit(n, d, y)
    assert abs(squares.alpha - 0.3478) > 0.02


def test_intervals_cover_the_law() -> None:
    """Of 30 noisy data sets nine tenths should be covered; 22 or fewer has probability 0.008."""
    n, d = grid(5, 5)
    truth = {"E": EPOCH[0], "alpha": EPOCH[3], "beta": EPOCH[4]}
    truth["a"] = truth["beta"] / (truth["alpha"] + truth["beta"])
    budget = 1e22
    ratio = EPOCH[3] * EPOCH[1] / (EPOCH[4] * EPOCH[2])
    best = ratio ** (1 / (EPOCH[3] + EPOCH[4])) * (budget / 6) ** truth["a"]
    covered = dict.fromkeys([*truth, "params"], 0)
    widths = []
    for seed in range(30):
        noise = np.random.default_rng(seed).standard_normal(n.size)
        y = losses(EPOCH, n, d) * np.exp(0.005 * noise)
        found = ScalingLawValidator(bootstraps=100, confidence=0.9, seed=seed).fit(n, d, y)
        for name, value in truth.items():
            low, high = found.intervals[name]
            covered[name] += low <= value <= high
        low, high = found.optimum(budget)["params_interval"]
        covered["params"] += low <= best <= high
        widths.append(found.intervals["alpha"][1] - found.intervals["alpha"][0])
    assert min(covered.values()) >= 23, covered
    assert np.median(widths) < 0.15, "an interval that covers everything says nothing"


def test_the_compute_optimum_is_the_least_loss_of_its_budget() -> None:
    n, d = grid()
    found = ScalingLawValidator(bootstraps=20).fit(n, d, losses(EPOCH, n, d))
    best = found.optimum(1e21)
    assert 6 * best["params"] * best["tokens"] == pytest.approx(1e21)
    sizes = best["params"] * np.geomspace(0.8, 1.25, 101)
    around = found.predict(sizes, 1e21 / (6 * sizes))
    assert int(np.argmin(around)) == 50
    assert best["loss"] == pytest.approx(around[50])
    assert found.a == pytest.approx(EPOCH[4] / (EPOCH[3] + EPOCH[4]), rel=1e-3)
    assert best["params_interval"] == pytest.approx([best["params"]] * 2, rel=1e-3)
    assert best["tokens_interval"] == pytest.approx([best["tokens"]] * 2, rel=1e-3)


@pytest.mark.parametrize("ratio", [8.0, 20.0])
def test_a_fixed_ratio_of_tokens_to_parameters_is_refused(ratio: float) -> None:
    n = np.geomspace(9e7, 5e8, 11)
    d = ratio * n
    y = losses(EPOCH, n, d)
    with pytest.raises(ValueError, match=r"N and D move together .*fit_compute"):
        ScalingLawValidator().fit(n, d, y)
    with pytest.raises(ValueError, match="move together"):
        ScalingLawValidator().fit(n, d * np.exp(0.02 * np.sin(np.arange(11))), y)


def test_one_budget_is_refused() -> None:
    n = np.geomspace(9e7, 5e8, 8)
    with pytest.raises(ValueError, match="same product N D"):
        ScalingLawValidator().fit(n, 1e18 / n, losses(EPOCH, n, 1e18 / n))


@pytest.mark.parametrize(
    ("n", "d", "y", "message"),
    [
        ([1e7] * 5, [1e9] * 5, [2.0] * 5, r"5 runs at 1 different \(N, D\) cannot"),
        (  # three points, three seeds each
            [1e7, 2e7, 3e7] * 3,
            [1e9, 3e9, 2e9] * 3,
            [3.0, 2.5, 2.0] * 3,
            r"9 runs at 3 different \(N, D\) cannot determine",
        ),
        ([1e7, 2e7] * 3, [1e9, 1e9, 2e9, 2e9, 3e9, 3e9], [2.0] * 6, "only 2 different sizes N"),
        ([1e7, 2e7, 3e7] * 2, [1e9] * 3 + [2e9] * 3, [2.0] * 6, "only 2 different token counts D"),
        ([1e7] * 5 + [-1.0], [1e9] * 6, [2.0] * 6, r"params\[5\] is -1"),
        ([1e7] * 6, [1e9] * 6, [2.0] * 5 + [float("nan")], r"losses\[5\] is nan"),
        ([1e7] * 6, [1e9] * 5, [2.0] * 6, "tokens has 5 values for 6 runs"),
    ],
)
def test_unfit_data_is_refused(
    n: Sequence[float], d: Sequence[float], y: Sequence[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ScalingLawValidator().fit(n, d, y)


@pytest.mark.parametrize(
    "settings", [{"huber_delta": 0.0}, {"bootstraps": -1}, {"confidence": 1.0}]
)
def test_unfit_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ScalingLawValidator(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("law", [(1.7, 500.0, 0.12), (0.6, 2e6, 0.35)])
def test_the_compute_law_comes_back(law: tuple[float, float, float]) -> None:
    c = np.geomspace(4e17, 1.2e19, 11)
    found = ScalingLawValidator(bootstraps=50).fit_compute(c, law[0] + law[1] * c ** -law[2])
    assert (found.E, found.K, found.gamma) == pytest.approx(law, rel=1e-3)
    assert found.intervals["gamma"] == pytest.approx((law[2], law[2]), rel=1e-3)
    assert found.predict(1e21) == pytest.approx(law[0] + law[1] * 1e21 ** -law[2])
    assert found.flaws == ()


def test_intervals_of_the_compute_law_cover_it() -> None:
    c = np.geomspace(1e17, 1e20, 11)
    covered = 0
    for seed in range(30):
        noise = np.random.default_rng(seed).standard_normal(c.size)
        y = (1.7 + 20 * c**-0.1) * np.exp(0.003 * noise)
        found = ScalingLawValidator(bootstraps=100, confidence=0.9).fit_compute(c, y)
        covered += found.intervals["gamma"][0] <= 0.1 <= found.intervals["gamma"][1]
    assert covered >= 23


def test_too_few_budgets_are_refused() -> None:
    with pytest.raises(ValueError, match="3 runs at 3 budgets"):
        ScalingLawValidator().fit_compute([1e12, 2e12, 3e12], [3.0, 2.5, 2.2])
    with pytest.raises(ValueError, match="4 runs at 2 budgets"):
        ScalingLawValidator().fit_compute([1e12, 1e12, 3e12, 3e12], [3.0, 3.0, 2.2, 2.2])


def test_losses_that_do_not_fall_as_a_power_are_flagged() -> None:
    c = np.geomspace(1e17, 1e20, 8)
    rising = ScalingLawValidator(bootstraps=0).fit_compute(c, 2 + 0.1 * np.log(c / 1e17))
    assert "the exponent of C ran to the bound 0.001" in rising.flaws
    straight = ScalingLawValidator(bootstraps=0).fit_compute(c, 1e3 * c**-0.15)
    assert straight.flaws == ("E vanished",)
    assert straight.gamma == pytest.approx(0.15, rel=1e-3)


def test_a_design_that_amplifies_noise_is_flagged() -> None:
    n, d = (
        a.ravel() for a in np.meshgrid(np.geomspace(1e8, 1.2e8, 4), np.geomspace(1e10, 1.2e10, 4))
    )
    found = ScalingLawValidator(bootstraps=0).fit(n, d, losses(EPOCH, n, d))
    assert found.condition > 1e8
    assert any("do not determine it: condition number" in flaw for flaw in found.flaws)


def test_the_score_is_the_error_on_runs_held_out() -> None:
    n, d = grid()
    y = losses(EPOCH, n, d)
    exact = ScalingLawValidator().holdout(n, d, y)
    assert len(exact.runs) == 9
    assert min(n[list(exact.runs)] * d[list(exact.runs)]) >= np.sort(n * d)[-9]
    assert exact.rms_relative_error < 1e-6
    y[list(exact.runs)] *= 1.02  # what no fit to the others can know
    shifted = ScalingLawValidator().holdout(n, d, y)
    assert shifted.rms_relative_error == pytest.approx(np.log(1.02), rel=1e-4)
    assert shifted.worst_relative_error == pytest.approx(np.log(1.02), rel=1e-4)
    with pytest.raises(ValueError, match="share"):
        ScalingLawValidator().holdout(n, d, y, share=1.0)


def test_the_score_of_the_compute_law() -> None:
    c = np.geomspace(1e17, 1e20, 8)[::-1]
    y = 1.7 + 20 * c**-0.1
    score = ScalingLawValidator().holdout_compute(c, y)
    assert score.runs == (0, 1)
    assert score.predicted == pytest.approx(score.measured)
    with pytest.raises(ValueError, match="3 runs at 3 budgets"):
        ScalingLawValidator().holdout_compute(c[:4], y[:4])


def test_seeds_of_one_budget_are_held_out_together() -> None:
    c = np.repeat(np.geomspace(1e17, 1e20, 5), 3)
    score = ScalingLawValidator().holdout_compute(c, 1.7 + 20 * c**-0.1, share=0.25)
    assert score.runs == (9, 10, 11, 12, 13, 14)  # 4 of 15 are asked for
    n, d = np.repeat([1e6, 2e6, 3e6, 7e6], 4), np.tile([21e8, 7e8, 6e8, 3e8], 4)
    assert ScalingLawValidator().holdout(n, d, losses(EPOCH, n, d), share=0.3).runs == tuple(
        np.flatnonzero(n * d >= np.sort(n * d)[-5] * (1 - 1e-9))
    )


@pytest.mark.parametrize("kind", ["constant", "noise", "steps"])
def test_losses_without_a_law_give_finite_numbers(kind: str) -> None:
    n, d = grid(4, 4)
    generator = np.random.default_rng(0)
    y = {
        "constant": np.full(n.size, 2.5),
        "noise": 10 ** generator.uniform(-3, 3, n.size),
        "steps": np.where(generator.random(n.size) < 0.3, 50.0, 2.0),
    }[kind]
    law = ScalingLawValidator(bootstraps=40).fit(n, d, y)
    assert json.dumps([law.to_dict(), law.optimum(1e20)], allow_nan=False)
    if kind == "constant":
        assert law.flaws
        assert law.predict(1e12, 1e13) == pytest.approx(2.5, rel=1e-4)


def test_the_same_seed_gives_the_same_intervals() -> None:
    n, d = grid(4, 4)
    y = losses(EPOCH, n, d) * np.exp(0.01 * np.random.default_rng(0).standard_normal(n.size))
    first, second, other = (
        ScalingLawValidator(bootstraps=20, seed=seed).fit(n, d, y).intervals for seed in (1, 1, 2)
    )
    assert first == second
    assert first != other


def test_results_are_json() -> None:
    n, d = grid(4, 4)
    validator = ScalingLawValidator(bootstraps=10)
    law = validator.fit(n, d, losses(EPOCH, n, d))
    for result in (law, validator.holdout(n, d, losses(EPOCH, n, d))):
        assert json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert {"alpha", "beta", "r_squared", "intervals"} <= law.to_dict().keys()


def test_the_minimum_is_that_of_an_independent_solver() -> None:
    n, d = grid(5, 5)
    generator = np.random.default_rng(3)
    y = np.log(losses(EPOCH, n, d)) + 0.004 * generator.standard_normal(n.size)
    x = np.log(np.stack([n, d]))
    x -= x.mean(axis=1, keepdims=True)
    best = fit_power_law(x, y, 1e-3)

    def residuals(p: Array) -> Array:
        terms = np.stack([p[0] + 0 * x[0], p[1] - p[3] * x[0], p[2] - p[4] * x[1]])
        return np.asarray(np.log(np.exp(terms).sum(axis=0)) - y)

    start = best + 0.05 * generator.standard_normal(5)
    other = least_squares(residuals, start, loss="huber", f_scale=1e-3, xtol=1e-14, gtol=1e-14)
    _, ours = refine(best[None], x, y[None], np.ones((1, y.size)), 1e-3)
    assert ours[0] == pytest.approx(other.cost, rel=1e-6)
    assert best == pytest.approx(other.x, abs=1e-3)
    # Weights are multiplicities, and points of weight 0 do not count.
    twice = np.tile([2.0, 0.0], y.size)[: y.size][None]
    kept = np.flatnonzero(twice[0])
    weighted, _ = refine(best[None], x, y[None], twice, 1e-3)
    alone, _ = refine(best[None], x[:, kept], y[None, kept], np.ones((1, kept.size)), 1e-3)
    assert weighted == pytest.approx(alone, abs=1e-6)


def isoflop_runs(
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
    found = ScalingLawValidator(bootstraps=50).isoflop(*isoflop_runs(BUDGETS))
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
    n, d, loss, c = isoflop_runs(BUDGETS, width=4.0)
    covered = 0
    for seed in range(20):
        noisy = loss * np.exp(0.002 * np.random.default_rng(seed).standard_normal(n.size))
        found = ScalingLawValidator(bootstraps=200, confidence=0.9).isoflop(n, d, noisy, c)
        low, high = found.intervals["a"]
        covered += low <= 0.5 <= high
        assert high - low > 0.005
    assert covered >= 14  # of 18 expected; 13 or fewer has probability 0.002


def test_budgets_within_a_tenth_are_one() -> None:
    n, d, loss, c = isoflop_runs(BUDGETS)
    jitter = np.exp(0.02 * np.sin(np.arange(n.size)))
    assert len(ScalingLawValidator(bootstraps=0).isoflop(n, d, loss, c * jitter).budgets) == 5


def test_a_minimum_at_the_edge_is_left_out() -> None:
    good = isoflop_runs(BUDGETS[:4])
    bad = isoflop_runs(BUDGETS[4:], shift=10.0)
    both = [np.concatenate(pair) for pair in zip(good, bad, strict=True)]
    found = ScalingLawValidator(bootstraps=0).isoflop(*both)
    assert found.left_out == pytest.approx((1e20,))
    assert len(found.budgets) == 4


def test_what_cannot_show_a_minimum_is_refused() -> None:
    validator = ScalingLawValidator(bootstraps=0)
    with pytest.raises(ValueError, match="3 of 3 budgets have 5 or more sizes"):
        validator.isoflop(*isoflop_runs(BUDGETS[:3]))
    with pytest.raises(ValueError, match="0 of 5 budgets have 5 or more sizes"):
        validator.isoflop(*isoflop_runs(BUDGETS, sizes=4))
    with pytest.raises(ValueError, match="only 0 budgets have their minimum"):
        validator.isoflop(*isoflop_runs(BUDGETS, shift=10.0))


VALIDATOR = ScalingLawValidator(bootstraps=10)


def laws(path: Path) -> dict[str, ArmLaws]:
    found = fit_series(read_metrics([path]), VALIDATOR)
    for arm in found:
        assert json.dumps(arm.to_dict(), allow_nan=False)
    return {arm.arm: arm for arm in found}


def test_the_committed_demo_is_too_small_for_any_law() -> None:
    found = laws(DEMO)
    assert "3 runs at 3 different (N, D) cannot determine the five parameters" in str(
        found["scratch"].chinchilla
    )
    assert "3 runs at 3 budgets" in str(found["scratch"].compute)
    assert "0 of 3 budgets" in str(found["scratch"].isoflop)
    assert all(isinstance(arm.chinchilla, str) for arm in found.values())
    assert found["scratch"].to_dict()["compute"] == {"refused": found["scratch"].compute}


def test_grown_models_have_a_law_in_their_lineages_compute_only(tmp_path: Path) -> None:
    records = [trained("d2-scratch", 0.0)]
    for depth in (4, 6, 8, 12, 16):
        records.append(trained(f"d{depth}-grown", {0.4: 0.0}, records[-1]))
    for record in records:
        record["val_bpb"] = 1.1 + 300 * record["lineage_flops"] ** -0.25
    found = laws(write(tmp_path / "m.json", records))["grown"]
    assert "were grown" in str(found.chinchilla)
    assert "were grown" in str(found.chinchilla_score)
    assert "were grown" in str(found.isoflop)
    assert isinstance(found.compute, ComputeLaw)
    assert isinstance(found.compute_score, HoldOut)
    assert (found.compute.E, found.compute.gamma) == pytest.approx((1.1, 0.25), rel=1e-3)
    assert found.compute_score.rms_relative_error < 1e-6


def test_cooled_branches_at_several_shares_have_a_law_in_n_and_d(tmp_path: Path) -> None:
    records = []
    for depth in (2, 3, 4, 5):
        record = trained(f"d{depth}-scratch", {0.2: 0.0, 0.5: 0.0, 1.0: 0.0})
        record["params"] = record["scaling_params"] = 10**5 * depth**3
        for branch, tokens in zip(record["cooled"], (10**6, 10**7, 10**8), strict=True):
            bpb = 0.9 + 30 * record["params"] ** -0.3 + 60 * tokens**-0.28
            branch |= {"tokens": tokens, "val_bpb": bpb}
        record |= {"tokens": 10**8, "lineage_tokens": 10**8, "val_bpb": bpb}
        records.append(record)
    records[0]["cooled"][0]["val_bpb"] = None  # that one diverged
    found = laws(write(tmp_path / "m.json", records))["scratch"]
    assert (len(found.models), len(found.runs)) == (4, 11)
    assert isinstance(found.chinchilla, ChinchillaLaw)
    assert (found.chinchilla.alpha, found.chinchilla.beta) == pytest.approx((0.3, 0.28), rel=1e-3)
    assert isinstance(found.chinchilla_score, HoldOut)
    optimum = found.to_dict()["chinchilla"]["optimum"]
    assert optimum["flops"] == 6 * 10**5 * 5**3 * 10**8, "of the largest model and token count"
    assert 6 * optimum["params"] * optimum["tokens"] == pytest.approx(optimum["flops"])
    assert optimum["params_interval"][0] <= optimum["params"] <= optimum["params_interval"][1]
    assert found.to_dict()["chinchilla"]["intervals"].keys() >= {"alpha", "beta", "E", "a"}
