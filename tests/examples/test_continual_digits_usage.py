"""The digits' command line: mistakes are one line and leave nothing; interrupted runs go on."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from program_helpers import Refused, snapshot

import continual_digits
from continual.digits_options import parse_options
from continual.memory_methods import METHODS

SCRIPT = Path(continual_digits.__file__)
TINY = ["--methods", "none,ewc,joint", "--tasks", "2", "--epochs", "1", "--seeds", "1"]


pytestmark = pytest.mark.usefixtures("own_folder")


def test_no_run_is_done_or_counted_twice() -> None:
    chosen = f"ewc,ewc={METHODS['ewc'].strength},ewc=7"
    found = parse_options(["--methods", chosen, "--tasks", "2,2", "--seeds", "2"]).runs
    assert [(run.strength, run.seed) for run in found] == [
        (strength, seed) for strength in (METHODS["ewc"].strength, 7.0) for seed in (0, 1)
    ]


def results(folder: Path) -> Any:
    content = json.loads((folder / "results.json").read_text())
    for run in content["runs"]:
        del run["cpu_seconds"]
    return content


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--colour"], "--colour"),
        (["--quic"], "--quic"),
        (["extra"], "extra"),
        (["--methods", "ewx"], "'ewx' is not a method: choose among none, ewc"),
        (["--methods", ""], "'' is not a method"),
        (["--methods", "ewc=strong"], "ewc: 'strong' is not a number from 0 to 1e+30"),
        (["--methods", "ewc=nan"], "not a number from 0"),
        (["--methods", "ewc=-1"], "not a number from 0"),
        (["--methods", "none=3"], "'none' has no strength: leave out =3"),
        (["--methods", "replay=2.5"], "replay: '2.5' is not a whole number from 1 to 1000"),
        (["--by-class", "--tasks", "2,3"], "choose 2, 5 or 10"),
        (["--tasks", "1"], "whole number from 2 to 100"),
        (["--tasks", "5,ten"], "'ten' is not a whole number"),
        (["--seeds", "0"], "whole number from 1 to 100"),
        (["--epochs", "0"], "whole number from 1 to 1000"),
        (["--threads", "0"], "whole number from 1 to 1024"),
        (["--sweep", "--methods", "ewc=3"], "leave out the strengths"),
        (["--sweep", "--methods", "none,joint"], "choose --methods among ewc, kfac"),
        (["--out"], "expected one argument"),
        (["--out", "file.txt"], "is a file"),
        (["--out", "file.txt/sub"], "file.txt is a file"),
        (["--out", "."], "is not a run of this program"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(words: list[str], says: str, refused: Refused) -> None:
    Path("file.txt").write_text("mine")
    assert says in refused(continual_digits.main, words)


def test_results_of_other_settings_or_damaged_ones_are_left_alone(
    capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    assert continual_digits.main([*TINY, "--out", "run"]) == 0
    capsys.readouterr()
    line = refused(continual_digits.main, [*TINY, "--out", "run", "--epochs", "3"])
    assert "other settings: epochs 1 (now 3)" in line
    assert "--out" in line
    whole = Path("run/results.json").read_text()
    for damaged in ("", "{", "[]", "{}", whole.replace('"accuracy"', '"acc"'), whole[:-20]):
        Path("run/results.json").write_text(damaged)
        assert "results.json is " in refused(continual_digits.main, [*TINY, "--out", "run"])


def test_a_folder_that_the_system_refuses_to_create(refused: Refused) -> None:
    assert "/proc/digits" in refused(continual_digits.main, ["--quick", "--out", "/proc/digits"])


def test_the_whole_path_and_what_it_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    assert continual_digits.main([*TINY, "--out", "run"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith((Path("run") / "table.md").read_text())
    assert "Results are in run" in printed
    names = {"results.json", "table.md", "course_2_tasks.png", "matrices_2_tasks.png"}
    assert set(snapshot(Path("run"))) == names
    for name in names:
        if name.endswith(".png"):
            assert (Path("run") / name).stat().st_size > 5000
    first = results(Path("run"))
    assert [(run["method"], run["strength"]) for run in first["runs"]] == [
        ("none", 0.0),
        ("ewc", METHODS["ewc"].strength),
        ("joint", 0.0),
    ]

    # Runs that are done are kept, and more are added.
    stamp = json.loads(Path("run/results.json").read_text())["runs"][0]["cpu_seconds"]
    assert continual_digits.main([*TINY[2:], "--methods", "ewc=7,none", "--out", "run"]) == 0
    table = capsys.readouterr().out
    assert "|        7 |" in table
    assert "joint" not in table
    again = json.loads(Path("run/results.json").read_text())["runs"]
    assert len(again) == 4
    assert again[0]["cpu_seconds"] == stamp


def test_a_sweep_measures_on_other_images_and_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--sweep", "--methods", "none,subspace", *TINY[2:], "--out", "sweep"]
    assert continual_digits.main(words) == 0
    assert "held out of the training images" in capsys.readouterr().out
    content = results(Path("sweep"))
    assert content["settings"]["validation"] is True
    assert {run["seed"] for run in content["runs"]} == {100}
    strengths = [run["strength"] for run in content["runs"]]
    assert strengths == list(METHODS["subspace"].grid)
    assert set(snapshot(Path("sweep"))) == {"results.json", "table.md", "strength_2_tasks.png"}


def test_an_interrupted_run_goes_on_where_it_stopped() -> None:
    words = [sys.executable, str(SCRIPT), "--methods", "none,ewc", "--tasks", "2", "--epochs", "6",
             "--seeds", "2", "--out", "run"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               env=environment)  # fmt: skip
    path = Path("run/results.json")
    deadline = time.monotonic() + 100
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1].startswith("interrupted: run `python")
    done = len(results(Path("run"))["runs"])
    assert 1 <= done < 4
    assert not list(Path("run").glob(".*.unfinished"))

    assert continual_digits.main(words[2:]) == 0
    assert continual_digits.main([*words[2:-1], "straight"]) == 0
    assert results(Path("run")) == results(Path("straight"))


def test_the_command_itself_prints_one_line() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--tasks", "0"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


def test_help_explains_every_option_with_its_default() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True
    )
    text, _, epilog = done.stdout.partition("\nmethods: ")
    options = text.split("\n  --")[1:]
    assert len(options) == 9
    for option in options:
        assert "(default: " in " ".join(option.split()), option
    assert all(name in epilog for name in METHODS)


def test_defaults() -> None:
    full, quick, sweep = (parse_options(w) for w in ([], ["--quick"], ["--sweep"]))
    assert full.folder == Path("out/digits")
    assert (full.settings.epochs, full.settings.batch_size, full.settings.lr) == (20, 64, 1e-3)
    assert {run.tasks for run in full.runs} == {5, 10}
    assert {run.seed for run in full.runs} == {0, 1, 2, 3, 4}
    assert {run.method for run in full.runs} == set(METHODS)
    assert full.threads == 1
    assert quick.folder == Path("out/digits-quick")
    assert {run.tasks for run in quick.runs} == {3}
    assert sweep.folder == Path("out/digits-sweep")
    assert not {run.seed for run in sweep.runs} & {run.seed for run in full.runs}
    assert not full.settings.validation
    classes = parse_options(["--by-class"])
    assert classes.folder == Path("out/digits-by-class")
    assert classes.settings == replace(full.settings, by_class=True)
    assert {run.seed for run in classes.runs} == set(range(10))
    assert {run.strength for run in classes.runs if run.method == "ewc"} == {1, 100, 10000}
    given = parse_options(["--by-class", "--methods", "ewc=7,none"]).runs
    assert {(run.method, run.strength) for run in given} == {("ewc", 7.0), ("none", 0.0)}
