"""The driver of the experiment on series of seconds: stopped in every way, it ends the same."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

import inheritance
from analysis import run_report
from common.errors import UsageError
from common.program import StopRequest, exit_status
from experiment import experiment_report, experiment_run
from experiment.experiment_design import SIZES, Job, jobs_of
from experiment.experiment_run import Options, run_experiment, train_series
from trainer.settings import Machine, SeriesConfig

pytestmark = pytest.mark.slow

SMALL = SeriesConfig(
    depths=(1, 2), steps=(30, 10), batch_size=2, sequence_len=16, fisher_samples=3, warmup_steps=2
)
PROGRAM = f"""
import sys, time, signal, inheritance
from experiment import experiment_run
from trainer.settings import SeriesConfig
experiment_run.SIZES["quick"] = {SMALL!r}
{{patch}}
if __name__ == "__main__":
    sys.exit(inheritance.main())
"""


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "quick", SMALL)
        # The figures are tested elsewhere, and drawing them takes longer than training here.
        patch.setattr(run_report, "_figures", lambda *_: {})
        patch.setattr(experiment_report, "_figures", lambda *_: {})
        yield


def experiment(out: Path, text: Path, workers: int = 1) -> dict[str, Any]:
    """Run the arms in this process; their summary without the times."""
    run_experiment(Options(out, str(text), "quick", ("arms",), workers))
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    for model in found["models"]:
        model.pop("seconds")
    return found


def words_of(out: Path, text: Path, *words: str) -> list[str]:
    return ["--size", "quick", "--stage", "arms", "--data", str(text), "--out", str(out), *words]


def start(folder: Path, words: list[str], patch: str = "") -> subprocess.Popen[str]:
    """Start the program as a terminal does, in a process group of its own."""
    program = folder / "program.py"
    program.write_text(PROGRAM.format(patch=patch))
    environment = {**os.environ, "PYTHONPATH": str(Path(inheritance.__file__).parent)}
    return subprocess.Popen(
        [sys.executable, str(program), *words], env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_group_to_end(group: int) -> None:
    def alive() -> bool:
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, own = path.read_text().rpartition(")")[2].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(own) == group and state != "Z":
                return True
        return False

    end = time.monotonic() + 60
    while alive():
        assert time.monotonic() < end, "a process is left"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def straight(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("straight")
    return out, experiment(out, text)


def test_every_model_is_in_the_summary(straight: tuple[Path, dict[str, Any]]) -> None:
    found = [(model["run"], model["name"]) for model in straight[1]["models"]]
    expected = [(job.name, plan.name) for job in jobs_of("arms", "quick") for plan in job.plans]
    assert sorted(found) == sorted(expected)
    assert not any(one["unfinished"] for one in straight[1]["runs"])


def test_a_series_that_is_finished_is_not_started_again(
    text: Path,
    straight: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, found = straight
    monkeypatch.setattr(ForkServerProcess, "start", lambda _: pytest.fail("a process is started"))
    assert experiment(out, text) == found
    assert "100%" in (shown := capsys.readouterr().err)
    assert "2 of 2 done" in shown
    figure = out / "arms/seed-0/loss_training.png"
    content = figure.read_bytes()
    figure.unlink()
    try:
        with pytest.raises(pytest.fail.Exception, match="a process is started"):
            experiment(out, text)
    finally:
        figure.write_bytes(content)


@pytest.mark.timeout(900)  # five starts of the program: minutes on a machine that has other work
def test_stopped_in_every_way_and_resumed_with_more_workers(
    text: Path, straight: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    begun = {
        signal.SIGINT: out / "arms/seed-0/log_d1-scratch.csv",
        signal.SIGKILL: out / "arms/seed-0/log_d2-scratch.csv",
    }
    words = words_of(out, text)
    with start(tmp_path, [*words, "--minutes", "1e-6"]) as process:
        _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.splitlines()[-1].startswith("interrupted: run `python ")
    for number, path in begun.items():
        with start(tmp_path, words) as process:
            while not path.exists():
                assert process.poll() is None
                time.sleep(0.005)
            if number == signal.SIGKILL:
                process.kill()  # alone: what it has started finds out by itself
            else:
                os.killpg(process.pid, number)  # as Ctrl-C does
            output, errors = process.communicate()
        assert output == ""
        assert "Traceback" not in errors
        wait_for_group_to_end(process.pid)
        if number == signal.SIGINT:
            assert process.returncode == 128 + number
            assert list(out.glob("arms/seed-0/checkpoints/**/*.pt")), "it has saved"
            assert errors.splitlines()[-1].endswith("` again to resume")
        assert not (out / "arms/seed-0/table.md").exists(), "in the middle"
    assert experiment(out, text, workers=2) == straight[1]


def test_interrupting_a_series_is_left_to_the_driver(text: Path, tmp_path: Path) -> None:
    # Ctrl-C reaches all processes of a terminal, and the driver's SIGTERM must not be the second
    # signal that a series gets. In a program of its own: the first process it starts is special.
    patch = (
        "import multiprocessing, os\n"
        "from common.program import StopRequest\n"
        "class Interrupt(StopRequest):\n"
        "    def check(self):\n"
        "        for child in multiprocessing.active_children():\n"
        "            os.kill(child.pid, signal.SIGINT)\n"
        "true_run = experiment_run.train_series\n"
        "experiment_run.train_series = lambda out, data, jobs, *_: true_run(\n"
        "    out, data, jobs[:1], 1, Interrupt())\n"
        "experiment_run.write_summary = lambda *_: 'table\\n'\n"
    )
    with start(tmp_path, words_of(tmp_path / "out", text, "--stage", "tune"), patch) as process:
        output, errors = process.communicate()
    assert (process.returncode, output) == (0, "table\n"), errors
    assert (tmp_path / "out" / jobs_of("tune", "quick")[0].name / "metrics.json").exists()


def test_a_series_that_fails_is_named_and_stops_the_others(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = jobs_of("tune", "quick")[0]
    long = Job("good", replace(good.config, steps=(100_000,)), good.machine)
    bad = Job("bad", good.config, Machine(device="cuda:99"))
    work = lambda: train_series(tmp_path, str(text), [long, bad], 2, StopRequest())  # noqa: E731
    assert exit_status(tmp_path, work) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    log = tmp_path / "bad.log"
    words = log.read_text().strip().splitlines()[-1]
    assert last.startswith(f"error: bad failed: {words}; more is in ")
    assert f"{log}. " in last
    assert multiprocessing.active_children() == []
    assert not (tmp_path / "good/metrics.json").exists()


def test_another_text_or_design_is_refused_before_training(
    text: Path, straight: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = straight
    other = text.with_name("other.txt")
    other.write_bytes(text.read_bytes()[::-1])
    monkeypatch.setattr(experiment_run, "train_series", lambda *_: pytest.fail("it trains"))
    with pytest.raises(UsageError, match=f"{out}/arms/seed-0 holds a run with other training data"):
        run_experiment(Options(out, str(other), "quick", ("tune",), 1))
    monkeypatch.setitem(SIZES, "quick", replace(SMALL, lr=0.5))
    with pytest.raises(UsageError, match=r"/arms/seed-0 holds a run with lr 0.003 \(now 0.5\): "):
        run_experiment(Options(out, str(text), "quick", ("tune",), 1))


def test_a_missing_device_is_said_before_anything_is_written(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"--size gpu needs a CUDA device .* use --size cpu"):
        run_experiment(Options(tmp_path / "out", str(text), "gpu", ("arms",), 1))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("summing", "status", "words"),
    [
        ("signal.raise_signal(signal.SIGINT)", 130, "interrupted while summing up: run `python "),
        ("time.sleep(0.5)", 0, ""),
    ],
    ids=["interrupted", "minutes-over"],
)
def test_the_summary_is_no_part_of_training(
    summing: str, status: int, words: str, text: Path, tmp_path: Path
) -> None:
    patch = (
        "experiment_run.train_series = lambda *_: None\n"
        "def summed(*_):\n"
        f"    {summing}\n"
        "    return 'table\\n'\n"
        "experiment_run.open_corpus = lambda *_: None\n"
        "experiment_run.write_summary = summed\n"
    )
    with start(
        tmp_path, [*words_of(tmp_path / "out", text), "--minutes", "5e-3"], patch
    ) as process:
        output, errors = process.communicate()
    assert (process.returncode, output) == (status, "" if status else "table\n")
    assert errors.startswith(words)
    assert len(errors.splitlines()) == bool(status)
