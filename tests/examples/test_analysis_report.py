"""The report: whole, self-contained, saying what is true; and what a run leaves in its folder."""

import base64
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analysis_records import DEMO, byte_tokens, grown_series, trained, write, write_run
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import report_figures, run_report
from analysis.bundle import MINI_BUNDLE, load_bundle
from analysis.core import CORE_TASKS, CoreResult, TaskResult, evaluate
from analysis.costs import CostAnalyzer
from analysis.records import Log, Logs, read_metrics
from analysis.run_report import (
    Analysis,
    analyze_runs,
    gate_rows,
    render_report,
    write_run_analysis,
)
from analysis.series_account import find_accounts
from ars.models import GPT, miniseries_config
from common.errors import UsageError

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags nest, and collects text, images and whatever would be fetched."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[bytes] = []
        self.fetched: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href") and value is not None:
                found = re.fullmatch(r"data:image/png;base64,([A-Za-z0-9+/=]+)", value)
                if found is None:
                    self.fetched.append(value)
                else:
                    self.images.append(base64.b64decode(found[1]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def render(analysis: Analysis, *, draw: bool = False) -> Page:
    with pytest.MonkeyPatch.context() as patch:
        if not draw:  # which takes longest
            patch.setattr(run_report, "_figures", lambda *_: {})
        html = render_report(analysis)
    page = Page(html)
    assert page.fetched == []
    assert all(image.startswith(b"\x89PNG") and len(image) > 5000 for image in page.images)
    assert "<script" not in html
    return page


def analyze(*paths: Path, **settings: Any) -> Analysis:
    return analyze_runs(paths, bootstraps=5, **settings)


METHODS = (
    "scratch", "scratch+muon", "grown", "grown+ewc", "grown+ewc+subspace", "grown+distill",
)  # fmt: skip


def experiment(tmp_path: Path, seeds: int) -> list[Path]:
    """Thirteen arms on three sizes, as an experiment has them, in a folder a controller."""
    paths = []
    for seed in range(seeds):
        for suffix in ("", "+ars"):
            noise = 0.002 * ((seed + len(suffix)) % 3)
            run = grown_series(seed, root=f"scratch{suffix}", arm=f"grown{suffix}")
            for i, method in enumerate(METHODS):
                # A penalty costs 0.01, Muon gains 0.1, the controller does nothing.
                if method in ("scratch", "grown"):
                    continue
                for twin in [r for r in run if r["arm"] == f"scratch{suffix}"]:
                    if not method.startswith("grown"):
                        bpb = twin["val_bpb"] - 0.1 + noise
                        run.append(trained(f"{twin['size']}-{method}{suffix}", bpb, seed=seed))
                chain = grown_series(seed, 0.03 - 0.01 * i - noise, f"{method}{suffix}",
                                     f"scratch{suffix}")  # fmt: skip
                run += [r for r in chain if method.startswith("grown") and r["parent"]]
                if "ewc" in method:
                    run[-1]["pulls"] = {"step": [10, 40], "wte": [1.0, 2.0], "lm_head": [0.0, 2.0]}
            run.append(trained(f"d6-other{suffix}", 2.3, seed=seed))
            paths.append(write_run(tmp_path / f"seed-{seed}{suffix}", run))
    return paths


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Page:
    paths = experiment(tmp_path_factory.mktemp("experiment"), 3)
    return render(analyze(*paths, peak_flops=1e12, price_per_hour=0.5), draw=True)


def test_the_result_stands_first_and_the_claims_follow(whole: Page) -> None:
    words = (
        "The series d2 ... d6 (grown) took 44% of its twins' operations (scratch)",
        "What the series cost",
        "What is shown, and what is not",
        "Is a grown model better than its twin from scratch, which takes more steps? Fewer bits",
        "Do penalties or a teacher add anything to plain growing? No benefit shown. More bits",
        "Does the controller add anything? No benefit shown. No difference beyond chance:",
        "60 % cheaper: the series",
        "The same score with under 75 % of the tokens",
        "Monotonic improvement",
        "No divergence",
        "No warning during training",
        "Ways to train, compared",
        "Scaling laws",
        "What the controller and the penalties did",
    )
    places = [whole.text.index(word) for word in words]
    assert places == sorted(places)


def test_everything_is_in_the_report_of_many_arms(whole: Page) -> None:
    assert len(whole.images) == 7, "no controller and no penalty is in these logs"
    for words in (
        "grown+ewc+subspace+ars grown+ewc+subspace d6 3",  # what the controller does
        "grown+distill+ars grown+ars d4 3",  # what the penalty adds
        "grown scratch+muon d6 3",
        "scratch+muon+ars scratch+ars d2 3",
        "grown+ewc+ars beside its twins, scratch+ars",
        "grown+ewc+ars beside its twins, scratch member",
        "x 2.00 2.5000 ± 0.0000 2.4500 ± 0.0000 -0.0500 ± 0.0000 0.40",
        "d10 ... d20 on paper",
        "7.2B",
        "No logs of a controller or a penalty",
        "Where the penalties pull: the norm of their gradient in each layer",
        "L(N, D) does not describe them",
    ):
        assert words in whole.text, words
    assert "CORE" not in whole.text
    # A reason is given once, not once an arm.
    assert whole.text.count("models of this series were grown") == 1


def test_the_report_of_one_seed_concludes_nothing(tmp_path: Path) -> None:
    page = render(analyze(write_run(tmp_path, grown_series())))
    verdict = "No conclusion from fewer than 3 seeds: grown at d4, d6."
    assert verdict in page.text
    assert page.text.count("not shown") >= 4


def test_metrics_without_logs_are_enough(tmp_path: Path) -> None:
    page = render(analyze(DEMO), draw=True)
    assert len(page.images) == 3, "and nothing of a series account, of which it knows nothing"
    assert "What the series cost" not in page.text


@pytest.mark.parametrize(("gain", "verdict"), [(0.1, "56% saved"), (-0.1, "no saving is claimed")])
def test_what_was_trained_and_gained_comes_first(gain: float, verdict: str, tmp_path: Path) -> None:
    sign = math.copysign(1.0, gain)
    paths = [
        write(tmp_path / f"{i}.json", grown_series(i, gain + sign * 0.01 * i)) for i in range(3)
    ]
    page = render(analyze(*paths))
    words = (
        "15 models of 3 sizes, d2 to d6, ", verdict, "twin the model of the same size",
        "What the series cost", "What is shown, and what is not", "60 % cheaper",
    )  # fmt: skip
    places = [page.text.index(each) for each in words]
    assert places == sorted(places)
    loss = "No benefit shown. More bits per byte: grown at d4, d6."
    assert (loss in page.text) is (gain < 0)


@pytest.mark.parametrize(
    ("seconds", "words"), [(42.4, "42 seconds"), (600.0, "10 minutes"), (9000.0, "2.5 hours")]
)
def test_how_long_training_took_is_said(seconds: float, words: str, tmp_path: Path) -> None:
    records = grown_series()
    for record in records:
        record["seconds"] = seconds / len(records)
    assert (
        f"1 seed, {words} of training" in render(analyze(write(tmp_path / "m.json", records))).text
    )


def test_warnings_are_listed_with_their_models(tmp_path: Path) -> None:
    records = grown_series()
    records[1]["warnings"] = ["penalty above the task loss", "Omega collapsed"]
    records[3]["warnings"] = ["penalty above the task loss"]
    page = render(analyze(write_run(tmp_path, records)))
    assert "penalty above the task loss d4-grown (seed 0), d6-grown (seed 0)" in page.text
    assert "Omega collapsed d4-grown (seed 0)" in page.text
    records[1]["warnings"] = ["the penalty, 5.2, exceeds the task loss, 1e-03"]
    records[3]["warnings"] = ["the penalty, 7, exceeds the task loss, 1.5"]
    page = render(analyze(write_run(tmp_path, records)))
    words = "task loss, … d4-grown (seed 0: 5.2, 1e-03), d6-grown (seed 0: 7, 1.5)"
    assert f"the penalty, …, exceeds the {words}" in page.text
    assert "No warning" not in page.text


def test_a_model_that_diverged_is_said_and_left_out_of_the_figures(tmp_path: Path) -> None:
    records = grown_series()
    records[3]["val_bpb"] = math.nan
    analysis = analyze(write_run(tmp_path, records))
    assert [r.name for r in analysis.records if r not in analysis.healthy] == ["d6-grown"]
    page = render(analysis, draw=True)
    assert "d6-grown (seed 0) ended at nan" in page.text
    for record in records:
        record["val_bpb"] = math.nan
    page = render(analyze(write_run(tmp_path, records)), draw=True)
    assert page.images == []


def test_gates_of_controllers_and_penalties(tmp_path: Path) -> None:
    records = read_metrics([write_run(tmp_path, grown_series())])
    rows: Log = [
        {"step": s, "tokens": 10 * s, "flops": 10**7 * s, "loss": 5.0 / s, "val_bpb": None,
         "phi": 0.5 if s == 7 else 1.0, "psi": 0.75, "penalty": 1e-3}
        for s in range(1, 401)
    ]  # fmt: skip
    rows.insert(0, {**dict.fromkeys(rows[0]), "step": 0, "flops": 0, "val_bpb": 8.0})
    silent: Log = [{**row, "phi": None, "psi": None, "penalty": None} for row in rows]
    logs = {("d4-grown", 0): rows, ("d4-scratch", 0): silent}
    (gate,) = gate_rows(records, logs)
    assert (gate["name"], gate["steps"], gate["psi"]) == ("d4-grown", 400, 0.75)
    assert gate["phi"] == pytest.approx(1 - 0.5 / 400)
    assert gate["damped"] == 1 / 400
    assert gate["penalty"] == pytest.approx(1e-3 / (5.0 / 400))
    page = render(replace(analyze(tmp_path / "metrics.json"), logs=logs))
    assert "No logs of a controller" not in page.text
    assert "d4-grown 0 400 0.9988 0.2% 0.7500" in page.text
    assert report_figures.gates(logs, records) is not None
    assert report_figures.gates({("d4-scratch", 0): silent}, records) is None


def test_the_shares_of_the_operations_are_those_of_the_first_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, list[float]] = {}

    def barh(_: Axes, arms: list[str], values: Any, *, label: str, **look: Any) -> None:
        assert arms == ["scratch", "grown"]
        drawn[label] = list(values)

    runs = [grown_series(0, fisher=10**6), grown_series(1, fisher=10**7)]
    records = read_metrics([write(tmp_path / f"{i}.json", run) for i, run in enumerate(runs)])
    monkeypatch.setattr(Axes, "barh", barh)
    monkeypatch.setattr(Axes, "legend", lambda *_, **__: None)
    monkeypatch.setattr(Axes, "set_xlim", lambda *_, **__: None)
    report_figures.costs(CostAnalyzer().analyze(records), records)
    d2, d4, d6 = (60_000_000 * d * d for d in (2, 4, 6))
    assert drawn == {
        "training": [d2 + d4 + d6, d2 + (d4 + d6) * 2 // 5],
        "what the arm adds to its steps": [0, 0],
        "Fisher pass": [0, 2 * 10**6],
        "growing": [0, 4 * 2000 * (4 + 6)],
    }


def _legend(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def test_loss_curves_are_of_the_first_seed_and_of_a_models_own_operations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [grown_series(seed) for seed in range(2)]
    records = read_metrics([write(tmp_path / f"{i}.json", run) for i, run in enumerate(runs)])
    logs: Logs = {}
    for record in records:
        before = record.lineage_flops - record.flops
        losses = (8.0, 5.0, None, math.nan, 3.0 + record.seed)
        logs[(record.name, record.seed)] = [
            {"flops": before + 10 * i, "val_bpb": loss} for i, loss in enumerate(losses)
        ]
    figures: list[Figure] = []
    monkeypatch.setattr(report_figures, "_png", lambda figure: figures.append(figure) or b"png")
    assert report_figures.loss_curves(logs, records) == b"png"
    panels = [axes for axes in figures[0].axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["d2", "d4", "d6"]
    assert [len(axes.get_lines()) for axes in panels] == [1, 2, 2]
    for axes in panels:
        for line in axes.get_lines():
            assert np.asarray(line.get_xydata()).tolist() == [[0, 8.0], [10, 5.0], [40, 3.0]]
    assert report_figures.loss_curves({}, records) is None


def test_the_figures_of_an_account_show_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [grown_series(seed, 0.05 + 0.01 * seed) for seed in range(3)]
    records = read_metrics([write(tmp_path / f"{i}.json", run) for i, run in enumerate(runs)])
    accounts = find_accounts(records)
    figures: list[Figure] = []
    monkeypatch.setattr(report_figures, "_png", lambda figure: figures.append(figure) or b"")
    report_figures.series_costs(accounts)
    report_figures.cooled_branches(accounts)
    (axes,) = figures[0].axes
    d2, d4, d6 = (60_000_000 * d * d for d in (2, 4, 6))
    own = [d2, d2 + 0.4 * d4 + 32_000, d2 + 0.4 * (d4 + d6) + 80_000]
    points = [line.get_xydata() for line in axes.get_lines() if len(line.get_xydata()) == 3]
    assert np.asarray(points[0]) == pytest.approx(
        np.array([(d2, 3.0), (d2 + d4, 2.5), (d2 + d4 + d6, 2.2)])
    )
    grown = next(p for p in points if p[1][0] < d2 + d4)
    assert np.asarray(grown) == pytest.approx(
        np.array(list(zip(own, (3.0, 2.44, 2.14), strict=True)))
    )
    assert _legend(axes)[-1] == "each grown out of the one before (grown): 56% saved"
    panels = [axes for axes in figures[1].axes if axes.get_visible()]
    equal = [member.equal_steps for member in accounts[0].members[1:]]
    assert [axes.get_title() for axes in panels] == [
        f"{size}\ngrown, equal: {share.value:.2f}"
        for size, share in zip(("d4", "d6"), equal, strict=True)
    ]
    assert list(panels[0].get_xticks()) == [share for share, _ in accounts[0].members[1].branches]


def test_no_saving_is_drawn_where_a_member_is_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = read_metrics([write(tmp_path / "m.json", grown_series(gain=-0.01))])
    figures: list[Figure] = []
    monkeypatch.setattr(report_figures, "_png", lambda figure: figures.append(figure) or b"")
    report_figures.series_costs(find_accounts(records))
    report_figures.cooled_branches(find_accounts(records))
    assert _legend(figures[0].axes[0])[-1] == "each grown out of the one before (grown)"
    assert figures[1].axes[0].get_title().endswith("equal: above 0.40")


def test_tasks_that_are_not_core_are_not_called_core() -> None:
    analysis = analyze(DEMO)
    model = GPT(miniseries_config(1, sequence_len=64))
    result = evaluate(model, load_bundle(MINI_BUNDLE), byte_tokens, bos=10, max_tokens=64)
    page = render(replace(analysis, core={"d6-grown": result.to_dict()}))
    assert "Tasks: d6-grown" in page.text
    assert "not CORE: 22 of 22 tasks are missing" in page.text
    assert "CORE: d6-grown" not in page.text
    assert "mini_schema" in page.text
    tasks = tuple(TaskResult(t, 100, 0.7, 0.4, 0.3, 0.05, 0.06, 2, 0, 3) for t in CORE_TASKS)
    broken = CoreResult((replace(tasks[0], cut=7), *tasks[1:]), (), (), max_per_task=100)
    page = render(replace(analysis, core={"gpt": broken.to_dict()}))
    assert "Tasks: gpt not CORE: 7 items lost a part of what is scored" in page.text
    assert "+0.400 ± 0.050 +0.300 ± 0.060 2 7 3" in page.text
    whole = CoreResult(tasks, missing=(), altered=(), max_per_task=100)
    page = render(replace(analysis, core={"gpt": whole.to_dict()}))
    assert "CORE: gpt" in page.text
    assert "CORE 0.4000 ± 0.0107 (baselines of version 1), 0.3000 ± 0.0128" in page.text
    assert "at most 100 items a task" in page.text


def test_where_a_penalty_pulls_is_shown_of_the_largest_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [grown_series(seed, arm="grown+ewc") for seed in range(2)]
    paths = [write(tmp_path / f"{i}.json", run) for i, run in enumerate(runs)]
    assert report_figures.pulls(read_metrics(paths)) is None
    for run in runs:
        for record in run:
            if record["parent"] is not None:
                seed, depth = record["seed"], record["depth"]
                record["pulls"] = {
                    "step": [10, 40], "wte": [0.0, 3.0], "blocks.0": [0.5 + seed, 4.0], "_$": [0, 0]
                }  # fmt: skip
                if depth == 4:
                    record["pulls"]["wte"] = [9.0, 9.0]
    paths = [write(tmp_path / f"{i}.json", run) for i, run in enumerate(runs)]
    figures: list[Figure] = []
    monkeypatch.setattr(report_figures, "_png", lambda figure: figures.append(figure) or b"png")
    assert report_figures.pulls(read_metrics(paths)) == b"png"
    axes = figures[0].axes[0]
    assert axes.get_title() == "grown+ewc, d6"
    (mesh,) = axes.collections
    assert mesh.get_array().tolist() == [[None, 3.0], [0.5, 4.0], [None, None]]
    assert (mesh.norm.vmin, mesh.norm.vmax) == (4e-6, 4.0)
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 10, 40]


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    record = {**grown_series()[0], "name": "<b>&d2", "arm": "<i>scratch"}
    page = render(analyze(write(tmp_path / "m.json", [record])))
    assert "<b>&d2" in page.text
    assert "There is nothing to compare" in page.text


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_report, "_figures", lambda *_: {})


@pytest.mark.usefixtures("no_figures")
def test_the_files_of_a_run_lie_in_its_folder(tmp_path: Path) -> None:
    records = grown_series()
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
    assert models["d6-grown"]["warnings"] == ["penalty above the task loss"]
    assert models["d6-grown"]["curve"]["val_bpb"][-1] == pytest.approx(2.15)
    assert models["d4-grown"]["curve"]["step"] == list(range(9))
    cost = json.loads((tmp_path / "metrics" / "cost_analysis.json").read_text())
    assert (cost["peak_flops"], cost["price_per_hour"], cost["devices"]) == (1e12, 2.0, None)
    assert "penalty above the task loss" in (tmp_path / "report.html").read_text()
    # Again, over what is there.
    assert write_run_analysis(tmp_path) == names


@pytest.mark.usefixtures("no_figures")
def test_the_number_of_devices_is_the_recorded_one(tmp_path: Path) -> None:
    records = [{**record, "devices": 4} for record in grown_series()]
    write_run(tmp_path, records)
    write_run_analysis(tmp_path, price_per_hour=3600.0)
    cost = json.loads((tmp_path / "metrics" / "cost_analysis.json").read_text())
    assert cost["models"][0]["devices"] == 4
    assert cost["models"][0]["price"] == pytest.approx(4.0 * 4)


@pytest.mark.usefixtures("no_figures")
def test_a_run_that_diverged_is_reported_all_the_same(tmp_path: Path) -> None:
    records = grown_series()
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


@pytest.mark.usefixtures("no_figures")
def test_a_run_that_is_not_finished_is_reported_as_far_as_it_is(tmp_path: Path) -> None:
    write_run(tmp_path, grown_series())
    write(tmp_path / "metrics.json", grown_series()[:2])
    write_run_analysis(tmp_path)
    assert "There is nothing to compare" in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("no_figures")
def test_a_peak_that_cannot_be_true_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_run(tmp_path, grown_series())
    with pytest.raises(UsageError, match="true peak"):
        write_run_analysis(tmp_path, peak_flops=10.0)
    assert not (tmp_path / "metrics").exists()
    with pytest.raises(UsageError, match="cannot be read"):
        write_run_analysis(tmp_path / "absent")


@pytest.mark.usefixtures("no_figures")
def test_a_run_takes_few_resamples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def analyze_runs(paths: list[Path], **settings: object) -> None:
        seen.update(settings)
        raise UsageError("enough")

    monkeypatch.setattr(run_report, "analyze_runs", analyze_runs)
    with pytest.raises(UsageError, match="enough"):
        write_run_analysis(tmp_path)
    assert seen["bootstraps"] == 50
