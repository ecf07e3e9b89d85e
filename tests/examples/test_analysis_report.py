"""The HTML report: whole, self-contained, and saying what is true."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from analysis_records import DEMO, two_arms, write

from analysis.bundle import MINI_BUNDLE, load_bundle
from analysis.core import CORE_TASKS, CoreResult, TaskResult, byte_tokens, evaluate
from analysis.cost import CostAnalyzer
from analysis.paper import plan_cost, plan_doubling
from analysis.records import Log, Record, read_metrics
from analysis.report_html import gate_rows, render_report
from analysis.savings import find_savings
from analysis.scaling import ScalingLawValidator
from analysis.series_laws import fit_series
from analysis.verdict import compare_arms
from ars.models import GPT, miniseries_config

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


def render(
    records: list[Record],
    logs: dict[tuple[str, int], Log] | None = None,
    core: dict[str, dict[str, Any]] | None = None,
) -> Page:
    html = render_report(
        records,
        logs or {},
        compare_arms(records),
        find_savings(records, logs or {}),
        fit_series(records, ScalingLawValidator(bootstraps=10)),
        CostAnalyzer(peak_flops=1e12, price_per_hour=0.5).analyze(records),
        {"A plan": plan_cost(plan_doubling())},
        core,
    )
    page = Page(html)
    assert page.fetched == []
    assert all(image.startswith(b"\x89PNG") and len(image) > 5000 for image in page.images)
    assert "<script" not in html
    return page


@pytest.fixture(scope="module")
def demo() -> Page:
    return render(read_metrics([DEMO]))


def test_the_report_of_the_demo(demo: Page) -> None:
    assert len(demo.images) == 4
    verdict = "Nothing is shown either way. inherited against scratch: no conclusion from fewer"
    assert demo.text.index(verdict) < demo.text.index("Models")
    bpb = {(r["depth"], r["arm"]): r["val_bpb"] for r in json.loads(DEMO.read_text())}
    measured = bpb[4, "inherited"]
    numbers = f"{measured:.4f}", f"{measured - bpb[4, 'scratch']:+.4f}"
    for words in ("d4-inherited", *numbers, "3,276,800", "not fitted: 3 runs cannot",
                  "A plan", "7.2B", "No log_*.csv lie beside"):  # fmt: skip
        assert words in demo.text
    assert "CORE" not in demo.text


def test_logs_add_the_gates_and_several_seeds_a_conclusion(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / f"{i}.json", two_arms(i, gain)) for i, gain in enumerate((0.1, 0.11, 0.12))
    ]
    records = read_metrics(paths)
    rows: Log = [
        {"step": s, "flops": 10**7 * s, "loss": 5.0 / s, "val_bpb": 7.0 / s if s % 9 == 0 else None,
         "phi": 0.5 if s == 7 else 1.0, "psi": 0.75, "penalty": 1e-3}
        for s in range(1, 401)
    ]  # fmt: skip
    rows.insert(0, {**dict.fromkeys(rows[0]), "step": 0, "flops": 0, "val_bpb": 8.0})
    logs = {
        ("d3-inherited", 0): rows,
        ("d3-scratch", 0): [*rows[:11], {**rows[11], "val_bpb": 0.5}],
    }
    gate, _ = gate_rows(records, logs)
    assert (gate["name"], gate["steps"], gate["psi"]) == ("d3-inherited", 400, 0.75)
    assert gate["phi"] == pytest.approx(1 - 0.5 / 400)
    assert gate["damped"] == 1 / 400
    assert gate["penalty"] == pytest.approx(1e-3 / (5.0 / 400))
    page = render(records, logs)
    assert len(page.images) == 5
    assert "fewer bits per byte for the same FLOPs at d3, d4" in page.text
    assert "No benefit" not in page.text
    assert "inherited to scratch d3 1 of 1" in page.text
    assert "No log_*.csv" not in page.text


def test_a_loss_is_said_first(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / f"{i}.json", two_arms(i, -g)) for i, g in enumerate((0.1, 0.11, 0.12))
    ]
    page = render(read_metrics(paths))
    assert "No benefit shown. inherited against scratch: more bits per byte" in page.text


def test_tasks_that_are_not_core_are_not_called_core() -> None:
    records = read_metrics([DEMO])
    model = GPT(miniseries_config(1, sequence_len=64))
    result = evaluate(model, load_bundle(MINI_BUNDLE), byte_tokens, bos=10, max_tokens=64)
    page = render(records, core={"d4-inherited": result.to_dict()})
    assert "Tasks: d4-inherited" in page.text
    assert "not CORE: 22 of 22 tasks are missing" in page.text
    assert "CORE: d4-inherited" not in page.text
    assert "mini_schema" in page.text
    tasks = tuple(TaskResult(t, 100, 0.7, 0.4, 0.3, 0.05, 0.06, 2, 0) for t in CORE_TASKS)
    whole = CoreResult(tasks, missing=(), altered=(), max_per_task=100)
    page = render(records, core={"gpt": whole.to_dict()})
    assert "CORE: gpt" in page.text
    assert "CORE 0.4000 ± 0.0107 (baselines of version 1), 0.3000 ± 0.0128" in page.text
    assert "at most 100 items a task" in page.text


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    record = {**two_arms()[0], "name": "<b>&d2", "arm": "<i>scratch"}
    page = render(read_metrics([write(tmp_path / "m.json", [record])]))
    assert "<b>&d2" in page.text
    assert "There is nothing to compare" in page.text
