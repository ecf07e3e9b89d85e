"""Jobs: kept one by one, told to stop, and what is said of one that fails in its process."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from common.errors import RunInterruptedError, UsageError
from common.jobs import changed_settings, run_jobs
from common.program import StopRequest

FAR = 60.0


@dataclass(frozen=True)
class Square:
    number: int
    does: str = ""
    seconds: float = 0.0

    @property
    def title(self) -> str:
        return f"square {self.number}"


def square(job: Square, stop: StopRequest) -> int:
    print(f"computing {job.number}", flush=True)
    end = time.monotonic() + job.seconds
    while time.monotonic() < end:
        stop.check()
        time.sleep(0.01)
    if job.does == "raise":
        raise ValueError("no such number")
    if job.does == "refuse":
        raise UsageError("the number is wrong: take another")
    if job.does == "exit":
        os._exit(7)
    if job.does == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return job.number**2 * torch.get_num_threads()


def done(jobs: list[Square], workers: int, log: Path | None = None) -> dict[int, int]:
    found: dict[int, int] = {}
    run_jobs(
        jobs, square, lambda job, result: found.update({job.number: result}), StopRequest(),
        workers=workers, log=None if log is None else lambda job: log / f"{job.number}.log",
    )  # fmt: skip
    assert multiprocessing.active_children() == []
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_every_job_is_kept_and_counted(workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    jobs = [Square(number) for number in range(4)]
    assert done(jobs, workers) == {0: 0, 1: 1, 2: 4, 3: 9}
    assert "4 of 4 done" in capsys.readouterr().err
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("does", "words"),
    [
        ("raise", "ValueError: no such number"),
        ("refuse", "the number is wrong: take another"),
        ("exit", "its process ended with status 7"),
        ("kill", "signal 9 killed its process (is the memory full?)"),
    ],
)
def test_a_job_that_fails_is_named_and_stops_the_others(
    does: str, words: str, tmp_path: Path
) -> None:
    jobs = [Square(1, seconds=FAR), Square(2, does), Square(3)]
    start = time.monotonic()
    with pytest.raises(UsageError) as caught:
        done(jobs, 2, tmp_path)
    log = tmp_path / "2.log"
    assert str(caught.value) == (
        f"square 2 failed: {words}; more is in {log}. What is done stays: the same command goes on"
    )
    assert time.monotonic() - start < FAR
    assert does in {"exit", "kill"} or words in log.read_text()
    assert ("Traceback" in log.read_text()) == (does == "raise")
    assert not (tmp_path / "3.log").exists()


def test_one_that_fails_in_this_process_says_it_itself() -> None:
    with pytest.raises(ValueError, match="no such number"):
        done([Square(2, "raise")], 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stop_ends_the_work(workers: int) -> None:
    jobs = [Square(1, seconds=FAR)]
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(RunInterruptedError):
            run_jobs(jobs, square, lambda *_: None, stop, workers=workers)
    assert multiprocessing.active_children() == []


def test_what_a_killed_program_started_ends_by_itself(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from test_common_jobs import Square, done\n"
        "if __name__ == '__main__':\n"
        "    done([Square(1, seconds=600.0)], 1)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, str(program)]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "computing 1\n"
        process.kill()
        assert process.communicate(timeout=FAR) == ("", None)  # nobody has it open any more


def test_changed_settings_are_named_with_both_values() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "d": {}, "e": None}
    assert changed_settings(old, old) == []
    assert changed_settings(old, {"a": {"b": 2, "c": [1, 2]}, "d": {}}) == ["a.b 1 (now 2)"]
    assert changed_settings({}, {"f": 0.5}) == ["f None (now 0.5)"]
