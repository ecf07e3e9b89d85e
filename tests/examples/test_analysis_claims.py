"""The verdicts on the proposal's claims."""

import math
from pathlib import Path
from typing import Any

import pytest
from analysis_records import chain_of, entry, two_arms, write, write_run

from analysis.claims import FAILS, HOLDS, NOT_SHOWN, Claim, decide_claims
from analysis.costs import Ratios, Saving, find_savings
from analysis.records import Log, Record, read_logs, read_metrics
from common.statistics import Estimate

CHEAPER, TOKENS, MONOTONIC, DIVERGENCE = range(4)


def saving(
    final: list[float] | None,
    trunk: list[float] | None = None,
    *,
    arm: str = "grown",
    depth: int = 4,
    tokens: list[float] | None = None,
    efficiency: float | None = None,
    seeds: int = 3,
    bounds: tuple[bool, bool] = (False, False),
    ancestors: int = 1,
    diverged: int = 0,
) -> Saving:
    def ratios(values: list[float] | None, is_bound: bool) -> Ratios | None:
        if values is None:
            return None
        flops = Estimate.of(values)
        other = flops if tokens is None else Estimate.of(tokens)
        return Ratios(flops, flops, other, other, is_bound)

    return Saving(
        depth=depth,
        arm=arm,
        baseline="scratch",
        seeds=seeds,
        reached=0 if final is None else seeds,
        final=ratios(final, bounds[0]),
        trunk=ratios(trunk, bounds[1]),
        efficiency=None if efficiency is None else Estimate.of([efficiency] * seeds),
        ancestors=ancestors,
        diverged=diverged,
    )


def cheaper(*savings: Saving) -> Claim:
    return decide_claims([], {}, list(savings))[CHEAPER]


@pytest.mark.parametrize(
    ("final", "trunk", "seeds", "verdict"),
    [
        ([0.30, 0.32, 0.31], None, 3, HOLDS),
        ([0.30, 0.32, 0.31], [0.9, 0.9, 0.9], 3, HOLDS),  # the final loss alone is enough
        ([0.30, 0.50, 0.37], None, 3, NOT_SHOWN),  # the interval holds the limit
        ([0.80, 0.82, 0.81], None, 3, FAILS),
        ([0.80, 0.82, 0.81], [0.7, 0.71, 0.72], 3, FAILS),
        ([0.80, 0.82, 0.81], [0.3, 0.31, 0.32], 3, NOT_SHOWN),  # an upper bound fails nothing
        ([0.30, 0.31], None, 2, NOT_SHOWN),
        ([0.80, 0.81], None, 2, NOT_SHOWN),
        (None, None, 3, FAILS),  # some seed never came down to it
        (None, None, 2, NOT_SHOWN),
    ],
)
def test_a_cost_is_decided_by_its_interval(
    final: list[float] | None, trunk: list[float] | None, seeds: int, verdict: str
) -> None:
    claim = cheaper(saving(final, trunk, seeds=seeds))
    assert claim.verdict == verdict
    assert claim.evidence.startswith("the only grown arm at d4, grown: ")
    if final is not None:
        assert f"{sum(final) / len(final):.2f} [" in claim.evidence


@pytest.mark.parametrize(
    ("final", "trunk", "bounds", "verdict"),
    [
        (0.8, None, (True, False), NOT_SHOWN),
        (0.8, 0.7, (False, True), NOT_SHOWN),
        (0.8, 0.7, (True, False), NOT_SHOWN),
        (0.8, 0.7, (False, False), FAILS),
        (0.3, 0.7, (True, True), HOLDS),  # at most below the limit is below it
    ],
)
def test_a_bound_fails_nothing(
    final: float, trunk: float | None, bounds: tuple[bool, bool], verdict: str
) -> None:
    trunks = None if trunk is None else [trunk] * 3
    claim = cheaper(saving([final] * 3, trunks, bounds=bounds))
    assert claim.verdict == verdict
    assert (f"at most {final:.2f} [" in claim.evidence) == bounds[0]
    assert (f"at most {trunk or 0:.2f} [" in claim.evidence) == bounds[1]


