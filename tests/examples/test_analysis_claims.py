"""The verdicts on the proposal's claims."""

import math
from pathlib import Path
from typing import Any

import pytest
from analysis_records import grown_series, trained, write, write_run

from analysis.claims import FAILS, HOLDS, NOT_SHOWN, Claim, decide_claims
from analysis.records import Log, Record, read_logs, read_metrics
from analysis.series_account import find_accounts

Entries = list[dict[str, Any]]

CHEAPER, TOKENS, MONOTONIC, DIVERGENCE = range(4)


def series(seed: int, gain: float, share: float, arm: str = "grown") -> Entries:
    """d8, d12 and d16 grown out of d2 at a share of the steps, beside their twins."""
    sizes = ((2, 3.0), (8, 2.5), (12, 2.2), (16, 2.0))
    twins = [trained(f"d{d}-scratch", bpb, seed=seed) for d, bpb in sizes]
    records, parent = [twins[0]], twins[0]
    for twin in twins[1:]:
        losses = {share: twin["val_bpb"] - gain}
        parent = trained(f"{twin['size']}-{arm}", losses, parent, seed=seed)
        records += [parent, twin]
    return records


def claims(tmp_path: Path, *runs: Entries) -> list[Claim]:
    records = read(tmp_path, *runs)
    return decide_claims(records, {}, find_accounts(records))


def read(tmp_path: Path, *runs: Entries) -> list[Record]:
    return read_metrics([write(tmp_path / f"{i}.json", run) for i, run in enumerate(runs)])


@pytest.mark.parametrize(
    ("gains", "share", "verdict"),
    [
        ((0.1, 0.11, 0.12), 0.3, HOLDS),
        ((0.1, 0.0, 0.12), 0.3, HOLDS),  # equal is not worse
        ((0.1, 0.11, 0.12), 0.5, NOT_SHOWN),  # less might do
        ((0.1, -0.001, 0.12), 0.3, NOT_SHOWN),  # one member of one seed is worse
        ((-0.1, -0.11, -0.12), 0.3, NOT_SHOWN),  # more might do, up to 0.40
        ((-0.1, -0.11, -0.12), 0.5, FAILS),
        ((0.1, -0.09, -0.02), 0.5, NOT_SHOWN),  # by the interval nothing is worse
        ((0.1, 0.11), 0.3, NOT_SHOWN),
        ((-0.1, -0.11), 0.5, NOT_SHOWN),
    ],
)
def test_the_cost_of_the_whole_series_is_decided(
    tmp_path: Path, gains: tuple[float, ...], share: float, verdict: str
) -> None:
    claim = claims(tmp_path, *(series(i, gain, share) for i, gain in enumerate(gains)))[CHEAPER]
    assert claim.verdict == verdict
    # d2 in full: 4 of 4 + 64 + 144 + 256 parts.
    paid = (4 + share * 464) / 468
    assert claim.evidence.startswith(f"grown: {paid:.2f} of the FLOPs, ")


def test_the_limit_is_the_proposals(tmp_path: Path) -> None:
    for share, verdict in ((0.39, HOLDS), (0.4, NOT_SHOWN)):  # growing costs something too
        runs = [series(seed, 0.1, share) for seed in range(3)]
        assert claims(tmp_path, *runs)[CHEAPER].verdict == verdict


def test_a_seed_that_diverged_shows_nothing(tmp_path: Path) -> None:
    runs = [series(seed, 0.1, 0.3) for seed in range(3)]
    runs[1][3]["val_bpb"], runs[1][3]["cooled"][-1]["val_bpb"] = math.nan, math.nan
    found = claims(tmp_path, *runs)
    assert [claim.verdict for claim in found[:2]] == [NOT_SHOWN, NOT_SHOWN]


def test_the_best_grown_arm_decides_and_all_are_kept(tmp_path: Path) -> None:
    runs = []
    for seed in range(3):
        other = series(seed, -0.1 - 0.01 * seed, 0.5, "grown+ewc")
        runs.append(series(seed, 0.1, 0.3) + [r for r in other if r["arm"] == "grown+ewc"])
    claim = claims(tmp_path, *runs)[CHEAPER]
    assert claim.verdict == HOLDS
    assert claim.evidence.startswith("best of 2 grown arms, grown: 0.3")
    assert [(row["arm"], row["verdict"]) for row in claim.details] == [
        ("grown", HOLDS), ("grown+ewc", FAILS),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("gains", "share", "verdict"),
    [
        # The lineage of d16: 0.9 x 2, and of d8 and d12 the trunk, a tenth less than the share.
        ((0.1, 0.1, 0.1), 0.2, HOLDS),  # 0.45
        ((0.1, 0.1, 0.1), 0.4, NOT_SHOWN),  # 0.89, of which 0.4 its own
        ((-0.1, -0.11, -0.12), 0.4, FAILS),
        ((-0.1, -0.11, -0.12), 0.2, NOT_SHOWN),
        ((0.1, 0.1, 0.1), 0.7, FAILS),  # 0.86 are its ancestors' alone
    ],
)
def test_tokens_are_those_of_the_lineage(
    tmp_path: Path, gains: tuple[float, ...], share: float, verdict: str
) -> None:
    claim = claims(tmp_path, *(series(i, gain, share) for i, gain in enumerate(gains)))[TOKENS]
    assert claim.verdict == verdict
    lineage = (0.9 * 2 + (share - 0.1) * (8 + 12) + share * 16) / 16
    whole = (2 + share * 36) / 38
    assert f"the lineage of d16 read {lineage:.2f} times its twin's tokens" in claim.evidence
    assert f"({share:.2f} times as d16 itself)" in claim.evidence
    assert f"the whole series read {whole:.2f} times its twins' tokens" in claim.evidence


