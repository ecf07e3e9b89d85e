"""What the experiment says, of records made by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from analysis_records import trained

from experiment.series_design import DESIGNS, PREDICTION, Design
from experiment.series_results import records_of, write_results

QUICK = DESIGNS["quick"]
DESIGN = replace(
    QUICK,
    base=replace(QUICK.base, depths=(2, 4), head_dim=64, scratch_shares=(0.4, 1.0)),
    seeds=(0, 1, 2),
    muon_lineage=(1.5,),
    muon_seeds=(),
    subsets={},
    bracket_sizes=(2,),
    brackets={"lr": (1e-3, 1.5e-3)},
    search={"inserted": {"blocks": "inserted"}},
    first_members=2,
)


def keep(results: Path, name: str, *records: dict[str, Any]) -> None:
    path = records_of(name, results)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(records))


def keep_seed(results: Path, seed: int, grown: float) -> None:
    first = trained("d2-grown", 2.9, seed=seed)
    ours = trained("d4-grown", {0.2: 2.9, 0.4: grown}, first, seed=seed)
    keep(results, f"miniature/chain-of-2-seed-{seed}", first, ours)
    keep(results, f"miniature/twin-2-seed-{seed}", trained("d2-scratch", 3.0, seed=seed))
    twin = trained("d4-scratch", {0.4: 2.7, 1.0: 2.5}, seed=seed)
    keep(results, f"miniature/twin-4-seed-{seed}", twin)


def summary(results: Path, design: Design = DESIGN) -> tuple[dict[str, Any], str]:
    page = write_results(results, design, "drawn")
    assert (results / "drawn.md").read_text() == page
    found: dict[str, Any] = json.loads((results / "drawn.json").read_text())
    return found, page


def test_the_saving_and_its_interval_are_those_of_the_seeds(tmp_path: Path) -> None:
    for seed, grown in enumerate((2.4, 2.5, 2.3)):
        keep_seed(tmp_path, seed, grown)
    found, page = summary(tmp_path)
    # d2: 100 steps of 2 x 2; d4: 40 of 4 x 4 instead of 100, and growing.
    paid = (100 * 4 + 40 * 16) * 600_000 + 4 * 8000
    saving = found["saving"]["adamw"]
    assert saving["mean"] == pytest.approx(1 - paid / (100 * (4 + 16) * 600_000))
    assert saving["low"] == pytest.approx(saving["high"])  # every seed pays the same
    assert (saving["seeds"], saving["worse"], saving["compared"]) == (3, 0, 6)
    assert saving["at_equal_loss"]
    assert found["prediction"] == PREDICTION
    assert "at equal loss" in page


@pytest.mark.parametrize(("seeds", "counts"), [(2, "half"), (3, "miniature")])
def test_the_longest_series_with_three_seeds_is_the_one_that_counts(
    tmp_path: Path, seeds: int, counts: str
) -> None:
    longer = {"members": 11, "seeds": seeds, "mean": 0.6}
    e = {"series": "adamw", "members": 11, "growth_factor": 1.23, "e": 0.9}
    content = {"saving": {"adamw": longer}, "efficiency": [e]}
    (tmp_path / "miniature.json").write_text(json.dumps(content))
    for seed in range(3):
        keep_seed(tmp_path, seed, 2.4)
    write_results(tmp_path, DESIGN, "half")
    found = json.loads((tmp_path / "series.json").read_text())
    assert list(found) == ["prediction", "saving", "efficiency"]
    assert found["saving"]["adamw"]["design"] == counts
    assert found["saving"]["adamw"]["members"] == {"half": 2, "miniature": 11}[counts]
    assert [row["members"] for row in found["efficiency"]] == [11, 2]


def test_a_member_above_its_twin_is_no_saving_at_equal_loss(tmp_path: Path) -> None:
    for seed, grown in enumerate((2.4, 2.6)):
        keep_seed(tmp_path, seed, grown)
    saving = summary(tmp_path)[0]["saving"]["adamw"]
    assert not saving["at_equal_loss"]
    assert saving["worse"] == 1
    assert saving["deficit"] == pytest.approx(0.0)


def test_growing_is_held_against_the_same_steps_from_random_weights(tmp_path: Path) -> None:
    for seed, grown in enumerate((2.4, 2.5, 2.3)):
        keep_seed(tmp_path, seed, grown)
    (row,) = summary(tmp_path)[0]["same_budget"]
    assert (row["size"], row["seeds"]) == ("d4", 3)
    assert (row["share_grown"], row["share_scratch"]) == (0.4, 0.4)
    assert row["difference"] == pytest.approx(2.4 - 2.7)
    assert row["low"] < row["difference"] < row["high"] < 0


def test_a_seed_without_a_twin_is_left_out_and_said(tmp_path: Path) -> None:
    keep_seed(tmp_path, 0, 2.4)
    first = trained("d2-grown", 2.9, seed=1)
    ours = trained("d4-grown", {0.2: 2.9, 0.4: 2.4}, first, seed=1)
    keep(tmp_path, "miniature/chain-of-2-seed-1", first, ours)
    found, page = summary(tmp_path)
    assert found["saving"]["adamw"]["seeds"] == 1
    assert "Only 1 seed of 2" in page


def test_brackets_have_the_value_of_the_others_among_them(tmp_path: Path) -> None:
    for stage, loss, rate in (("twin", 3.0, "0.001"), ("first-twin", 4.0, "0.0015")):
        keep(tmp_path, f"{stage}/2-as-reported", trained("d2-scratch", loss, seed=100))
        keep(tmp_path, f"{stage}/2-lr-{rate}", trained("d2-scratch", loss + 0.1, seed=100))
    first, second = summary(tmp_path)[0]["brackets"]
    row = {"size": 2, "setting": "lr"}
    assert first == {**row, "batch_size": 1, "bits_per_byte": {"0.001": 3.1, "0.0015": 3.0}}
    assert second == {**row, "batch_size": 4, "bits_per_byte": {"0.0015": 4.1, "0.003": 4.0}}


def test_a_searched_chain_is_held_against_the_twins_of_its_own_seed(tmp_path: Path) -> None:
    keep_seed(tmp_path, 0, 2.4)
    first = trained("d2-grown", 2.9, seed=200)
    ours = trained("d4-grown", {0.2: 2.9, 0.4: 2.45}, first, seed=200)
    keep(tmp_path, "search/chain-inserted-seed-200", first, ours)
    keep(tmp_path, "search/twin-2-seed-200", trained("d2-scratch", 3.0, seed=200))
    keep(tmp_path, "search/twin-4-seed-200", trained("d4-scratch", 2.44, seed=200))
    account = summary(tmp_path)[0]["accounts"]["search: inserted"]
    assert account["members"][1]["difference"]["mean"] == pytest.approx(0.01)


def test_nothing_is_said_without_records(tmp_path: Path) -> None:
    found, page = summary(tmp_path)
    assert found["saving"] == {}
    assert "No series is complete yet." in page