def test_an_arm_that_diverged_in_a_seed_shows_nothing() -> None:
    claim = cheaper(saving([0.1] * 3, diverged=1))
    assert claim.verdict == NOT_SHOWN
    assert "it or scratch diverged in 1 of 3 seeds" in claim.evidence
    worse = cheaper(saving(None, diverged=1), saving([0.9] * 3, arm="grown+ewc"))
    assert worse.verdict == NOT_SHOWN


def test_the_limits_are_the_proposals() -> None:
    for below, limit, index in ((0.399, 0.40, CHEAPER), (0.749, 0.75, TOKENS)):
        for value, verdict in ((below, HOLDS), (limit + 0.001, FAILS)):
            found = decide_claims([], {}, [saving([value] * 3, [value] * 3)])
            assert found[index].verdict == verdict


def test_tokens_are_not_operations() -> None:
    found = decide_claims([], {}, [saving([0.3, 0.3, 0.3], tokens=[1.2, 1.3, 1.25])])
    assert [claim.verdict for claim in found[:2]] == [HOLDS, FAILS]
    assert "1.25 [" in found[TOKENS].evidence


def test_the_deepest_model_of_the_best_grown_arm_decides() -> None:
    good, bad = [0.3, 0.31, 0.32], [0.9, 0.91, 0.92]
    assert cheaper(saving(good, depth=3), saving(bad, depth=4)).verdict == FAILS
    claim = cheaper(saving(bad), saving(good, arm="grown+ewc"))
    assert claim.verdict == HOLDS
    assert claim.evidence.startswith("best of 2 grown arms at d4, grown+ewc: 0.31 [")
    assert [row["verdict"] for row in claim.details] == [FAILS, HOLDS]
    mixed = cheaper(saving(bad), saving([0.3, 0.5, 0.37], arm="grown+ewc"))
    assert mixed.verdict == NOT_SHOWN
    assert mixed.evidence.startswith("1 of 2 grown arms do not hold it; best of the others at d4")
    only_scratch = cheaper(saving(good, arm="scratch+ars"), saving(good, arm="scratch+muon"))
    assert only_scratch.verdict == NOT_SHOWN
    assert "no grown arm" in only_scratch.evidence


def test_the_ladder_is_said_with_the_efficiency() -> None:
    claim = cheaper(saving([0.9] * 3, efficiency=0.5), saving([0.8] * 3, arm="grown+ewc"))
    assert "saves 0 / 17 / 34 / 51 / 68 % at e = 0 / 0.25 / 0.5 / 0.75 / 1" in claim.evidence
    assert "60 % needs e = 0.88" in claim.evidence
    words = "d4 for grown, with one ancestor: e = 0.50 [0.50, 0.50], on that ladder 34%."
    assert words in claim.evidence
    for e, words in ((-0.4, "ladder 0%"), (1.7, "ladder 68%")):
        assert words in cheaper(saving([0.9] * 3, efficiency=e)).evidence


def test_the_ladder_is_read_from_a_model_with_one_ancestor() -> None:
    deep = saving([0.9] * 3, efficiency=0.2, ancestors=2)
    assert "Measured" not in cheaper(deep).evidence
    evidence = cheaper(deep, saving([0.9] * 3, depth=3, efficiency=0.5)).evidence
    assert "Measured at d3 for grown, with one ancestor: e = 0.50" in evidence


def seeds_of(tmp_path: Path, *runs: list[dict[str, Any]]) -> list[Record]:
    return read_metrics([write(tmp_path / f"{i}.json", run) for i, run in enumerate(runs)])


def monotonic(records: list[Record]) -> Claim:
    return decide_claims(records, {}, [])[MONOTONIC]


