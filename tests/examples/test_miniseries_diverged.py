"""A model whose loss is no number: said while it trains, in all results, and by the status."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import miniseries
from analysis.records import read_metrics
from trainer import training_loop

TEXT = "the quick brown fox jumps over the lazy dog. " * 99
SMALL = [
    "--depths", "1,2", "--width-per-depth", "16", "--batch-size", "2", "--sequence-len", "16",
    "--fisher-samples", "3", "--threads", "1", "--steps", "5", "--cooldown", "0.2",
    "--shares", "0.6,0.8", "--eval-windows", "2", "--curve-windows", "2", "--curve-points", "2",
]  # fmt: skip


def strict(path: Path) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{path} holds {word}")

    return json.loads(path.read_text(), parse_constant=refuse)


def run(
    arms: str, name: str, monkeypatch: pytest.MonkeyPatch, folder: Path, value: float = math.nan
) -> int:
    """Train, and put something that is no number into the weights of a model."""
    whole = training_loop.step

    def spoil(state: Any, plan: Any, run: Any) -> Any:
        update = whole(state, plan, run)
        if plan.name == name and state.step >= 2:
            with torch.no_grad():
                state.model.wte.weight.fill_(value)
        return update

    monkeypatch.setattr(training_loop, "step", spoil)
    (folder / "text.txt").write_text(TEXT)
    out = str(folder / "out")
    words = ["--data", str(folder / "text.txt"), "--out", out, *SMALL, "--arms", arms]
    return miniseries.main(words)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_it_is_said_everywhere_and_all_files_are_json(
    value: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ["d1-scratch", "d2-grown+distill"]
    for _ in range(2):  # the second time there is nothing to train
        assert run("grown+distill,scratch", "d1-scratch", monkeypatch, tmp_path, value) == 3
        captured = capsys.readouterr()
        assert (
            f"error: {', '.join(names)} diverged, the loss is not a number: lower the"
            in (captured.err.splitlines()[-1])
        )
        assert captured.out.count(" diverged |") == 5  # of the table, and of the account
        assert "nan" not in captured.out.replace("nanosecond", "")
        out = tmp_path / "out"
        records = strict(out / "metrics.json")
        assert [(r["diverged"], r["val_bpb"] is None) for r in records] == [
            (True, True), (True, True), (False, False),
        ]  # fmt: skip
        assert [branch["val_bpb"] for branch in records[1]["cooled"]] == [None, None]
        for path in out.rglob("*.json"):
            strict(path)
        assert [r.diverged for r in read_metrics([out / "metrics.json"])] == [True, True, False]
        assert "diverged: at step 2 its loss is not a number" in (out / "table.md").read_text()


def test_it_is_said_while_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("scratch", "d2-scratch", monkeypatch, tmp_path) == 3
    said = "warning: d2-scratch: diverged: at step 2 its loss is not a number"
    assert capsys.readouterr().err.count(said) == 1


def test_a_cooled_branch_that_diverges_is_said_to_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("grown", "d2-grown@0.6", monkeypatch, tmp_path) == 0
    said = "diverged: at step 3 its loss is not a number"
    captured = capsys.readouterr()
    assert captured.err.count(f"warning: d2-grown@0.6: {said}") == 1
    assert f"- warning: d2-grown: at the share 0.6: {said}" in captured.out
    branch, model = strict(tmp_path / "out/metrics.json")[-1]["cooled"]
    assert (branch["val_bpb"], branch["share"]) == (None, 0.6)
    assert model["val_bpb"] > 0


def test_nothing_is_inherited_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("grown+ewc", "d1-scratch", monkeypatch, tmp_path) == 3
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: d2-grown+ewc cannot inherit from d1-scratch, which has diverged")
    (record,) = strict(tmp_path / "out" / "metrics.json")
    assert (record["name"], record["val_bpb"], record["diverged"]) == ("d1-scratch", None, True)


def test_records_of_older_files_are_read(tmp_path: Path) -> None:
    """They have NaN and no flag."""
    path = Path(__file__).with_name("old_demo_metrics.json")
    records = json.loads(path.read_text())
    assert "diverged" not in records[0]
    records[0]["val_bpb"] = math.nan
    (tmp_path / "old.json").write_text(json.dumps(records))
    assert read_metrics([tmp_path / "old.json"])[0].diverged


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("distill-temperature", "0.01"), ("distill-temperature", "1000"),
        ("distill-strength", "1e12"), ("ewc-strength", "1e12"), ("subspace-strength", "1e12"),
        ("lr", "1e-37"), ("betas", "0.999999,0.999999"),
    ],
)  # fmt: skip
def test_a_few_steps_at_the_ends_of_the_ranges_are_finite(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(miniseries, "_write_analysis", lambda run: None)  # it takes longest
    (tmp_path / "text.txt").write_text(TEXT)
    arms = "grown+ewc+subspace+ars,grown+distill"
    words = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out"), *SMALL]
    assert miniseries.main([*words, "--arms", arms, f"--{name}", value]) == 0
    for record in strict(tmp_path / "out" / "metrics.json"):
        assert 0 < record["val_bpb"] < 100
