"""The quick series from end to end."""

import hashlib
import json
import math
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import miniseries
from ars.models import GPT, miniseries_config
from corpus import prepare_corpus, validation_windows
from trainer.settings import QUICK
from trainer.step_log import read_log
from trainer.training_loop import bits_per_byte

pytestmark = pytest.mark.slow

SCRIPT = Path(miniseries.__file__)
SCRATCH, GROWN = "scratch+ars", "grown+ars"
NAMES = [
    f"2x32-{SCRATCH}", f"3x32-{SCRATCH}", f"3x32-{GROWN}", f"3x48-{SCRATCH}", f"3x48-{GROWN}",
]  # fmt: skip
*SHARES, SHARE = QUICK["shares"]  # of the branches beside a grown model, and its own
STARTS = [round(60 * share) - 6 for share in SHARES]
TRUNK = round(60 * SHARE) - 6
LOGS = [*NAMES, *(f"{size}-{GROWN}@{share}" for size in ("3x32", "3x48") for share in SHARES)]


def model_of(record: dict[str, Any]) -> GPT:
    width = record["width"]
    return GPT(miniseries_config(record["depth"], width=width, head_dim=16, sequence_len=64))


def cpu_seconds() -> float:
    """Of the processes that have been waited for, whatever else the machine does."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


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
    before = cpu_seconds()
    done = run(folder)
    spent = cpu_seconds() - before
    assert done.returncode == 0, done.stderr
    return {
        "folder": folder,
        "out": folder / "out",
        "stdout": done.stdout,
        "stderr": done.stderr,
        "cpu_seconds": spent,
        "records": json.loads((folder / "out/metrics.json").read_text()),
    }


def test_it_takes_less_than_a_minute_of_one_core(quick: dict[str, Any]) -> None:
    assert quick["cpu_seconds"] < 60


def test_the_table_is_printed_and_saved(quick: dict[str, Any]) -> None:
    table = (quick["out"] / "table.md").read_text()
    assert quick["stdout"].startswith(table)
    rows = [line for line in table.splitlines() if re.match(r"\| \dx\d\d ", line)]
    assert len(rows) == 5
    for row, record in zip(rows, quick["records"], strict=True):
        assert f"{record['val_bpb']:.4f}" in row
    account = quick["stdout"][len(table) :]
    assert "The series 2x32 ... 3x48" in account
    flops = {record["name"]: record["flops"] for record in quick["records"]}
    twins = sum(flops[name] for name in NAMES if SCRATCH in name)
    paid = (flops[NAMES[0]] + sum(flops[name] for name in NAMES if GROWN in name)) / twins
    assert re.search(rf"\n\| series +\|.* {paid:.2f} ", account)
    assert "metrics.json" in account.splitlines()[-1]


def test_the_records_are_complete(quick: dict[str, Any]) -> None:
    config = json.loads((quick["out"] / "config.json").read_text())
    assert [r["name"] for r in quick["records"]] == NAMES
    for record in quick["records"]:
        model = model_of(record)
        assert record["size"] == f"{record['depth']}x{record['width']}"
        assert record["params"] == model.num_parameters()
        assert record["tokens"] == record["steps"] * 4 * 64
        assert record["flops_per_step"] == 4 * 64 * model.flops_per_token()
        assert record["flops"] == record["steps"] * record["flops_per_step"]
        assert record["seconds"] > 0
        assert 1.0 < record["val_bpb"] < 6.0
        assert record["val_bytes"] == 64 * 64
        assert record["seed"] == 0
        assert record["python"] == ".".join(map(str, sys.version_info[:3]))
        assert record["torch"] == str(torch.__version__)
        assert record["data_sha256"] == config["data"]["sha256"]
        inherited = record["arm"] == GROWN
        assert (record["parent"] is not None) == inherited
        assert (record["growth_flops"] > 0) == inherited
        assert record["full_steps"] == 60
        assert (record["share"], record["trunk_steps"]) == (
            (SHARE, TRUNK) if inherited else (1.0, 54)
        )
        assert record["steps"] == record["trunk_steps"] + 6


def test_the_cooled_branches_are_recorded_and_the_last_is_the_model(quick: dict[str, Any]) -> None:
    for record in quick["records"]:
        *branches, last = record["cooled"]
        assert (last["share"], last["steps"]) == (record["share"], record["steps"])
        assert [branch["share"] for branch in branches] == (
            SHARES if record["arm"] == GROWN else []
        )
        for branch, start in zip(branches, STARTS, strict=False):
            assert (branch["start"], branch["steps"]) == (start, start + 6)
            assert branch["tokens"] == branch["steps"] * 4 * 64
            assert branch["flops"] == branch["steps"] * record["flops_per_step"]
            assert 0 < branch["seconds"] < 60
        losses = [branch["val_bpb"] for branch in record["cooled"]]
        assert losses == sorted(losses, reverse=True)  # longer is better
        assert losses[-1] == record["val_bpb"]


def test_a_branch_goes_on_from_a_state_of_the_trunk(quick: dict[str, Any]) -> None:
    trunk = read_log(quick["out"] / f"log_3x48-{GROWN}.csv")
    for share, start in zip(SHARES, STARTS, strict=True):
        first, *rows = read_log(quick["out"] / f"log_3x48-{GROWN}@{share}.csv")
        assert [first["step"], *(r["step"] for r in rows)] == list(range(start, start + 7))
        kept = next(r for r in trunk if r["step"] == start)
        for key in ("val_bpb", "tokens", "flops", "seconds"):
            assert first[key] == kept[key]
        assert rows[0]["loss"] == trunk[start + 1]["loss"]  # before its first own update
        assert rows[0]["lr"] == trunk[start]["lr"]
        assert rows[1]["lr"] == pytest.approx(rows[0]["lr"] * (1 - (1 / 6) ** 0.5))


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
    pairs = ((f"3x32-{GROWN}", f"2x32-{SCRATCH}", 54), (f"3x48-{GROWN}", f"3x32-{GROWN}", TRUNK))
    for child, parent, step in pairs:
        rows = read_log(quick["out"] / f"log_{parent}.csv")
        trunk_end = next(r for r in rows if r["step"] == step)
        first = read_log(quick["out"] / f"log_{child}.csv")[0]
        assert first["step"] == 0
        assert first["val_bpb"] == pytest.approx(trunk_end["val_bpb"], abs=1e-5)
        assert first["lr"] is None


def test_the_schedule_is_in_the_log(quick: dict[str, Any]) -> None:
    scratch = read_log(quick["out"] / f"log_3x32-{SCRATCH}.csv")[1:]
    grown = read_log(quick["out"] / f"log_3x32-{GROWN}.csv")[1:]
    peak = quick["records"][2]["lr"]
    assert scratch[0]["lr"] == pytest.approx(peak / 20)
    assert [r["lr"] for r in grown[: TRUNK + 1]] == [peak] * (TRUNK + 1)
    assert [r["lr"] for r in grown[TRUNK:]] == pytest.approx(
        [peak * (1 - (k / 6) ** 0.5) for k in range(6)]
    )


def test_the_reported_number_is_that_of_the_saved_model(quick: dict[str, Any]) -> None:
    corpus = prepare_corpus(None, cache=quick["out"] / "data", sequence_len=64)
    windows = validation_windows(corpus.validation, 64, 64)
    record = quick["records"][2]
    content = torch.load(quick["out"] / f"checkpoints/{record['name']}.pt", weights_only=True)
    model = model_of(record)
    model.load_state_dict(content["model"])
    assert bits_per_byte(model, windows, corpus.token_bytes) == pytest.approx(
        record["val_bpb"], abs=1e-6
    )
    cooled = [*record["cooled"][:-1], content["record"]["cooled"]]
    assert content["record"] | {"diverged": False, "cooled": cooled} == record


def test_every_checkpoint_loads_safely(quick: dict[str, Any]) -> None:
    files = sorted((quick["out"] / "checkpoints").iterdir())
    assert [f.name for f in files] == sorted(f"{name}.pt" for name in LOGS)  # no trunk is left
    for file in files:
        content = torch.load(file, weights_only=True)
        assert {"model", "step", "sha256"} <= content.keys()
        assert "optimizer" not in content


def test_one_progress_bar_a_model(quick: dict[str, Any]) -> None:
    for name in LOGS:
        last = re.findall(rf"{re.escape(name)}: 100%.*", quick["stderr"].replace("\r", "\n"))[-1]
        for shown in ("loss ", "tokens/s", "Phi ", "Psi "):
            assert shown in last
    assert len(quick["stderr"].replace("\r", "\n").splitlines()) < 80  # a log file keeps them all


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
    spent = cpu_seconds()
    done = run(quick["folder"])
    assert cpu_seconds() - spent < 30  # starting Python and torch; no step is trained
    assert done.returncode == 0
    table = (quick["out"] / "table.md").read_text()
    assert done.stdout.startswith(table)
    told = quick["stdout"][len(table) :].splitlines()
    again = done.stdout[len(table) :].splitlines()
    assert again[:-1] == told[:-1]  # the account of the series
    assert "already trained" in again[-1]
    assert digests() == before


def test_settings_steps_and_tokens_are_printed_before_training(quick: dict[str, Any]) -> None:
    printed = quick["stderr"]
    printed = printed[printed.index("size  layers") :]  # behind the bar of a slow machine
    settings, models = printed.split("\n\n", 1)
    sizes = [line.split()[0] for line in settings.splitlines()]
    assert sizes == ["size", "2x32", "3x32", "3x48"]
    lines = models.splitlines()
    assert lines[0].split()[:5] == ["model", "share", "trunk", "cooled", "tokens"]
    for line, record in zip(lines[1:], quick["records"], strict=False):
        name, share, trunk, cooled, tokens = line.split()[:5]
        assert (name, float(share)) == (record["name"], record["share"])
        assert int(trunk) + int(cooled) == record["steps"]
        assert tokens == f"{record['tokens']:,}"


def test_a_peak_below_what_was_reached_does_not_cost_the_report(quick: dict[str, Any]) -> None:
    report = quick["out"] / "report.html"
    report.unlink()
    done = run(quick["folder"], "--peak-flops", "1e6")
    assert done.returncode == 0
    warning = done.stderr.splitlines()[-1]
    assert re.match(r"warning: 2x32-scratch\+ars did \S+ times the operations", warning)
    assert warning.endswith("the report has no MFU")
    assert report.stat().st_size > 10_000


def test_the_loss_is_nats_per_byte(quick: dict[str, Any]) -> None:
    rows = read_log(quick["out"] / "log_3x48-scratch+ars.csv")
    assert rows[1]["loss"] == pytest.approx(math.log(256), abs=0.1)
