"""What is looked at before a run begins, by which process, and what a kill leaves."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_series import KilledError, Series, free_port

import miniseries
from common.errors import RunInterruptedError, UsageError
from common.output_folder import OutputFolder
from common.program import StopRequest, exit_status
from trainer import series_run, train_series
from trainer.arguments import parse_arguments
from trainer.parallel import Parallel, use_device
from trainer.series_run import Run, prepare

EXAMPLES = Path(miniseries.__file__).parent


def prepared(words: Sequence[str]) -> Run:
    arguments = parse_arguments(words)
    with OutputFolder(arguments.out) as output:
        return prepare(arguments, StopRequest(), output)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tokenizer", "bpe:9999", "--steps", "3"], "the 3 steps of a model from scratch are"),
        (["--device-batch-size", "3"], "--device-batch-size 3 does not divide the 4 sequences"),
        (["--tokenizer", "missing.json"], "--tokenizer missing.json does not exist"),
        (["--out", "taken"], "--out taken holds files that are not a run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_known_without_the_text_is_refused_before_it_is_read(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken/mine").mkdir(parents=True)
    monkeypatch.setattr(series_run, "prepare_corpus", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(UsageError, match=says):
        prepared(words)


def test_a_run_goes_on_with_the_commit_it_was_begun_with(
    series: Series, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest, asked = ["a" * 40], []

    def prepare_corpus(data: str, **rest: Any) -> Any:
        asked.append(data)
        name, _, commit = data.partition("@")
        corpus = read(str(text), **rest)
        facts = {"source": name, "commit": commit or newest[0]}
        return replace(corpus, facts={**corpus.facts, **facts})

    read = series_run.prepare_corpus
    monkeypatch.setattr(series_run, "prepare_corpus", prepare_corpus)
    words = ("--arms", "scratch", "--data", "hf:owner/name")
    series(tmp_path, None, *words)
    newest[0] = "b" * 40
    assert series(tmp_path, None, *words)[1]
    assert asked == ["hf:owner/name", f"hf:owner/name@{'a' * 40}"]

    # The first process says which commit it has read; the others read that one.
    monkeypatch.setattr(_Second, "from_first", lambda *_: "c" * 40)
    monkeypatch.setattr(series_run, "Parallel", _Second)
    prepared([*words, "--out", str(tmp_path / "new")])
    assert asked[2:] == [f"hf:owner/name@{'c' * 40}"]


class _Second(Parallel):
    """A process that is not the first; what the first says is always that all is well."""

    def __init__(self, device: str, *, fsdp: bool) -> None:
        super().__init__(device, fsdp=fsdp)
        self.rank = 1

    def from_first(self, work: Any) -> Any:
        return None


def test_only_the_first_process_looks_at_the_folder_that_it_writes(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As it is for a moment while the first process begins the run.
    (tmp_path / "out/checkpoints").mkdir(parents=True)
    words = ["--data", str(text), "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "t")]
    with pytest.raises(UsageError, match="not a run of this program"):
        prepared(words)
    monkeypatch.setattr(series_run, "Parallel", _Second)
    assert not prepared(words).parallel.is_first


def test_a_run_killed_at_its_first_file_begins_again(
    series: Series, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(path: Path, _: str) -> None:
        path.with_name(f".{path.name}.0.unfinished").mkdir()
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(train_series, "write_atomically", half)
        with pytest.raises(KilledError):
            series(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        ".config.json.0.unfinished",
        "data",
    }
    assert series(tmp_path / "out")[1] is False
    assert (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize(
    ("device", "processes", "says"),
    [
        ("cuda:0", 2, "--device cuda:0 is one for 2 processes: use --device cuda"),
        ("cuda", 3, "--device cuda has 2 for 3 processes: start at most 2"),
        ("cuda:2", 1, r"--device cuda:2 is not available \(CUDA devices found: 2\)"),
    ],
)
def test_processes_need_a_device_each(
    device: str, processes: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    use_device("cuda:1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    use_device("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    with pytest.raises(UsageError, match=says):
        use_device(device)


def test_how_to_resume_depends_on_who_started_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        raise RunInterruptedError(15)

    assert exit_status(tmp_path, work) == 143
    assert capsys.readouterr().err.startswith("interrupted: run `python ")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert exit_status(tmp_path, work) == 143
    assert capsys.readouterr().err == "interrupted: repeat the command to resume\n"


_IMPATIENT = """
import time
from datetime import timedelta
import torch.distributed as dist
from trainer.parallel import Parallel

begin = dist.init_process_group
patience = timedelta(seconds=1)
dist.init_process_group = lambda backend, **rest: begin(backend, timeout=patience, **rest)
parallel = Parallel("cpu")
print(parallel.from_first(lambda: time.sleep(3) or "read"))
parallel.close()
"""


@pytest.mark.slow
def test_the_others_wait_longer_for_the_first_than_for_a_step() -> None:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _IMPATIENT],
            env={**os.environ, **shared, "PYTHONPATH": str(EXAMPLES), "RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    for process in started:
        output, errors = process.communicate(timeout=120)
        assert (process.returncode, output) == (0, "read\n"), errors


_DYING = """
import os
import signal
from trainer.parallel import Parallel

parallel = Parallel("cpu")
assert parallel.any(parallel.rank == 1)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and parallel.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
print("told", parallel.from_first(lambda: "again"), flush=True)
parallel.close()
"""


@pytest.mark.slow
def test_processes_that_torchrun_starts_again_find_each_other(tmp_path: Path) -> None:
    """The store still has the addresses of those that were there before."""
    script = tmp_path / "dying.py"
    script.write_text(_DYING)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node=2", "--max-restarts=1", str(script)),
        ],
        env={**os.environ, "PYTHONPATH": f"{EXAMPLES}{os.pathsep}{EXAMPLES.parent}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("told again") >= 2
