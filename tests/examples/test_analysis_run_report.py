"""What a training run leaves in its own folder."""

import json
import math
from pathlib import Path

import pytest
from analysis_records import curve, entry, two_arms, write, write_run

from analysis import run_report
from analysis.run_report import write_run_analysis
from analysis.training_log import rounded, run_settings, thinned_curve
from trainer.errors import UsageError


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_report, "_figures", lambda *_: {})


def test_the_files_of_a_run_lie_in_its_folder(tmp_path: Path) -> None:
    records = two_arms()
    records[3]["warnings"] = ["penalty above the task loss"]
    write_run(tmp_path, records, lr=3e-3)
    names = write_run_analysis(tmp_path, peak_flops=1e12, price_per_hour=2.0)
    assert names == [
        "metrics/training_log.json", "metrics/scaling_laws.json", "metrics/cost_analysis.json",
        "report.html",
    ]  # fmt: skip
    assert all((tmp_path / name).is_file() for name in names)
    log = json.loads((tmp_path / "metrics" / "training_log.json").read_text())
    (run,) = log["runs"]
    assert (run["run"], run["settings"]["lr"]) == (tmp_path.name, 3e-3)
    models = {model["name"]: model for model in log["models"]}
    assert list(models) == [record["name"] for record in records]
    assert models["d4-grown"]["warnings"] == ["penalty above the task loss"]
    assert models["d4-grown"]["curve"]["val_bpb"][-1] == pytest.approx(2.1)
    assert models["d3-grown"]["curve"]["step"] == list(range(9))
    cost = json.loads((tmp_path / "metrics" / "cost_analysis.json").read_text())
    assert (cost["peak_flops"], cost["price_per_hour"], cost["devices"]) == (1e12, 2.0, None)
    assert "penalty above the task loss" in (tmp_path / "report.html").read_text()
    # Again, over what is there.
    assert write_run_analysis(tmp_path) == names


def test_the_number_of_devices_is_the_recorded_one(tmp_path: Path) -> None:
    records = [{**record, "devices": 4} for record in two_arms()]
    write_run(tmp_path, records)
    write_run_analysis(tmp_path, price_per_hour=3600.0)
    cost = json.loads((tmp_path / "metrics" / "cost_analysis.json").read_text())
    assert cost["models"][0]["devices"] == 4
    assert cost["models"][0]["price"] == pytest.approx(20.0 * 4)


def test_a_run_that_diverged_is_reported_all_the_same(tmp_path: Path) -> None:
    records = two_arms()
    for record in records[1:]:
        record["val_bpb"] = math.nan
    write_run(tmp_path, records)
    write_run_analysis(tmp_path)
    laws = json.loads((tmp_path / "metrics" / "scaling_laws.json").read_text())
    assert laws["claims"][3]["verdict"] == "does not hold"
    assert {c["conclusion"] for c in laws["comparisons"]} == {
        "diverged in 1 of 1 seed, scratch diverged in 1 of 1 seed"
    }
    log = json.loads((tmp_path / "metrics" / "training_log.json").read_text())
    assert log["models"][1]["val_bpb"] is None


def test_a_run_that_is_not_finished_is_reported_as_far_as_it_is(tmp_path: Path) -> None:
    write_run(tmp_path, two_arms())
    write(tmp_path / "metrics.json", two_arms()[:2])
    write_run_analysis(tmp_path)
    assert "There is nothing to compare" in (tmp_path / "report.html").read_text()


def test_a_peak_that_cannot_be_true_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_run(tmp_path, two_arms())
    with pytest.raises(UsageError, match="true peak"):
        write_run_analysis(tmp_path, peak_flops=10.0)
    assert not (tmp_path / "metrics").exists()
    with pytest.raises(UsageError, match="cannot be read"):
        write_run_analysis(tmp_path / "absent")


def test_a_run_takes_few_resamples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def analyze_runs(paths: list[Path], **settings: object) -> None:
        seen.update(settings)
        raise UsageError("enough")

    monkeypatch.setattr(run_report, "analyze_runs", analyze_runs)
    with pytest.raises(UsageError, match="enough"):
        write_run_analysis(tmp_path)
    assert seen["bootstraps"] == 50


def test_curves_are_thinned_to_where_validation_was_measured() -> None:
    record = entry("d2-scratch", 3.0)
    rows = curve(record, 8.0, 3.2)
    for row in rows:
        row["phi"] = None
        row["loss"] = None if row["step"] == 0 else float(row["step"])
        if row["step"] not in (0, 3, 8):
            row["val_bpb"] = None
    thin = thinned_curve(rows)
    assert thin["step"] == [0, 3, 8]
    assert thin["flops"] == [row["flops"] for row in rows if row["step"] in (0, 3, 8)]
    assert thin["loss"] == [None, 2.0, 6.0], "means of 1, 2, 3 and of 4 ... 8"
    assert thin["lr"][0] is None
    assert thin["lr"][2] == rounded(rows[8]["lr"]), "not a mean"
    assert "phi" not in thin
    assert thinned_curve(rows, ("flops",)) == {"flops": thin["flops"]}
    assert thinned_curve([]) == {}


def test_settings_hold_no_paths_of_the_machine(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    path = write_run(folder, two_arms(), data=str(tmp_path / "text.txt"), words=["a/b", "/c/d"])
    (run,) = run_settings([path, tmp_path / "absent" / "metrics.json"])
    assert run["settings"]["data"] == "text.txt"
    assert run["settings"]["words"] == ["a/b", "d"]
    assert run["settings"]["depths"] == [2, 3, 4]


def test_json_has_no_word_for_what_is_no_number() -> None:
    assert [rounded(v) for v in (None, 5, 1.23456789, math.inf)] == [None, 5, 1.23457, None]
