"""All runs of a sweep: resumed one by one, in several processes, with one progress bar."""

import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from stress.jobs import Job
from stress.run import identity_of, run_job
from stress.text import Corpus
from trainer.bars import drawing_interval
from trainer.checkpoint import write_atomically
from trainer.errors import DamagedError, UsageError
from trainer.folder import OutputFolder
from trainer.reading import read_json, understanding
from trainer.signals import StopRequest

__all__ = ["run_jobs"]

Record = dict[str, Any]

_POLL_SECONDS = 0.5
_worker: dict[str, Any] = {}


class _StoppedError(Exception):
    """The run was told to stop; it leaves nothing behind and is run again."""


def run_jobs(
    output: OutputFolder, jobs: Sequence[Job], corpus: Corpus, workers: int, stop: StopRequest
) -> list[Record]:
    """Run what has no record yet, and return all records in the order of the jobs.

    Args:
        output: folder, held; its ``runs`` get one JSON file a run, whole or absent.
        jobs: what to run.
        corpus: the text.
        workers: processes; 1 runs everything in this one. Each computes on one thread.
        stop: asked before every step.

    Raises:
        RunInterruptedError: a signal arrived; finished runs are on the disk.
        UsageError: the folder holds runs of other settings, all of which are left as they are.
    """
    folder = output.path / "runs"
    records = {job: _read(folder / job.file, job, corpus) for job in jobs}
    waiting = [job for job in jobs if records[job] is None]
    done = len(jobs) - len(waiting)
    interval = drawing_interval()
    runner = _inline if workers == 1 else _in_processes
    with tqdm(total=len(jobs), initial=done, unit="run", mininterval=interval) as bar:
        for job, record in runner(waiting, corpus, workers, stop):
            path = folder / job.file
            output.check()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(record, allow_nan=False) + "\n")
            records[job] = record
            bar.set_postfix_str(f"{job.scenario}, {job.arm}, seed {job.seed}", refresh=False)
            bar.update()
    return [record for record in records.values() if record is not None]


def _read(path: Path, job: Job, corpus: Corpus) -> Record | None:
    """The record of this very run; ``None`` if it is missing or damaged."""
    if not path.exists():
        return None
    try:
        remedy = "make it readable, or name another folder with --out"
        record: Record = read_json(path, remedy=remedy)
        with understanding(str(path), remedy):
            found = _flat(record["identity"])
    except DamagedError:
        return None
    wanted = _flat(identity_of(job, corpus))
    changes = [
        f"{name} {found.get(name)} (now {wanted.get(name)})"
        for name in wanted | found
        if found.get(name) != wanted.get(name)
    ]
    if changes:
        raise UsageError(
            f"{path} is of other settings: {', '.join(changes)}; repeat them, name another folder "
            "with --out, or delete this one"
        )
    return record


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """The same with ``"size.steps"`` for the ``"steps"`` of ``"size"``."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        parts = _flat(value) if isinstance(value, dict) else {}
        flat |= {f"{name}.{part}": item for part, item in parts.items()} or {name: value}
    return flat


def _inline(
    jobs: Sequence[Job], corpus: Corpus, workers: int, stop: StopRequest
) -> Iterator[tuple[Job, Record]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes: sums then run in one order
    try:
        for job in jobs:
            yield job, run_job(job, corpus, stop.check)
    finally:
        torch.set_num_threads(threads)


def _in_processes(
    jobs: Sequence[Job], corpus: Corpus, workers: int, stop: StopRequest
) -> Iterator[tuple[Job, Record]]:
    # Not forked: a child of a process whose torch has started threads can hang.
    context = multiprocessing.get_context("spawn")
    stopping = context.Event()
    queue = iter(jobs)
    running: dict[Future[Record], Job] = {}
    with ProcessPoolExecutor(workers, context, _start_worker, (corpus, stopping)) as pool:
        try:
            while True:
                with _signals_held_back():
                    for job in islice(queue, 2 * workers - len(running)):
                        running[pool.submit(_run_in_worker, job)] = job
                if not running:
                    return
                finished, _ = wait(running, _POLL_SECONDS, FIRST_COMPLETED)
                stop.check()
                for future in finished:
                    yield running.pop(future), future.result()
        finally:
            stopping.set()


@contextmanager
def _signals_held_back() -> Iterator[None]:
    # A process begins with its parent's mask: Ctrl-C cannot end it with a traceback while it is
    # importing. What arrives here meanwhile is delivered on leaving.
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _start_worker(corpus: Corpus, stopping: Event) -> None:
    torch.set_num_threads(1)
    _worker.update(corpus=corpus, stopping=stopping)


def _run_in_worker(job: Job) -> Record:
    return run_job(job, _worker["corpus"], _raise_when(_worker["stopping"]))


def _raise_when(stopping: Event) -> Callable[[], None]:
    def check() -> None:
        if stopping.is_set():
            raise _StoppedError

    return check
