"""The account of a grown series beside its twins, by hand."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from analysis_records import DEMO, grown_series, trained, write

from analysis.equal_loss import ABOVE, AT_MOST, Bounded
from analysis.records import Record, read_metrics
from analysis.series_account import (
    AT_LEAST,
    BELOW,
    MemberAccount,
    SeriesAccount,
    account_of,
    describe_account,
    find_accounts,
    formula_saving,
    own_accounts,
    transfer_efficiency,
)

Entries = list[dict[str, Any]]

# Operations of d2, d4 and d6 from scratch: 100 steps of 6 x 1000 d x 100 d.
D2, D4, D6 = (60_000_000 * d * d for d in (2, 4, 6))


def read(tmp_path: Path, *runs: Entries) -> list[Record]:
    return read_metrics([write(tmp_path / f"{i}.json", run) for i, run in enumerate(runs)])


def only(tmp_path: Path, *runs: Entries) -> SeriesAccount:
    (account,) = find_accounts(read(tmp_path, *runs))
    return account


def by_size(account: SeriesAccount) -> dict[str, MemberAccount]:
    return {member.size: member for member in account.members}


def test_every_operation_is_counted_once(tmp_path: Path) -> None:
    account = only(tmp_path, grown_series(fisher=1_000_000))
    assert (account.arm, account.baseline, account.seeds) == ("grown", "scratch", 1)
    growth = 4 * 2000 * (4 + 6)
    paid = D2 + 0.4 * D4 + 0.4 * D6 + growth + 2 * 1_000_000
    assert account.paid.mean == pytest.approx(paid / (D2 + D4 + D6), rel=1e-12)
    assert account.saving.mean == pytest.approx(1 - paid / (D2 + D4 + D6), rel=1e-12)
    assert account.tokens.mean == pytest.approx((2 + 0.4 * 4 + 0.4 * 6) / (2 + 4 + 6))
    assert account.seconds is not None
    assert account.seconds.mean == pytest.approx((4 + 0.4 * 16 + 0.4 * 36) / (4 + 16 + 36))
    assert [m.size for m in account.members] == ["d2", "d4", "d6"]
    first, second, third = account.members
    assert (first.is_twin, first.paid.mean, first.added.mean) == (True, 1.0, 0.0)
    assert second.paid.mean == pytest.approx(0.4 + (1_000_000 + 4 * 8000) / D4)
    assert second.added.mean == pytest.approx((1_000_000 + 4 * 8000) / D4)
    # The lineage of d6: 90 steps of d2, 30 of d4, 40 of its own, two growths and Fisher passes.
    lineage = 0.9 * D2 + 0.3 * D4 + 0.4 * D6 + growth + 2 * 1_000_000
    assert third.lineage_flops.mean == pytest.approx(lineage / D6, rel=1e-12)
    assert third.lineage_tokens.mean == pytest.approx((0.9 * 2 + 0.3 * 4 + 0.4 * 6) / 6)


def test_what_an_arm_adds_to_its_steps_is_paid(tmp_path: Path) -> None:
    account = only(tmp_path, grown_series(extra=10_000))
    assert by_size(account)["d4"].paid.mean == pytest.approx(0.4 + (40 * 10_000 + 32_000) / D4)


def test_the_share_at_equal_loss_and_what_a_token_was_worth(tmp_path: Path) -> None:
    account = only(tmp_path, grown_series(gain=0.05))
    member = by_size(account)["d4"]
    # From 2.65 at 0.2 to 2.45 at 0.4 the twin's 2.5 lies at three quarters of the way.
    share = 0.2 * 2**0.75
    assert member.equal_steps == Bounded(pytest.approx(share))
    low, high = ((s * D4 + 32_000) / D4 for s in (0.2, 0.4))
    assert member.equal_flops == Bounded(pytest.approx(low * (high / low) ** 0.75))
    assert member.growth_factor == 2.0
    assert member.efficiency == Bounded(pytest.approx((1 - share) * 2.0 / 0.9))
    assert account.growth_factor == pytest.approx(math.sqrt(2.0 * 1.5))
    assert account.efficiency == Bounded(pytest.approx((1 - share) * (2.0 + 1.5) / 2 / 0.9))
    assert by_size(account)["d2"].equal_steps == Bounded(1.0)
    assert by_size(account)["d2"].efficiency is None


@pytest.mark.parametrize(
    ("gain", "share", "bound", "of_e"),
    [(0.3, 0.2, AT_MOST, AT_LEAST), (-0.01, 0.4, ABOVE, BELOW)],
)
def test_bounds_are_said(tmp_path: Path, gain: float, share: float, bound: str, of_e: str) -> None:
    account = only(tmp_path, grown_series(gain=gain))
    assert by_size(account)["d4"].equal_steps == Bounded(share, bound)
    assert by_size(account)["d4"].efficiency == Bounded(pytest.approx((1 - share) * 2 / 0.9), of_e)
    assert account.efficiency == Bounded(pytest.approx((1 - share) * 1.75 / 0.9), of_e)
    text = describe_account(read(tmp_path, grown_series(gain=gain)))
    assert f"{bound} {share:.2f}" in text
    assert ("was worth" in text) == (of_e == AT_LEAST), "an upper bound of e says nothing"


def test_a_saving_at_equal_loss_needs_every_member_of_every_seed(tmp_path: Path) -> None:
    runs = [grown_series(seed, 0.05 + 0.01 * seed) for seed in range(3)]
    account = only(tmp_path, *runs)
    assert (account.at_equal_loss, account.worse, account.compared) == (True, 0, 6)
    assert account.deficit == pytest.approx(-0.06)
    assert account.sentences[0].endswith(
        "44% of their seconds: 56% saved at equal loss, all 6 models compared end at or below "
        "their twins."
    )
    (said,) = [each for each in only(tmp_path, grown_series()[:3]).sentences if "saved" in each]
    assert said.endswith("the one model compared ends at or below its twin.")
    (d4,) = (r for r in runs[1] if r["name"] == "d4-grown")
    d4["val_bpb"] = d4["cooled"][-1]["val_bpb"] = 2.7
    account = only(tmp_path, *runs)
    assert (account.at_equal_loss, account.worse) == (False, 1)
    assert by_size(account)["d4"].difference.mean == pytest.approx((0.2 - 0.05 - 0.07) / 3)
    assert account.sentences[0].endswith(
        "no saving is claimed, as this is at unequal loss, 1 of 6 models end above their twins "
        "(largest mean difference +0.0267 bits per byte)."
    )


def test_equal_to_the_last_digit_is_not_worse(tmp_path: Path) -> None:
    account = only(tmp_path, grown_series(gain=0.0))
    assert account.at_equal_loss
    assert by_size(account)["d6"].equal_steps == Bounded(pytest.approx(0.4))


def test_intervals_are_over_the_seeds(tmp_path: Path) -> None:
    account = only(tmp_path, *(grown_series(s, g) for s, g in enumerate((0.04, 0.05, 0.06))))
    member = by_size(account)["d6"]
    assert member.difference.values == pytest.approx((-0.04, -0.05, -0.06))
    assert member.difference.interval == pytest.approx((-0.05 - 0.02484, -0.05 + 0.02484), abs=1e-5)
    assert member.equal_steps is not None
    assert member.equal_steps.interval is not None
    assert account.paid.interval == pytest.approx((account.paid.mean, account.paid.mean))
    assert "An example" not in " ".join(account.sentences)


def test_a_model_that_diverged_claims_nothing(tmp_path: Path) -> None:
    for name in ("d4-grown", "d4-scratch"):
        runs = [grown_series(seed) for seed in range(3)]
        (record,) = (r for r in runs[1] if r["name"] == name)
        record["val_bpb"], record["cooled"][-1]["val_bpb"], record["diverged"] = None, None, True
        account = only(tmp_path, *runs)
        assert (account.at_equal_loss, account.worse, account.diverged) == (False, 0, 1)
        assert account.efficiency is None
        assert "no saving is claimed, as 1 of 6 pairs diverged" in account.sentences[0]
        content = json.dumps(account.to_dict(), allow_nan=False)
        assert json.loads(content)["members"][1]["difference"]["mean"] is None


def test_a_branch_that_diverged_is_no_crossing(tmp_path: Path) -> None:
    run = grown_series()
    run[1]["cooled"][0]["val_bpb"] = None
    assert by_size(only(tmp_path, run))["d4"].equal_steps == Bounded(0.4, AT_MOST)


def test_seeds_without_all_members_are_left_out_and_said(tmp_path: Path) -> None:
    account = only(tmp_path, grown_series(0), grown_series(1)[:3])
    assert (account.seeds, account.left_out) == (1, 1)
    assert account.sentences[-1] == "Only 1 seed of 2 have every member and twin."
    run = [r for r in grown_series() if r["name"] != "d4-scratch"]
    assert find_accounts(read(tmp_path, run)) == []
    assert describe_account(read(tmp_path, run)).startswith("No series account: it takes a chain")


def test_a_model_from_scratch_that_was_not_trained_in_full_is_no_twin(tmp_path: Path) -> None:
    run = grown_series()
    for share, found in ((0.5, 0), (1.0, 1)):
        run[-1] = trained("d6-scratch", {0.2: 2.6, share: 2.2})
        assert len(find_accounts(read(tmp_path, run))) == found
    # Beyond its own training it is another model: the twin is its branch at 1.
    run[-1] = trained("d6-scratch", {1.0: 2.2, 2.0: 2.0})
    account = only(tmp_path, run)
    assert by_size(account)["d6"].twin_loss.mean == 2.2
    assert account.paid.mean == pytest.approx(only(tmp_path, grown_series()).paid.mean)


def test_a_first_member_of_its_own_is_paid_and_says_nothing_of_e(tmp_path: Path) -> None:
    first = trained("d2-grown", {1.0: 3.0, 1.5: 2.9})
    ours = trained("d4-grown", {0.2: 2.6, 0.4: 2.4}, first)
    account = only(tmp_path, [trained("d2-scratch", 3.0), trained("d4-scratch", 2.5), first, ours])
    assert account.paid.mean == pytest.approx((1.5 * D2 + 0.4 * D4 + 4 * 8000) / (D2 + D4))
    assert (account.compared, account.at_equal_loss) == (2, True)
    assert [m.is_twin for m in account.members] == [False, False]
    assert account.members[1].equal_steps is not None
    assert account.efficiency is account.members[1].efficiency is None


def test_twins_have_the_optimizer_and_the_controller_and_adamw_is_shown_too(tmp_path: Path) -> None:
    run = grown_series() + grown_series(arm="grown+ewc+ars", root="scratch+ars")
    pairs = [(a.arm, a.baseline) for a in find_accounts(read(tmp_path, run))]
    assert pairs == [
        ("grown", "scratch"), ("grown+ewc+ars", "scratch+ars"), ("grown+ewc+ars", "scratch"),
    ]  # fmt: skip
    account = find_accounts(read(tmp_path, run))[2]
    assert (account.members[0].is_twin, account.compared) == (False, 3)
    assert account.efficiency is account.members[1].efficiency is None, "of another optimizer"
    own = own_accounts(find_accounts(read(tmp_path, run)))
    assert [(a.arm, a.baseline) for a in own] == pairs[:2]
    without = [r for r in run if r["name"] != "d6-scratch+ars"]
    own = own_accounts(find_accounts(read(tmp_path, without)))
    assert [(a.arm, a.baseline) for a in own] == [pairs[0], pairs[2]]


def test_twins_may_come_from_other_runs(tmp_path: Path) -> None:
    chain, twins = grown_series(), grown_series()
    ours = read(tmp_path, [r for r in chain if r["name"] not in ("d4-scratch", "d6-scratch")])
    tuned = read(tmp_path, [{**r, "seconds": 1.0} for r in twins if r["arm"] == "scratch"])
    account = account_of("grown", "scratch", ours, tuned)
    assert account is not None
    assert account.members[0].is_twin
    assert account.paid.mean == only(tmp_path, chain).paid.mean


def test_one_jump_is_a_series_of_two(tmp_path: Path) -> None:
    first, last = trained("d2-scratch", 3.0), trained("d6-scratch", 2.2)
    run = [first, trained("d6-grown", {0.2: 2.4, 0.4: 2.1}, first), last]
    account = only(tmp_path, run)
    assert account.growth_factor == account.members[1].growth_factor == 3.0
    assert account.paid.mean == pytest.approx((D2 + 0.4 * D6 + 4 * 12_000) / (D2 + D6))


def test_records_of_the_old_trainer_have_no_account() -> None:
    assert find_accounts(read_metrics([DEMO])) == []
    assert "No series account" in describe_account(read_metrics([DEMO]))


def test_a_reader_sees_the_table_and_what_it_says(tmp_path: Path) -> None:
    text = describe_account(read(tmp_path, grown_series()))
    assert text.startswith("The series d2 ... d6 (grown) took 44% of its twins' operations")
    assert "A token of a parent's trunk was worth 1.29 of a child's" in text
    lines = text.splitlines()[2:]
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        "member", "parameters", "growth", "twin's loss", "its loss", "difference", "paid",
        "equal at", "with lineage",
    ]  # fmt: skip
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "d2", "2,000", "from scratch", "3.0000", "3.0000", "", "1.00", "", "1.00",
    ]  # fmt: skip
    assert [cell.strip() for cell in lines[4].split("|")[1:-1]] == [
        "d6", "6,000", "x 1.50", "2.2000", "2.1500", "-0.0500", "0.40", "0.34", "0.63",
    ]  # fmt: skip
    assert lines[5].split("|")[7].strip() == "0.44"
    assert (
        "d6 alone, with everything it grew out of, cost 0.63 of its twin's operations, and its "
        "lineage has read 0.90 times its twin's tokens." in text
    )
    assert "An example, not a proof: 1 seed." in text
    assert "Twin: the model from scratch of the same size, trained in full." in lines[-1]


def test_more_than_the_twins_is_not_called_saved(tmp_path: Path) -> None:
    account = only(tmp_path, grown_series(fisher=D6))
    assert account.saving.mean < -0.5
    assert f"{-account.saving.mean:.0%} more at equal loss" in account.sentences[0]


def test_the_formula_is_that_of_a_series_whose_members_cost_g_squared() -> None:
    g, c, e, delta, n = 1.5, 0.2, 0.8, 0.01, 5
    costs = [g ** (2 * k) for k in range(n)]
    paid = costs[0] + sum(cost * (1 - (1 - c) * e / g + delta) for cost in costs[1:])
    assert formula_saving(e, g, c, n, delta) == pytest.approx(1 - paid / sum(costs), rel=1e-12)
    w = (g**2 - 1) / (g ** (2 * n) - 1)
    assert formula_saving(e, g, c, n) == pytest.approx((1 - c) * e / g * (1 - w), rel=1e-12)
    assert formula_saving(1.0, 1.0, 0.0, 4) == pytest.approx(0.75)
    assert formula_saving(e, g, c, 1) == 0.0
    growing = [formula_saving(e, g, c, 20) for g in (1.2, 1.5, 2.0, 4.0)]
    assert all(a > b for a, b in pairwise(growing))


def test_the_efficiency_undoes_the_share_of_the_formula() -> None:
    g, c, e, delta = 1.3, 0.1, 0.83, 0.02
    share = 1 - (1 - c) * e / g + delta
    assert transfer_efficiency(share, g, c, delta) == pytest.approx(e, rel=1e-12)


@pytest.mark.parametrize(
    ("g", "c", "n", "words"),
    [(0.9, 0.1, 3, "growth factor"), (math.nan, 0.1, 3, "growth factor"),
     (1.5, 1.0, 3, "cooled share"), (1.5, -0.1, 3, "cooled share"), (1.5, 0.1, 0, "1 member")],
)  # fmt: skip
def test_shapes_that_are_none_are_refused(g: float, c: float, n: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        formula_saving(0.5, g, c, n)
    if n:
        with pytest.raises(ValueError, match=words):
            transfer_efficiency(0.5, g, c)
