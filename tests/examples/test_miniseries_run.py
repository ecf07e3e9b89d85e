"""The quick series from end to end."""

import hashlib
import json
import math
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import miniseries
from ars.models import GPT, miniseries_config
from corpus import prepare_corpus, validation_windows
from trainer.step_log import read_log
from trainer.training_loop import bits_per_byte

pytestmark = pytest.mark.slow

SCRIPT = Path(miniseries.__file__)
SCRATCH, GROWN = "scratch+ars", "grown+ewc+ars"
NAMES = [
    f"d1-{SCRATCH}", f"d2-{SCRATCH}", f"d2-{GROWN}", f"d3-{SCRATCH}", f"d3-{GROWN}",
]  # fmt: skip


def run(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, SCRIPT, "--quick", "--out", "out", "--threads", "1", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("quick")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(folder)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return {
        "folder": folder,
        "out": folder / "out",
        "stdout": done.stdout,
        "stderr": done.stderr,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "records": json.loads((folder / "out/metrics.json").read_text()),
    }


def test_it_takes_less_than_a_minute_of_one_core(quick: dict[str, Any]) -> None:
    assert quick["cpu_seconds"] < 60


def test_the_table_is_printed_and_saved(quick: dict[str, Any]) -> None:
    table = (quick["out"] / "table.md").read_text()
    assert quick["stdout"].startswith(table)
    rows = [line for line in table.splitlines() if re.match(r"\| (scratch|grown)", line)]
    assert len(rows) == 5
    for row, record in zip(rows, quick["records"], strict=True):
        assert f"{record['val_bpb']:.4f}" in row
    assert "metrics.json" in quick["stdout"].splitlines()[-1]


def test_the_records_are_complete(quick: dict[str, Any]) -> None:
    config = json.loads((quick["out"] / "config.json").read_text())
    assert [r["name"] for r in quick["records"]] == NAMES
    for record in quick["records"]:
        model = GPT(miniseries_config(record["depth"], sequence_len=64))
        assert record["params"] == model.num_parameters()
        assert record["tokens"] == record["steps"] * 8 * 64
        ewc = 5 * record["params"] * record["steps"] if record["arm"] == GROWN else 0
        assert record["flops"] == record["tokens"] * model.flops_per_token() + ewc
        assert record["seconds"] > 0
        assert 1.0 < record["val_bpb"] < 6.0
        assert record["val_bytes"] == 256 * 64
        assert record["seed"] == 0
        assert record["python"] == ".".join(map(str, sys.version_info[:3]))
        assert record["torch"] == str(torch.__version__)
        assert record["data_sha256"] == config["data"]["sha256"]
        inherited = record["arm"] == GROWN
        assert (record["parent"] is not None) == inherited
        assert (record["fisher_flops"] > 0) == inherited


def test_the_arms_of_a_depth_get_equal_flops(quick: dict[str, Any]) -> None:
    for depth in (2, 3):
        arms = {r["arm"]: r for r in quick["records"] if r["depth"] == depth}
        scratch, grown = arms[SCRATCH], arms[GROWN]
        step = scratch["flops"] // scratch["steps"] + grown["flops"] // grown["steps"]
        assert 0 <= scratch["lineage_flops"] - grown["lineage_flops"] < step
        assert scratch["flops"] == scratch["lineage_flops"]
        assert grown["flops"] < grown["lineage_flops"]


def test_the_figures_are_there(quick: dict[str, Any]) -> None:
    for figure in ("loss_validation.png", "loss_training.png"):
        content = (quick["out"] / figure).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000


def test_the_logs_agree_with_the_records(quick: dict[str, Any]) -> None:
    for record in quick["records"]:
        rows = read_log(quick["out"] / f"log_{record['name']}.csv")
        assert [r["step"] for r in rows] == list(range(record["steps"] + 1))
        assert rows[-1]["tokens"] == record["lineage_tokens"]
        assert rows[-1]["tokens"] - rows[0]["tokens"] == record["tokens"]
        assert rows[-1]["flops"] == record["lineage_flops"]
        assert rows[0]["flops"] == record["lineage_flops"] - record["flops"]
        assert all(0 < r["phi"] <= 1 and 0 < r["psi"] <= 1 for r in rows[1:])
        assert rows[-1]["val_bpb"] == pytest.approx(record["val_bpb"], abs=0.5)


def test_a_grown_model_starts_where_its_parents_trunk_ended(quick: dict[str, Any]) -> None:
    for child, parent in ((f"d2-{GROWN}", f"d1-{SCRATCH}"), (f"d3-{GROWN}", f"d2-{GROWN}")):
        content = torch.load(quick["out"] / f"checkpoints/{parent}-trunk.pt", weights_only=True)
        rows = read_log(quick["out"] / f"log_{parent}.csv")
        trunk_end = next(r for r in rows if r["step"] == content["step"])
        first = read_log(quick["out"] / f"log_{child}.csv")[0]
        assert first["step"] == 0
        assert first["val_bpb"] == pytest.approx(trunk_end["val_bpb"], abs=1e-5)
        assert first["lr"] is None


def test_the_schedule_and_the_penalty_are_in_the_log(quick: dict[str, Any]) -> None:
    scratch = read_log(quick["out"] / f"log_d2-{SCRATCH}.csv")[1:]
    inherited = read_log(quick["out"] / f"log_d2-{GROWN}.csv")[1:]
    trunk = torch.load(quick["out"] / f"checkpoints/d2-{GROWN}-trunk.pt", weights_only=True)["step"]
    peak = quick["records"][2]["lr"]
    assert scratch[0]["lr"] == pytest.approx(peak / 20)
    assert [r["lr"] for r in inherited[: trunk + 1]] == [peak] * (trunk + 1)
    cooled = len(inherited) - trunk
    assert [r["lr"] for r in inherited[trunk:]] == pytest.approx(
        [peak * k / cooled for k in range(cooled, 0, -1)]
    )
    assert all(r["penalty"] is None for r in scratch)
    assert inherited[0]["penalty"] == 0  # the anchor is where it starts
    assert all(r["penalty"] > 0 for r in inherited[1:])


def test_the_reported_number_is_that_of_the_saved_model(quick: dict[str, Any]) -> None:
    corpus = prepare_corpus(None, cache=quick["out"] / "data", sequence_len=64)
    windows = validation_windows(corpus.validation, 64, 256)
    record = quick["records"][2]
    content = torch.load(quick["out"] / f"checkpoints/d2-{GROWN}.pt", weights_only=True)
    model = GPT(miniseries_config(2, sequence_len=64))
    model.load_state_dict(content["model"])
    assert bits_per_byte(model, windows, corpus.token_bytes) == pytest.approx(
        record["val_bpb"], abs=1e-6
    )
    assert content["record"] | {"diverged": False} == record


def test_every_checkpoint_loads_safely(quick: dict[str, Any]) -> None:
    files = sorted((quick["out"] / "checkpoints").iterdir())
    trunks = [f"d1-{SCRATCH}-trunk.pt", f"d2-{GROWN}-trunk.pt"]
    assert [f.name for f in files] == sorted([*(f"{n}.pt" for n in NAMES), *trunks])
    for file in files:
        content = torch.load(file, weights_only=True)
        assert {"model", "step", "sha256"} <= content.keys()
        assert ("optimizer" in content) == file.name.endswith("-trunk.pt")


def test_the_whole_training_state_is_inherited(quick: dict[str, Any]) -> None:
    folder = quick["out"] / "checkpoints"
    content = torch.load(folder / f"d2-{GROWN}-trunk.pt", weights_only=True)
    parent = torch.load(folder / f"d1-{SCRATCH}-trunk.pt", weights_only=True)
    model = GPT(miniseries_config(2, sequence_len=64))
    indices = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    (optimizer,) = content["optimizer"]
    own, inherited = content["step"], parent["step"]
    for name, steps in (
        ("wte.weight", own + inherited),
        ("blocks.0.mlp.fc.weight", own + inherited),
        ("blocks.1.mlp.fc.weight", own),
    ):
        assert optimizer["state"][indices[name]]["step"] == steps  # the parent's count on
    content = content["inheritance"]
    importance = content["penalty"]["importance"]
    anchor = content["penalty"]["anchor"]
    assert importance.keys() == anchor.keys() == indices.keys()
    fc = importance["blocks.0.mlp.fc.weight"]
    assert (fc[:256, :64] > 0).float().mean() > 0.5
    assert not fc[256:].any()
    assert not fc[:, 64:].any()
    assert not importance["blocks.1.mlp.fc.weight"].any()
    assert not anchor["wte.weight"][:, 64:].any()  # new channels start at zero


def test_one_progress_bar_a_model(quick: dict[str, Any]) -> None:
    for name in NAMES:
        last = re.findall(rf"{re.escape(name)}: 100%.*", quick["stderr"].replace("\r", "\n"))[-1]
        for shown in ("loss ", "tokens/s", "Phi ", "Psi "):
            assert shown in last
        assert ("penalty " in last) == (GROWN in name)
    assert len(quick["stderr"].replace("\r", "\n").splitlines()) < 60  # a log file keeps them all


def test_nothing_names_a_folder_of_this_machine(quick: dict[str, Any]) -> None:
    for file in quick["out"].iterdir():
        if file.suffix in (".md", ".json", ".csv"):
            assert str(quick["folder"]) not in file.read_text()
            assert sys.prefix not in file.read_text()


def test_a_second_run_only_prints_the_table(quick: dict[str, Any]) -> None:
    def digests() -> dict[str, str]:
        return {
            f.name: hashlib.sha256(f.read_bytes()).hexdigest()
            for f in quick["out"].rglob("*")
            if f.is_file()
        }

    before = digests()
    started = time.monotonic()
    done = run(quick["folder"])
    assert time.monotonic() - started < 60  # starting Python and torch; no step is trained
    assert done.returncode == 0
    table = (quick["out"] / "table.md").read_text()
    assert done.stdout.startswith(table)
    last = done.stdout[len(table) :].strip().splitlines()
    assert len(last) == 1
    assert "already trained" in last[0]
    assert digests() == before


def test_settings_steps_and_tokens_are_printed_before_training(quick: dict[str, Any]) -> None:
    printed = quick["stderr"]
    printed = printed[printed.index("depth  width") :]  # behind the bar of a slow machine
    settings, models = printed.split("\n\n", 1)
    assert [line.split()[0] for line in settings.splitlines()] == ["depth", "d1", "d2", "d3"]
    lines = models.splitlines()
    assert lines[0].split()[:4] == ["model", "trunk", "cooled", "tokens"]
    for line, record in zip(lines[1:], quick["records"], strict=False):
        name, trunk, cooled, tokens = line.split()[:4]
        assert name == record["name"]
        assert int(trunk) + int(cooled) == record["steps"]
        assert tokens == f"{record['tokens']:,}"


def test_a_peak_below_what_was_reached_does_not_cost_the_report(quick: dict[str, Any]) -> None:
    report = quick["out"] / "report.html"
    report.unlink()
    done = run(quick["folder"], "--peak-flops", "1e6")
    assert done.returncode == 0
    warning = done.stderr.splitlines()[-1]
    assert re.match(r"warning: d1-scratch\+ars did \S+ times the operations", warning)
    assert warning.endswith("the report has no MFU")
    assert report.stat().st_size > 10_000


def test_the_loss_is_nats_per_byte(quick: dict[str, Any]) -> None:
    rows = read_log(quick["out"] / "log_d3-scratch+ars.csv")
    assert rows[1]["loss"] == pytest.approx(math.log(256), abs=0.1)
