"""Jobs of minutes: several at a time in processes of their own, or one by one in this process.

What a job leaves is kept as soon as it is there, so that a stopped program goes on where it was.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from threading import Thread
from typing import Any, Protocol, TypeVar

import torch
from tqdm import tqdm

from common.errors import RunInterruptedError, UsageError
from common.program import StopRequest, drawing_interval

__all__ = ["changed_settings", "run_jobs"]

_POLL_SECONDS = 0.2
_FILE_SECONDS = 60.0  # between two drawings in a log: programs last hours
_BAR = "{l_bar}{bar}| {elapsed} and about {remaining} to go{postfix}"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Job(Protocol):
    """What can be done; it travels to a process by pickling."""

    @property
    def title(self) -> str:
        """What the progress bar and messages call it."""


J = TypeVar("J", bound=Job)
R = TypeVar("R")
Work = Callable[[J, StopRequest], R]


def run_jobs(
    jobs: Sequence[J],
    work: Work[J, R],
    keep: Callable[[J, R], None],
    stop: StopRequest,
    *,
    workers: int,
    threads: int | None = 1,
    done: int = 0,
    share_done: Callable[[], float] | None = None,
    log: Callable[[J], Path] | None = None,
) -> None:
    """Do jobs, the first ones first; one that fails stops the others.

    Args:
        jobs: what is to be done.
        work: does one; it asks the stop request that it gets at its safe points. A function of a
            module, or a `functools.partial` of one.
        keep: called in this process with each job and what its work returned.
        stop: asked again and again here; when it raises, the jobs in work are told to stop.
        workers: processes at a time; 0 does everything in this one.
        threads: of the CPU that a job computes with; ``None`` leaves torch's own choice.
        done: jobs that were done before, for the progress bar.
        share_done: of all work in [0, 1], for the bar; ``None`` counts jobs.
        log: file that a job's process adds its output to; ``None`` leaves it on this one's.

    Raises:
        RunInterruptedError: a signal arrived; what was kept stays.
        UsageError: a job failed in its process.
    """
    finished, drawn, interval = done, -_FILE_SECONDS, drawing_interval(_FILE_SECONDS)
    total = done + len(jobs)

    def share() -> float:
        return finished / max(1, total) if share_done is None else share_done()

    def show(running: Iterable[J], *, now: bool = False) -> None:
        nonlocal drawn
        if now or time.monotonic() - drawn >= interval:
            drawn = time.monotonic()
            bar.n = share()
            titles = (job.title for job in running)
            bar.set_postfix_str("; ".join([f"{finished} of {total} done", *titles]))

    def finish(job: J, result: R) -> None:
        nonlocal finished
        keep(job, result)
        finished += 1

    first = share()
    with tqdm(total=1.0, initial=first, smoothing=0, dynamic_ncols=True, bar_format=_BAR) as bar:
        try:
            if workers == 0:
                _one_by_one(jobs, work, finish, show, stop, threads)
            else:
                _in_processes(jobs, work, finish, show, stop, threads, workers, log)
        finally:
            show((), now=True)


def _one_by_one(
    jobs: Sequence[J],
    work: Work[J, R],
    finish: Callable[[J, R], None],
    show: Callable[[Iterable[J]], None],
    stop: StopRequest,
    threads: int | None,
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)  # as in the processes: sums then run in one order
    try:
        for job in jobs:
            stop.check()
            show([job])
            finish(job, work(job, stop))
    finally:
        torch.set_num_threads(before)


def _in_processes(
    jobs: Sequence[J],
    work: Work[J, R],
    finish: Callable[[J, R], None],
    show: Callable[[Iterable[J]], None],
    stop: StopRequest,
    threads: int | None,
    workers: int,
    log: Callable[[J], Path] | None,
) -> None:
    context = _forkserver(getattr(work, "func", work).__module__)
    waiting = deque(jobs)
    running: dict[Any, tuple[J, ForkServerProcess]] = {}
    try:
        while waiting or running:
            stop.check()
            while waiting and len(running) < workers:
                job = waiting.popleft()
                ours, theirs = context.Pipe(duplex=False)
                file = None if log is None else log(job)
                process = context.Process(target=_do, args=(theirs, work, job, threads, file))
                process.start()
                running[ours] = job, process
                theirs.close()  # so that the end of the process is the end of the pipe
            show(job for job, _ in running.values())
            for pipe in connection.wait(list(running), _POLL_SECONDS):
                job, process = running[pipe]
                failure, result = _received(pipe, process)
                del running[pipe]
                if failure:
                    more = "" if log is None else f"; more is in {log(job)}"
                    raise UsageError(
                        f"{job.title} failed: {failure}{more}. What is done stays: the same "
                        "command goes on"
                    )
                finish(job, result)
    finally:
        for _, process in running.values():
            process.terminate()  # SIGTERM: it saves what it has
        for _, process in running.values():
            process.join()


def _forkserver(module: str) -> Any:
    """Start the process that the others are copies of: it has imported a module, and no more.

    A process of its own, since a copy of one whose torch has started threads can hang. Signals
    are held back in it and its copies until they can stop in good order: Ctrl-C reaches all
    processes of a terminal, and would end one that is starting with a traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    resource_tracker.ensure_running()  # before: starting it lets signals in
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # Python 3.11 does not pass it on
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if path is not None:
            os.environ["PYTHONPATH"] = path
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    return context


def _received(pipe: Any, process: ForkServerProcess) -> tuple[str | None, Any]:
    """Why a job failed, and what it returned."""
    try:
        found: tuple[str | None, Any] = pipe.recv()
    except EOFError:
        process.join()
        status = process.exitcode or 0
        killed = f"signal {-status} killed its process (is the memory full?)"
        found = killed if status < 0 else f"its process ended with status {status}", None
    process.join()
    pipe.close()
    return found


def _do(pipe: Any, work: Work[J, R], job: J, threads: int | None, log: Path | None) -> None:
    """Do a job in a process of its own."""
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    if threads is not None:
        torch.set_num_threads(threads)
    with StopRequest() as stop:
        # SIGINT stays blocked: with the SIGTERM of the parent, which gets it as well, it would be
        # the second signal, which ends a process without saving.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        Thread(target=_stop_with_parent, daemon=True).start()
        outcome: tuple[str | None, R | None]
        try:
            outcome = None, work(job, stop)
        except RunInterruptedError as stopped:
            sys.exit(128 + stopped.signum)
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            outcome = str(error), None
        except Exception as error:
            traceback.print_exc()
            outcome = "".join(traceback.format_exception_only(error)).strip(), None
        pipe.send(outcome)


def _stop_with_parent() -> None:
    """Tell this process to save and leave when its parent is gone, killed for example."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a job is in a process of its own"
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def changed_settings(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between the settings of results that are there and those that are asked for.

    Args:
        found: settings, maybe with mappings in them.
        wanted: likewise.

    Example:
        >>> changed_settings({"size": {"steps": 80}, "lr": 1.0}, {"size": {"steps": 90}, "lr": 1.0})
        ['size.steps 80 (now 90)']
    """
    old, new = _flat(found), _flat(wanted)
    return [
        f"{name} {old.get(name)} (now {new.get(name)})"
        for name in new | old
        if old.get(name) != new.get(name)
    ]


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same with ``"size.steps"`` for the ``"steps"`` of ``"size"``."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        parts = _flat(value) if isinstance(value, Mapping) else {}
        flat |= {f"{name}.{part}": item for part, item in parts.items()} or {name: value}
    return flat
