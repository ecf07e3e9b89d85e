"""The command line of the stress tests: mistakes, help, and a run from end to end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from program_helpers import Refused

import narcissus
from stress.stress_options import parse_options

SCRIPT = Path(narcissus.__file__)


pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--seeds", "0"], "'0' is not a whole number from 1"),
        (["--workers", "x"], "'x' is not a whole number"),
        (["--scenarios", "edge,egde"], "'egde' is none of ordinary, bytes"),
        (["--arms", ""], "'' is none of adamw"),
        (["--size", "huge"], "'huge' is not one of 'tiny'"),
        (["--sensitivity", "--quick"], "--sensitivity: takes neither"),
        (["--sensitivity", "--arms", "adamw"], "--sensitivity: takes neither"),
        (["--oscillation", "--quick"], "--oscillation: takes --out"),
        (["--oscillation", "--arms", "adamw"], "--oscillation: takes --out"),
        (["--anchor", "--arms", "adamw"], "--anchor: takes neither"),
        (["--anchor", "--oscillation"], "--oscillation: takes --out"),
        (["--anchor", "--first-seed", "91"], "seeds from 100 on are those of the limits"),
        (["--data", "missing"], "--data missing does not exist"),
        (["--out", "file"], "--out file cannot be created"),
        (["--quic"], "there is no --quic; did you mean --quick?"),
    ],
)
def test_mistakes_are_one_line(words: list[str], reason: str, refused: Refused) -> None:
    Path("file").write_text("")
    assert reason in refused(narcissus.main, words)


def test_the_gpu_size_needs_a_gpu(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "--size gpu needs a CUDA device" in refused(narcissus.main, ["--size", "gpu"])


def test_what_is_run() -> None:
    everything = parse_options([])
    assert len(everything.jobs) == len(set(everything.jobs))
    assert {job.seed for job in everything.jobs} == set(range(10))
    ordinary = {job.rate for job in everything.jobs if job.scenario == "ordinary"}
    assert len(ordinary) == 3
    quick = parse_options(["--quick"])
    assert len(quick.jobs) == 16
    assert quick.folder == Path("out/narcissus-quick")
    chosen = parse_options(
        ["--scenarios", "loop", "--arms", "sgd", "--seeds", "2", "--first-seed", "7"]
    )
    assert [(j.scenario, j.arm, j.seed) for j in chosen.jobs] == [
        ("loop", "sgd", 7),
        ("loop", "sgd", 8),
    ]
    files = [job.file for job in (*everything.jobs, *parse_options(["--sensitivity"]).jobs)]
    assert len(files) == len(set(files))


def test_a_run_from_end_to_end_and_again(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--size", "tiny", "--seeds", "1", "--scenarios", "edge", "--arms", "adamw,default"]
    words += ["--data", str(text)]
    assert narcissus.main(words) == 0
    first = capsys.readouterr().out
    assert "### Learning rate beyond the edge" in first
    out = Path("out/narcissus")
    assert sorted(path.name for path in out.iterdir()) == [
        "edge.png", "runs", "runs.csv", "summary.json", "tables.md",
    ]  # fmt: skip
    rows = json.loads((out / "summary.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == ["adamw", "default"]
    stamps = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*.json")}
    assert narcissus.main(words) == 0
    assert capsys.readouterr().out == first
    assert stamps == {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*.json")}
    assert narcissus.main([*words, "--size", "small"]) == 2  # in the same folder
    error = capsys.readouterr().err.splitlines()[-1]
    record = out / "runs" / "edge" / "adamw-x1-0.json"
    assert error.startswith(f"error: {record} is of other settings: size.layers 1 (now 2), ")
    assert "name another folder with --out" in error
    assert stamps == {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*.json")}


def test_ctrl_c_ends_with_one_line(text: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--workers", "2", "--size", "large"]
    command += ["--data", str(text)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    start = ""
    while "to go" not in start:  # the bar: training is about to start
        start += process.stderr.read(1)
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1].startswith("interrupted: run `python ")
    assert "Traceback" not in error
    assert not list(Path("out").rglob(".*.unfinished"))
