"""An experiment summed up, finished or not."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from analysis_records import chain_of, entry, two_arms, write, write_run

from analysis import report_figures, run_report
from analysis.records import Record, read_metrics
from common.errors import UsageError
from experiment import experiment_report
from experiment.experiment_report import write_summary
from experiment.findings import find_sweeps


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_report, "_figures", lambda *_: {})


PNG = b"\x89PNG"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What the figures were asked to draw: the arms, or the strengths."""
    seen: dict[str, list[str]] = {}

    def of_arms(name: str) -> Any:
        def draw(records: list[Record], *_: Any) -> bytes:
            seen[name] = list(dict.fromkeys(r.arm for r in records))
            return PNG

        return draw

    def of_grid(grid: Any) -> bytes:
        seen["grid"] = [f"{c.ewc} {c.subspace}" for c in grid.cells]
        return PNG

    monkeypatch.setattr(experiment_report, "loss_against_flops", of_arms("flops"))
    monkeypatch.setattr(experiment_report, "bpb_against_depth", of_arms("depth"))
    monkeypatch.setattr(experiment_report, "grid_map", of_grid)
    return seen


def tune(folder: Path) -> None:
    for rate, bpb in ((1e-3, 2.6), (2e-3, 2.5), (4e-3, 2.55)):
        records = [entry("d2-scratch", bpb + 0.5, seed=100), entry("d3-scratch", bpb, seed=100)]
        write_run(folder / "tune" / f"lr-{rate:g}", records, lr=rate, muon_lr=0.02)
    for rate, bpb in ((0.01, 2.4), (0.02, 2.3)):
        records = [entry("d3-scratch+muon", bpb, seed=100)]
        write_run(folder / "tune" / f"muon-lr-{rate:g}", records, lr=3e-3, muon_lr=rate)
    records = [entry("d2-scratch", 3.0, seed=100)]
    for strength, bpb in ((0.03, 2.5), (0.1, 2.4), (0.3, 2.45)):
        records += chain_of(f"grown+distill={strength:g}", "scratch", [bpb], 100)
    records += chain_of("grown", "scratch", [2.6], 100)
    write_run(folder / "tune" / "distill", records, lr=3e-3, muon_lr=0.02)


def grid(folder: Path) -> None:
    for seed in (100, 101):
        records = [entry("d2-scratch", 3.0, seed=seed)]
        for arm, bpb in (("grown", 2.4), ("grown+ewc=0.5+subspace=0.05", 2.41),
                         ("grown+ewc=1", 2.42)):  # fmt: skip
            records += chain_of(arm, "scratch", [bpb + 0.01 * seed], seed)
        write_run(folder / "grid" / f"seed-{seed}", records)


def arms(folder: Path, seeds: int = 3) -> None:
    for seed in range(seeds):
        records = two_arms(seed, 0.1 + 0.001 * seed)
        records[1]["warnings"] = ["penalty above the task loss"]
        write_run(folder / "arms" / f"seed-{seed}", records)
        controlled = [entry(f"d{d}-scratch+ars", b, seed=seed) for d, b in ((2, 3.0), (3, 2.5))]
        controlled += chain_of("grown+ars", "scratch+ars", [2.4, 2.1], seed)
        write_run(folder / "arms" / f"seed-{seed}-ars", controlled)


def sum_up(folder: Path, *left_out: str) -> str:
    """Sum up all series that are there."""
    there = {f"{p.parts[-3]}/{p.parts[-2]}" for p in folder.glob("*/*/metrics.json")}
    return write_summary(folder, there - {*left_out})


def content(folder: Path) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    text = (folder / "summary.json").read_text()
    found: dict[str, Any] = json.loads(text, parse_constant=refuse)
    assert str(folder) not in text, "no path of the machine"
    return found


