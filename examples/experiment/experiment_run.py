"""The experiment from end to end: its series, several at a time, and their summary.

A series resumes by itself, so a stopped experiment goes on where every one of them stopped.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from common.errors import UsageError
from common.jobs import run_jobs
from common.output_folder import OutputFolder
from common.program import StopRequest, command, quit_on_signals
from corpus import Corpus, prepare_corpus
from experiment.experiment_design import SIZES, STAGES, Job, Stage, jobs_of
from experiment.experiment_report import write_summary
from trainer.figures import FIGURES
from trainer.parallel import Parallel
from trainer.run import Run
from trainer.series import check_folder, run_series
from trainer.settings import SeriesConfig

__all__ = ["open_corpus", "run_experiment", "train_series"]


def run_experiment(
    out: Path, size: str, data: str | None, stages: Sequence[Stage], workers: int, minutes: float
) -> str:
    """Train what is not yet trained and sum it up.

    Args:
        out: folder of the experiment.
        size: a name of `SIZES`.
        data: text, as ``--data`` of ``miniseries.py`` takes it.
        stages: what to train.
        workers: series at a time.
        minutes: after which to stop in good order.

    Returns:
        What to tell the user.

    Raises:
        RunInterruptedError: a signal arrived, or the minutes are over.
        UsageError: the device, the text or the folder cannot be used, or a series failed.
    """
    deadline = time.monotonic() + 60 * minutes
    jobs = {stage: jobs_of(stage, size) for stage in STAGES}
    every = list(chain.from_iterable(jobs.values()))
    asked = [job for stage in dict.fromkeys(stages) for job in jobs[stage]]
    if size == "gpu" and not torch.cuda.is_available():
        raise UsageError("--size gpu needs a CUDA device and torch finds none: use --size cpu")
    with OutputFolder(out) as output, _Stop(output, deadline) as stop:
        output.hold()
        corpus = open_corpus(out, data, SIZES[size], stop.check)
        for job in every:  # all stages: they are summed up together, of one text and one design
            check_folder(out / job.name, job.config, corpus)
        train_series(out, data, asked, workers, stop)
        if stop.requested:  # not for the minutes, which are of the training
            stop.leave()
        # All is trained, so that nothing has to be saved: a signal ends the program at once.
        quit_on_signals(f"interrupted while summing up: run `{command()}` again")
        summary = write_summary(out, {job.name for job in every})
        output.check()
        return summary


class _Stop(StopRequest):
    """Asked for by a signal, and when the folder is gone or the time is over."""

    def __init__(self, output: OutputFolder, deadline: float) -> None:
        super().__init__()
        self._output, self._deadline = output, deadline

    def check(self) -> None:
        super().check()
        self._output.check()
        if time.monotonic() >= self._deadline:
            self.leave()


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


def train_series(
    out: Path, data: str | None, jobs: Sequence[Job], workers: int, stop: StopRequest
) -> None:
    """Finish every series; one that fails stops the others, which save what they have.

    Args:
        out: folder of the experiment; a series goes to its name below, what it prints beside it.
        data: text, see `open_corpus`.
        jobs: the series.
        workers: processes at a time.
        stop: asked again and again; when it raises, running series save what they have.

    Raises:
        UsageError: a series failed; its last words and its log are in the message.
    """
    # Series differ in length by an order of magnitude: their models are weighed by operations.
    costs = {
        path: plan.flops
        for job in jobs
        for path, plan in zip(job.model_files(out), job.plans, strict=True)
    }
    waiting = [job for job in jobs if not _is_finished(out, job)]
    run_jobs(
        waiting,
        partial(_train, out=out, data=data),
        lambda *_: None,
        stop,
        workers=workers,
        threads=None,
        done=len(jobs) - len(waiting),
        share_done=lambda: (
            sum(cost for path, cost in costs.items() if path.exists()) / sum(costs.values())
        ),
        log=lambda job: out / f"{job.name}.log",
    )


def _is_finished(out: Path, job: Job) -> bool:
    """Whether starting its process would change nothing."""
    written = [out / job.name / name for name in ("metrics.json", "table.md", *FIGURES)]
    return all(path.exists() for path in (*job.model_files(out), *written))


def _train(job: Job, stop: StopRequest, out: Path, data: str | None) -> None:
    if job.machine.threads is not None:
        torch.set_num_threads(job.machine.threads)
    with OutputFolder(out / job.name) as output:
        output.hold()  # against what a killed experiment may have left running
        corpus = open_corpus(out, data, job.config, stop.check)
        parallel = Parallel(job.machine.device)
        run_series(Run(output, job.config, job.machine, corpus, parallel, stop))
