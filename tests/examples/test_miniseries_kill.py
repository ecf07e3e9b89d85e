"""A kill at any point where a file comes, goes or is put on the disk changes nothing in the end."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch._dynamo  # noqa: F401  # the first optimizer imports it: once, before any fork
from small_series import TINY, results

from common.output_folder import OutputFolder
from common.program import StopRequest
from trainer import series_report
from trainer.arguments import parse_arguments
from trainer.series_run import prepare
from trainer.train_series import run_series

# A model of four steps, one of three grown out of it and a cooled branch of one step, with a state
# after each of them, of which the last is kept.
SHORT = (
    "--arms", "grown+ewc+ars", "--steps", "4", "--cooldown", "0.25", "--shares", "0.5,0.75",
    "--checkpoint-seconds", "0", "--keep", "1", "--eval-windows", "2", "--curve-windows", "2",
)  # fmt: skip
DONE, KILLED = 0, 9


def run_until(point: int | None, text: Path, out: Path) -> None:
    """Run the series; the process ends in place of its ``point``-th call of these functions.

    What it has not written by then is lost, as it is in a kill.
    """
    points = itertools.count(1)

    def watched(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            if next(points) == point:
                os._exit(KILLED)
            return work(*given, **named)

        return call

    os.replace, os.fsync = watched(os.replace), watched(os.fsync)
    Path.unlink = watched(Path.unlink)  # type: ignore[method-assign]
    Path.rmdir = watched(Path.rmdir)  # type: ignore[method-assign]
    series_report.write_report = lambda *_: ""  # drawing figures takes longer than training here
    words = [*TINY, "--data", str(text), "--out", str(out), *SHORT]
    with OutputFolder(out) as output:
        run_series(prepare(parse_arguments(words), StopRequest(), output))


def in_a_fork(point: int | None, text: Path, out: Path) -> int:
    """Exit status of a copy of this process that has run the series."""
    child = os.fork()
    if child == 0:
        try:
            run_until(point, text, out)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(DONE)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at_every_point(text: Path, folder: Path) -> None:
    """Run in folders 0 (to the end), 1, 2 ... (killed there, and again) and print how often."""
    assert in_a_fork(None, text, folder / "0") == DONE
    for point in itertools.count(1):
        status = in_a_fork(point, text, folder / str(point))
        if status == DONE:
            print(point - 1)
            return
        assert status == KILLED, point
        assert in_a_fork(None, text, folder / str(point)) == DONE, point


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_any_point(text: Path, tmp_path: Path) -> None:
    done = subprocess.run(  # a process without threads, which may be forked
        [sys.executable, __file__, str(text), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    points = int(done.stdout)
    assert points > 30
    expected = results(tmp_path / "0"), files(tmp_path / "0")
    for point in range(1, points + 1):
        out = tmp_path / str(point)
        assert (results(out), files(out)) == expected, point


if __name__ == "__main__":
    kill_at_every_point(Path(sys.argv[1]), Path(sys.argv[2]))