def test_what_is_arithmetic_is_called_so(tmp_path: Path) -> None:
    claim = claims(tmp_path, *(series(seed, 0.1, 0.3) for seed in range(3)))[CHEAPER]
    assert "By arithmetic alone a chain d10 ... d20 saves 19 / 38 / 57 / 75 %" in claim.evidence
    assert "transfer efficiency" in claim.evidence


def test_without_twins_nothing_is_shown(tmp_path: Path) -> None:
    run = [r for r in grown_series() if r["name"] != "d6-scratch"]
    for claim in claims(tmp_path, run)[:2]:
        assert claim.verdict == NOT_SHOWN
        assert claim.evidence == "no grown series beside twins that were trained in full"


def test_a_rise_in_one_seed_of_one_grown_arm_is_a_failure(tmp_path: Path) -> None:
    runs = [grown_series(seed) for seed in range(3)]
    claim = claims(tmp_path, *runs)[MONOTONIC]
    assert (claim.verdict, claim.evidence) == (
        HOLDS, "they fall at every step of 3 series, 3 seeds",
    )  # fmt: skip
    assert claims(tmp_path, *runs[:2])[MONOTONIC].verdict == NOT_SHOWN
    runs[2][3]["val_bpb"] = runs[2][1]["val_bpb"]
    claim = claims(tmp_path, *runs)[MONOTONIC]
    assert claim.verdict == FAILS
    assert claim.evidence == "grown: d6 2.4500 after d4 2.4500 (seed 2)"
    assert {row["arm"]: row["verdict"] for row in claim.details} == {
        "scratch": HOLDS, "grown": FAILS,
    }  # fmt: skip


def test_models_from_scratch_do_not_decide_what_growing_claims(tmp_path: Path) -> None:
    runs = [grown_series(seed) for seed in range(3)]
    for run in runs:
        run[4]["val_bpb"] = 2.9
    claim = claims(tmp_path, *runs)[MONOTONIC]
    assert claim.verdict == HOLDS
    assert claim.details[0]["verdict"] == FAILS
    alone = [trained("d2-scratch", 3.0), trained("d3-scratch", 2.0)]
    assert claims(tmp_path, alone)[MONOTONIC].evidence == "no grown series of two sizes"


def test_shared_roots_count_once_a_series(tmp_path: Path) -> None:
    other = [r for r in grown_series(arm="grown+ewc") if r["arm"] == "grown+ewc"]
    assert "every step of 2 series" in claims(tmp_path, grown_series() + other)[MONOTONIC].evidence


def logged(tmp_path: Path, seeds: int = 3) -> tuple[list[Record], dict[tuple[str, int], Log]]:
    paths = [write_run(tmp_path / f"run-{seed}", grown_series(seed)) for seed in range(seeds)]
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
    del logs["d4-grown", 1]
    claim = divergence(records, logs)
    assert (claim.verdict, claim.evidence) == (
        NOT_SHOWN, "none in 15 models, 3 seeds; only 14 of them have logs",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("loss", math.nan, "d4-grown (seed 1) had a training loss that was no number"),
        ("loss", math.inf, "had a training loss that was no number"),
        ("val_bpb", 8.01, "d4-grown (seed 1) rose to 8.0100 from 8.0000 untrained"),
        ("val_bpb", math.nan, "rose to nan from 8.0000 untrained"),
    ],
)
def test_one_bad_step_is_a_divergence(tmp_path: Path, key: str, value: float, words: str) -> None:
    records, logs = logged(tmp_path)
    logs["d4-grown", 1][4][key] = value
    claim = divergence(records, logs)
    assert claim.verdict == FAILS
    assert words in claim.evidence


def test_a_model_or_branch_that_ended_in_no_number_is_a_divergence(tmp_path: Path) -> None:
    runs = [grown_series(seed) for seed in range(3)]
    runs[1][3]["val_bpb"] = math.nan
    found = claims(tmp_path, *runs)
    assert found[DIVERGENCE].evidence == "d6-grown (seed 1) ended at nan"
    assert found[MONOTONIC].verdict == FAILS
    runs[1][1]["cooled"][0]["val_bpb"] = None
    evidence = claims(tmp_path, *runs)[DIVERGENCE].evidence
    assert evidence.startswith("the cooled branch of d4-grown (seed 1) at 0.2 ended at nan; d6")
