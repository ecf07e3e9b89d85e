"""The series of an experiment, several at a time, each in a process of its own.

A series resumes by itself, so a stopped experiment goes on where every one of them stopped.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterable
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch
from tqdm import tqdm

from corpus import prepare_corpus
from experiment.design import Job
from trainer.errors import RunInterruptedError, UsageError
from trainer.parallel import Parallel
from trainer.run import Run
from trainer.series import check_folder, run_series
from trainer.signals import StopRequest

__all__ = ["run_jobs"]

_POLL_SECONDS = 0.2
_USAGE = 2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_jobs(
    out: Path, data: str | None, jobs: Iterable[Job], workers: int, stop: StopRequest
) -> None:
    """Finish every series.

    Args:
        out: folder of the experiment; a series goes to its name below, what it prints beside it.
        data: text, as ``--data`` of ``miniseries.py`` takes it.
        jobs: the series.
        workers: processes at a time.
        stop: asked again and again; running series are then told, and save what they have.

    Raises:
        RunInterruptedError: a signal arrived.
        UsageError: a series failed; its last words are in the message.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(jobs)
    running: dict[SpawnProcess, Job] = {}
    interval = _POLL_SECONDS if sys.stderr.isatty() else 30.0
    with tqdm(total=len(waiting), unit="series", mininterval=interval) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    job = waiting.pop(0)
                    process = context.Process(target=_work, args=(out, data, job))
                    # A process begins with its parent's mask: until it can stop in good order,
                    # Ctrl-C cannot end it with a traceback.
                    held = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
                    try:
                        process.start()
                    finally:
                        signal.pthread_sigmask(signal.SIG_SETMASK, held)
                    running[process] = job
                    bar.set_postfix_str(", ".join(j.name for j in running.values()))
                time.sleep(_POLL_SECONDS)
                stop.check()
                for process in [p for p in running if not p.is_alive()]:
                    job = running.pop(process)
                    if process.exitcode:
                        raise UsageError(f"the series {job.name} failed: {_last_words(out, job)}")
                    bar.update()
        finally:
            for process in running:
                process.terminate()  # SIGTERM: it saves what it has
            for process in running:
                process.join()


def _log(out: Path, job: Job) -> Path:
    return out / f"{job.name}.log"


def _last_words(out: Path, job: Job) -> str:
    lines = _log(out, job).read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _work(out: Path, data: str | None, job: Job) -> None:
    log = _log(out, job)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if job.machine.threads is not None:
        torch.set_num_threads(job.machine.threads)
    try:
        with StopRequest() as stop:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            length = job.config.sequence_len
            corpus = prepare_corpus(data, cache=out / "tokens", sequence_len=length)
            check_folder(out / job.name, job.config, corpus)
            parallel = Parallel(job.machine.device)
            run_series(Run(out / job.name, job.config, job.machine, corpus, parallel, stop))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(_USAGE)
    except RunInterruptedError as stopped:
        sys.exit(128 + stopped.signum)