def test_all_stages_are_summed_up(tmp_path: Path, drawn: dict[str, list[str]]) -> None:
    tune(tmp_path)
    grid(tmp_path)
    arms(tmp_path)
    table = sum_up(tmp_path)
    assert table == (tmp_path / "table.md").read_text()
    assert table.startswith("- Does inheriting beat"), "nothing is unfinished"
    found = content(tmp_path)
    assert found["versions"].keys() == {"ars", "numpy"}
    assert found["data"] == {"kind": "text"}
    runs = {run["run"]: run for run in found["runs"]}
    assert len(runs) == 3 + 2 + 1 + 2 + 6
    assert runs["arms/seed-1"]["seed"] == 1
    assert runs["tune/lr-0.002"]["settings"]["lr"] == 2e-3
    assert len(found["models"]) == 3 * 2 + 2 + 5 + 2 * 4 + 3 * (5 + 4)
    model = next(m for m in found["models"] if (m["run"], m["name"]) == ("arms/seed-2", "d4-grown"))
    assert model["val_bpb"] == two_arms(2, 0.102)[3]["val_bpb"], "every digit"
    assert set(model["curve"]) == {"tokens", "flops", "val_bpb", "loss"}
    assert "seed" not in model
    assert len(found["comparisons"]) == 4 + 2 + 2
    assert {s["arm"] for s in found["savings"]} == {"grown", "grown+ars", "scratch+ars"}
    assert [c["verdict"] for c in found["claims"]][2:] == ["holds", "holds"]
    assert len(found["grid"]["cells"]) == 2
    # The arms without a controller come first, and the grid's and the tuning's are not among them.
    expected = ["scratch", "grown", "scratch+ars", "grown+ars"]
    assert sorted(drawn["flops"]) == sorted(drawn["depth"]) == sorted(expected)
    assert drawn["grid"] == ["0.5 0.05", "1.0 None"]
    for name in ("arms_flops.png", "arms_depth.png", "grid.png"):
        assert (tmp_path / name).read_bytes() == PNG
    report = (tmp_path / "report.html").read_text()
    for words in ("Tuning", "Strengths of the penalties", "Does inheriting pay?"):
        assert words in report


def test_the_table_says_what_matters_first(tmp_path: Path, drawn: dict[str, list[str]]) -> None:
    tune(tmp_path)
    grid(tmp_path)
    arms(tmp_path)
    table = sum_up(tmp_path)
    words = (
        "- Does inheriting beat training from scratch at equal FLOPs? Fewer bits per byte: grown",
        "- Does the controller add anything? ",
        "| 60 % cheaper",
        "| d4 | grown | 3 | 2.0990 ± 0.0025 | 8.000e+09 | 130,000 | 40 |",
        "| grown | scratch | d3 | 3 | -0.1010 | [-0.1035, -0.0985] | 1.000 | better |",
        "| grown | d3 | 3 of 3 |",
        "## Strengths, d2 grown to d3",
        "A search, not a test: 2 seeds.",
        "| 0.5 |  | **+0.0100** ± 0.0000 |",
        "| AdamW learning rate | d3 | 0.001: 2.6000, 0.002: 2.5000, 0.004: 2.5500 | 0.002 | yes |",
        "| Muon learning rate | d3 | 0.01: 2.4000, 0.02: 2.3000 | 0.02 | no, at the edge |",
        "| distillation strength | d3 | 0: 2.6000, 0.03: 2.5000, 0.1: 2.4000, "
        "0.3: 2.4500 | 0.1 | yes |",
        "- d3-grown, seed 0: penalty above the task loss",
    )
    places = [table.index(word) for word in words]
    assert places == sorted(places)


def test_an_experiment_that_has_only_begun_is_summed_up(
    tmp_path: Path, drawn: dict[str, list[str]]
) -> None:
    with pytest.raises(UsageError, match="no finished model yet"):
        sum_up(tmp_path)
    tune(tmp_path)
    (tmp_path / "arms" / "seed-0").mkdir(parents=True)  # nothing is finished there
    table = sum_up(tmp_path)
    assert table.startswith("## Tuning")
    assert content(tmp_path)["claims"] == []
    assert not (tmp_path / "report.html").exists()
    assert drawn == {}
    grid(tmp_path)
    assert "## Strengths" in sum_up(tmp_path)
    assert (tmp_path / "report.html").exists()
    assert content(tmp_path)["comparisons"] == [], "the grid's arms are not the experiment's"
    arms(tmp_path, seeds=1)
    path = tmp_path / "arms" / "seed-0" / "metrics.json"
    write(path, json.loads(path.read_text())[:2])
    assert "arms/seed-0 (grown, scratch)" in sum_up(tmp_path)