def test_a_rise_in_one_seed_of_one_grown_arm_is_a_failure(tmp_path: Path) -> None:
    runs = [two_arms(seed) for seed in range(3)]
    claim = monotonic(seeds_of(tmp_path, *runs))
    assert (claim.verdict, claim.evidence) == (
        HOLDS, "they fall at every step of 3 series, 3 seeds",
    )  # fmt: skip
    assert monotonic(seeds_of(tmp_path, *runs[:2])).verdict == NOT_SHOWN
    runs[2][3]["val_bpb"] = runs[2][1]["val_bpb"]
    claim = monotonic(seeds_of(tmp_path, *runs))
    assert claim.verdict == FAILS
    assert claim.evidence == "grown: d4 2.4000 after d3 2.4000 (seed 2)"
    assert {row["arm"]: row["verdict"] for row in claim.details} == {
        "scratch": HOLDS, "grown": FAILS,
    }  # fmt: skip


def test_models_from_scratch_do_not_decide_what_growing_claims(tmp_path: Path) -> None:
    runs = [two_arms(seed) for seed in range(3)]
    for run in runs:
        run[4]["val_bpb"] = 2.9
    claim = monotonic(seeds_of(tmp_path, *runs))
    assert claim.verdict == HOLDS
    assert claim.details[0]["verdict"] == FAILS
    alone = [[entry("d2-scratch", 3.0), entry("d3-scratch", 2.0)]]
    assert monotonic(seeds_of(tmp_path, *alone)).evidence == "no grown series of two depths"


def logged(tmp_path: Path, seeds: int = 3) -> tuple[list[Record], dict[tuple[str, int], Log]]:
    paths = [write_run(tmp_path / f"run-{seed}", two_arms(seed)) for seed in range(seeds)]
    records = read_metrics(paths)
    return records, read_logs(paths, records)


def divergence(records: list[Record], logs: dict[tuple[str, int], Log]) -> Claim:
    return decide_claims(records, logs, [])[DIVERGENCE]


def test_whole_logs_of_three_seeds_show_that_nothing_diverged(tmp_path: Path) -> None:
    records, logs = logged(tmp_path)
    assert divergence(records, logs) == Claim(
        "No divergence: every loss finite, none above the untrained model's",
        HOLDS, "none in 15 models, 3 seeds",
    )  # fmt: skip
    two = [r for r in records if r.seed < 2]
    assert divergence(two, logs).verdict == NOT_SHOWN
    del logs["d3-grown", 1]
    claim = divergence(records, logs)
    assert (claim.verdict, claim.evidence) == (
        NOT_SHOWN, "none in 15 models, 3 seeds; only 14 of them have logs",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("loss", math.nan, "d3-grown (seed 1) had a training loss that was no number"),
        ("loss", math.inf, "had a training loss that was no number"),
        ("val_bpb", 8.01, "d3-grown (seed 1) rose to 8.0100 from 8.0000 untrained"),
        ("val_bpb", math.nan, "rose to nan from 8.0000 untrained"),
    ],
)
def test_one_bad_step_is_a_divergence(tmp_path: Path, key: str, value: float, words: str) -> None:
    records, logs = logged(tmp_path)
    logs["d3-grown", 1][4][key] = value
    claim = divergence(records, logs)
    assert claim.verdict == FAILS
    assert words in claim.evidence


def test_a_model_that_ended_in_no_number_is_a_divergence(tmp_path: Path) -> None:
    runs = [two_arms(seed) for seed in range(3)]
    runs[1][3]["val_bpb"] = math.nan
    records = seeds_of(tmp_path, *runs)
    assert divergence(records, {}).evidence == "d4-grown (seed 1) ended at nan"
    assert monotonic(records).verdict == FAILS


def test_savings_of_real_logs_reach_the_claims(tmp_path: Path) -> None:
    records, logs = logged(tmp_path)
    claims = decide_claims(records, logs, find_savings(records, logs))
    assert claims[CHEAPER].verdict == FAILS
    assert "e = " in claims[CHEAPER].evidence
    assert "Without the parents' tokens, the best is grown" in claims[TOKENS].evidence
    assert [claim.verdict for claim in claims[2:]] == [HOLDS, HOLDS]


def test_shared_roots_count_once_a_series(tmp_path: Path) -> None:
    run = [*two_arms(), *chain_of("grown+ewc", "scratch", [2.4, 2.0])]
    assert "every step of 2 series" in monotonic(seeds_of(tmp_path, run)).evidence
