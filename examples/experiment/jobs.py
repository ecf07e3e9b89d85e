"""The series of an experiment, several at a time, each in a process of its own.

A series resumes by itself, so a stopped experiment goes on where every one of them stopped.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnProcess
from pathlib import Path
from threading import Thread

import torch

from corpus import Corpus, prepare_corpus
from experiment.design import Job
from experiment.progress import Progress
from trainer.config import SeriesConfig
from trainer.errors import RunInterruptedError, UsageError
from trainer.figures import FIGURES
from trainer.folder import OutputFolder
from trainer.parallel import Parallel
from trainer.run import Run
from trainer.series import run_series
from trainer.signals import StopRequest

__all__ = ["open_corpus", "run_jobs"]

_POLL_SECONDS = 0.2
_USAGE = 2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def open_corpus(
    out: Path, data: str | None, config: SeriesConfig, check: Callable[[], None]
) -> Corpus:
    """The text of an experiment as tokens, made at the first call.

    Args:
        out: folder of the experiment.
        data: text, as ``--data`` of ``miniseries.py`` takes it.
        config: for the length of its sequences.
        check: called again and again meanwhile; may raise to stop.

    Raises:
        UsageError: the text cannot be used.
    """
    return prepare_corpus(
        data,
        cache=out / "tokens",
        sequence_len=config.sequence_len,
        progress=lambda *_: check(),
        between=check,
    )


def run_jobs(
    out: Path, data: str | None, jobs: Sequence[Job], workers: int, check: Callable[[], None]
) -> None:
    """Finish every series; one that fails stops the others, which save what they have.

    Args:
        out: folder of the experiment; a series goes to its name below, what it prints beside it.
        data: text, see `open_corpus`.
        jobs: the series.
        workers: processes at a time.
        check: called again and again; when it raises, running series save what they have.

    Raises:
        UsageError: a series failed; its last words and its log are in the message.
    """
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # here, since starting it unblocks the signals held below
    waiting = [job for job in jobs if not _is_finished(out, job)]
    running: dict[SpawnProcess, Job] = {}
    with Progress(out, jobs) as progress:
        try:
            while waiting or running:
                check()
                while waiting and len(running) < workers:
                    job = waiting.pop(0)
                    process = context.Process(target=_work, args=(out, data, job))
                    # A process begins with its parent's mask: until it can stop in good order,
                    # Ctrl-C cannot end it with a traceback.
                    held = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
                    try:
                        process.start()
                        running[process] = job
                    finally:
                        signal.pthread_sigmask(signal.SIG_SETMASK, held)
                time.sleep(_POLL_SECONDS)
                check()
                for process in [p for p in running if not p.is_alive()]:
                    job = running.pop(process)
                    if process.exitcode:
                        raise UsageError(_failure(out, job, process.exitcode))
                progress.show(running.values())
        finally:
            for process in running:
                process.terminate()  # SIGTERM: it saves what it has
            for process in running:
                process.join()


def _is_finished(out: Path, job: Job) -> bool:
    """Whether starting its process, which takes seconds, would change nothing."""
    written = [out / job.name / name for name in ("metrics.json", "table.md", *FIGURES)]
    return all(path.exists() for path in (*job.model_files(out), *written))


def _log(out: Path, job: Job) -> Path:
    return out / f"{job.name}.log"


def _failure(out: Path, job: Job, status: int) -> str:
    log = _log(out, job)
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    words = lines[-1].removeprefix("error: ") if lines else "it said nothing"
    return (
        f"the series {job.name} failed (exit status {status}): {words}; more is in {log}. "
        "What is trained stays: the same command goes on"
    )


def _work(out: Path, data: str | None, job: Job) -> None:
    log = _log(out, job)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if job.machine.threads is not None:
        torch.set_num_threads(job.machine.threads)
    try:
        with StopRequest() as stop, OutputFolder(out / job.name) as output:
            # SIGINT stays blocked: a terminal sends Ctrl-C to all its processes, and with the
            # parent's SIGTERM it would be the second signal, which ends one without saving.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            Thread(target=_stop_with_parent, daemon=True).start()
            output.hold()  # against what a killed experiment may have left running
            corpus = open_corpus(out, data, job.config, stop.check)
            parallel = Parallel(job.machine.device)
            run_series(Run(output, job.config, job.machine, corpus, parallel, stop))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(_USAGE)
    except RunInterruptedError as stopped:
        sys.exit(128 + stopped.signum)


def _stop_with_parent() -> None:
    """Tell this process to save and leave when its parent is gone, killed for example."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a series runs in a process of its own"
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