def test_series_of_another_design_are_left_out_and_named(
    tmp_path: Path, drawn: dict[str, list[str]]
) -> None:
    tune(tmp_path)
    arms(tmp_path, seeds=2)
    table = sum_up(tmp_path, "tune/lr-0.004", "arms/seed-1", "arms/seed-1-ars")
    words = "this design has no such series: tune/lr-0.004, arms/seed-1, arms/seed-1-ars."
    assert f"Left out, since {words}\n" in table
    assert "| AdamW learning rate | d3 | 0.001: 2.6000, 0.002: 2.5000 | 0.002 |" in table
    assert {m["run"] for m in content(tmp_path)["models"]} == {
        "tune/lr-0.001", "tune/lr-0.002", "tune/muon-lr-0.01", "tune/muon-lr-0.02",
        "tune/distill", "arms/seed-0", "arms/seed-0-ars",
    }  # fmt: skip


def test_a_model_that_diverged_has_no_number(tmp_path: Path, drawn: dict[str, list[str]]) -> None:
    records = two_arms()
    records[4]["val_bpb"] = math.nan
    write_run(tmp_path / "arms" / "seed-0", records)
    assert "d4-scratch (seed 0) ended at nan" in sum_up(tmp_path)
    found = content(tmp_path)
    assert [m["val_bpb"] for m in found["models"] if m["name"] == "d4-scratch"] == [None]


def test_a_change_of_a_model_is_a_change_of_a_line(
    tmp_path: Path, drawn: dict[str, list[str]]
) -> None:
    arms(tmp_path)
    sum_up(tmp_path)
    lines = (tmp_path / "summary.json").read_text().splitlines()
    assert sum('"d4-grown"' in line and '"curve"' in line for line in lines) == 3
    assert max(map(len, lines)) < 3000


def test_tuning_leaves_out_what_diverged_or_varied_nothing(tmp_path: Path) -> None:
    def records_of(*entries: dict[str, Any]) -> list[Record]:
        return read_metrics([write(tmp_path / "m.json", list(entries))])

    lost = records_of(entry("d2-scratch", math.nan))
    fine = records_of(entry("d2-scratch", 2.0), entry("d2-other", 1.0))
    assert find_sweeps([({"lr": 1e-3}, fine), ({"lr": 2e-3}, lost)]) == []
    assert find_sweeps([({"lr": "rule"}, fine), ({"lr": 2e-3}, fine)]) == []
    (sweep,) = find_sweeps([({"lr": 1e-3}, fine), ({"lr": 2e-3}, fine), ({"lr": 2e-3}, fine)])
    assert [len(loss.values) for loss in sweep.losses] == [1, 2]


def test_two_settings_of_an_arm_are_varied_one_at_a_time(tmp_path: Path) -> None:
    runs = []
    for i, (muon, beside) in enumerate(
        ((0.01, 3e-3), (0.02, 3e-3), (0.04, 3e-3), (0.02, 6e-3), (0.02, 1e-3))
    ):
        path = write(tmp_path / f"{i}.json", [entry("d2-scratch+muon", 2.0 + i / 10)])
        runs.append(({"muon_lr": muon, "muon_adamw_lr": beside, "lr": 9.0}, read_metrics([path])))
    muon_sweep, beside_sweep = find_sweeps(runs)
    assert (muon_sweep.setting, muon_sweep.values) == ("Muon learning rate", (0.01, 0.02, 0.04))
    assert [loss.values for loss in muon_sweep.losses] == [(2.0,), (2.1,), (2.2,)]
    assert beside_sweep.setting == "learning rate of AdamW beside Muon"
    assert [loss.values for loss in beside_sweep.losses] == [(2.4,), (2.1,), (2.3,)]


def test_plain_growing_is_a_distillation_without_strength(tmp_path: Path) -> None:
    records = [entry("d2-scratch", 3.0)]
    for arm, bpb in (("grown", 2.3), ("grown+distill=0.1", 2.4), ("grown+distill=1", 2.6),
                     ("grown+ewc=2", 1.0), ("grown+ars", 1.0)):  # fmt: skip
        records += chain_of(arm, "scratch", [bpb])
    found = read_metrics([write(tmp_path / "m.json", records)])
    (sweep,) = find_sweeps([({}, found)])
    assert (sweep.values, sweep.best, sweep.at_edge) == ((0.0, 0.1, 1.0), 0.0, False)
    assert report_figures.sweep_curves([sweep]).startswith(PNG)
    grid_only = [record for record in found if "distill" not in record.arm]
    assert find_sweeps([({}, grid_only)]) == []
