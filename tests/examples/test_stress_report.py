"""Tables, intervals and figures of the stress tests."""

import csv
import json
from pathlib import Path
from typing import Any

import matplotlib.axes
import matplotlib.pyplot as plt
import pytest

from corpus import Corpus
from stress.scenarios import Size, load_file
from stress.stress_options import SENSITIVITY_PAIRS, parse_options
from stress.stress_report import (
    draw_scenarios,
    draw_sensitivity,
    summarize,
    tables,
    write_summary,
)
from stress.stress_run import Job

SIZE = Size(1, 32, 24, 2, 20)
METRICS = {
    "final": 3.0, "half": 3.5, "diverged": False, "peak_norm": 1.5, "recovery": 4, "wasted": 2,
    "mean_phi": 0.9, "mean_phi_before": 1.0, "least_phi": 0.1,
}  # fmt: skip
CURVES = {
    "loss": [4.0] * 20, "phi": [1.0] * 10 + [0.1] * 10, "psi": [1.0] * 20, "norm": [1.0] * 21,
    "times": [0, 10, 20], "validation": [8.0, 4.0, None],
}  # fmt: skip


def record(job: Job, **metrics: Any) -> dict[str, Any]:
    identity = {"arm": job.arm, "changes": [list(c) for c in job.changes], "size": {"steps": 20}}
    identity["update"] = {"controller": None if job.arm == "adamw" else {"alpha": 1.0}}
    return {"identity": identity, "metrics": METRICS | metrics, "curves": CURVES}


@pytest.fixture
def jobs() -> list[Job]:
    return [Job("edge", arm, 1.0, s, SIZE) for arm in ("adamw", "default") for s in range(3)]


@pytest.fixture
def records(jobs: list[Job]) -> list[dict[str, Any]]:
    finals = [9.0, 10.0, None, 4.0, 4.5, 5.0]
    lost = [final is None or final > 8 for final in finals]
    return [record(j, final=f, diverged=d) for j, f, d in zip(jobs, finals, lost, strict=True)]


@pytest.fixture
def corpus(text: Path) -> Corpus:
    return load_file(text, 24)


def test_rows_pair_the_seeds_that_both_have_finished(
    jobs: list[Job], records: list[dict[str, Any]]
) -> None:
    plain, default = summarize(jobs, records)
    assert (plain["runs"], plain["diverged"], default["diverged"]) == (3, 3, 0)
    assert plain["final"][0] == 9.5
    assert "against_base" not in plain
    mean, half = default["against_base"]
    assert mean == pytest.approx(-5.25)  # of -5.0 and -5.5; the third has no partner
    assert half == pytest.approx(12.706 * 0.25, rel=1e-3)
    shuffled = [*zip(jobs, records, strict=True)][::-1]
    again = summarize([job for job, _ in shuffled], [r for _, r in shuffled])
    assert again[0]["against_base"] == pytest.approx((mean, half))
    assert plain["not_finite"] == {"final": 1}
    assert default["not_finite"] == {"against_base": 1}


def test_arms_on_adamw_are_paired_with_the_clipped_control(
    jobs: list[Job], records: list[dict[str, Any]]
) -> None:
    more = [Job("edge", arm, 1.0, s, SIZE) for arm in ("adamw-clip", "sgd") for s in range(3)]
    finals = [4.5, 4.5, 5.5] * 2
    rows = summarize(
        [*jobs, *more],
        [*records, *(record(job, final=f) for job, f in zip(more, finals, strict=True))],
    )
    found = {row["arm"]: row.get("against_clipped") for row in rows}
    assert found.keys() == {"adamw", "default", "adamw-clip", "sgd"}
    assert found["adamw"][0] == 5.0  # of 4.5 and 5.5
    mean, half = found["default"]  # of -0.5, 0.0 and -0.5
    assert mean == pytest.approx(-1 / 3)
    assert half == pytest.approx(4.303 / 6, rel=1e-3)
    assert found["adamw-clip"] is found["sgd"] is None
    assert f"| {mean:+.3f} ± {half:.3f} |\n" in tables(rows)


def test_table_and_files(
    jobs: list[Job], records: list[dict[str, Any]], corpus: Corpus, tmp_path: Path
) -> None:
    rows = write_summary(tmp_path, jobs, records, corpus, "python narcissus.py")
    text = (tmp_path / "tables.md").read_text()
    assert text == tables(rows)
    assert "| AdamW | 3 | 100% [44%, 100%] | 9.500 ± 6.353 (1 not finite) |" in text
    line = "| default | 3 | 0% [0%, 56%] | 4.500 ± 1.242 | -5.250 ± 3.177 (1 not finite) |"
    assert line in text
    assert "| default | 1.50 ± 0.00 | 4 ± 0 | 2 ± 0 | 0.900 ± 0.000 |" in text
    with open(tmp_path / "runs.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["arm"], line["seed"]) for line in lines] == [(j.arm, str(j.seed)) for j in jobs]
    assert [line["final"] for line in lines] == ["9.0", "10.0", "", "4.0", "4.5", "5.0"]
    content = json.loads((tmp_path / "summary.json").read_text())
    assert content["command"] == "python narcissus.py"
    assert content["controllers"] == {"adamw": None, "default": {"alpha": 1.0}}
    assert content["rows"][1]["arm"] == "default"
    assert content["corpus"]["sha256"] == corpus.sha256


def test_one_seed_has_no_interval(corpus: Corpus, tmp_path: Path) -> None:
    job = Job("loop", "adamw", 1.0, 0, SIZE)
    write_summary(tmp_path, [job], [record(job)], corpus, "")
    assert "| 3.000 |" in (tmp_path / "tables.md").read_text()
    write_summary(tmp_path, [job], [record(job, final=None)], corpus, "")
    assert "| (1 not finite) |" in (tmp_path / "tables.md").read_text()
    assert "NaN" not in (tmp_path / "summary.json").read_text()


def test_figures_show_every_arm(
    jobs: list[Job], records: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("stress.stress_report.plt.close", drawn.append)
    more = [Job("edge", "sgd", 1.0, 0, SIZE), Job("edge", "adamw", 3.0, 0, SIZE)]
    everything = [*records, *(record(job) for job in more)]
    files = draw_scenarios(tmp_path, [*jobs, *more], everything)
    assert files == [tmp_path / "edge.png"]
    assert files[0].stat().st_size > 1000
    (figure,) = drawn
    monkeypatch.undo()
    plt.close(figure)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["AdamW", "default", "SGD"]


def test_heat_map_of_the_whole_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = parse_options(["--sensitivity", "--seeds", "1", "--scenarios", "edge"]).jobs
    numbers = [float(i) for i in range(len(jobs))]
    records = [record(job, final=n) for job, n in zip(jobs, numbers, strict=True)]
    written: list[str] = []
    original = matplotlib.axes.Axes.text

    def spy(self: Any, x: float, y: float, s: str, *rest: Any, **more: Any) -> Any:
        written.append(s)
        return original(self, x, y, s, *rest, **more)

    monkeypatch.setattr(matplotlib.axes.Axes, "text", spy)
    rows = summarize(jobs, records)
    draw_sensitivity(tmp_path / "map.png", rows, SENSITIVITY_PAIRS)
    assert sorted(float(s) for s in written if "." in s) == numbers
    assert (tmp_path / "map.png").stat().st_size > 1000
