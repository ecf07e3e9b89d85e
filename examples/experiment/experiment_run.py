"""The experiment from end to end: its series, several at a time, and their summary.

A series resumes by itself, so a stopped experiment goes on where every one of them stopped.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from common.command_line import CommandLine, choice, integer, number, option, path, text
from common.errors import UsageError
from common.jobs import run_jobs
from common.output_folder import OutputFolder
from common.program import StopRequest, command, quit_on_signals
from corpus import Corpus, prepare_corpus
from experiment.experiment_design import SIZES, STAGES, Job, Stage, jobs_of
from experiment.experiment_report import write_summary
from trainer.parallel import Parallel
from trainer.series_report import FIGURES
from trainer.series_run import Run, check_folder
from trainer.settings import SeriesConfig
from trainer.train_series import run_series

__all__ = ["Options", "open_corpus", "parse_options", "run_experiment", "train_series"]

_DESCRIPTION = """\
Train every arm of the miniseries at equal total FLOPs, after tuning what is compared with; sweep
the strengths of the penalties on one transition; and give the largest model's operations to smaller
ones."""
_EPILOG = "Interrupt at any time (Ctrl-C) and run the same command again to go on."


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Args:
        out: output folder; ``None``: out/inheritance- and the size.
        data: text, as for miniseries.py; ``None``: the standard library's source.
        size: cpu: d2 to d4; gpu: d4 to d10; quick: d1 to d3.
        stage: what to train, one or more of tune, grid, sizes and arms.
        workers: series trained at a time, each on one thread.
        minutes: stop in good order after so long, to be continued; ``None``: never.
    """

    out: Path | None = option(None, path)
    data: str | None = option(None, text)
    size: str = option("cpu", choice(*sorted(SIZES)))
    stage: tuple[Stage, ...] = option(STAGES, choice(*STAGES), many=True)
    workers: int = option(1, integer(1, 256))
    minutes: float | None = option(None, number(0, 1e6, above=True))

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.out or Path(f"out/inheritance-{self.size}")


def parse_options(words: Sequence[str] | None) -> Options:
    """Read the command line; a mistake ends the program with status 2.

    Args:
        words: after the program's name; ``None`` for those of this process.
    """
    line = CommandLine("inheritance.py", _DESCRIPTION, _EPILOG)
    line.add_settings("settings", Options, in_files=False)
    options: Options = line.build(Options, line.parse(words))
    return options


def run_experiment(options: Options) -> str:
    """Train what is not yet trained and sum it up.

    Args:
        options: what to train, and where.

    Returns:
        What to tell the user.

    Raises:
        RunInterruptedError: a signal arrived, or the minutes are over.
        UsageError: the device, the text or the folder cannot be used, or a series failed.
    """
    out, size, data = options.folder, options.size, options.data
    minutes = math.inf if options.minutes is None else options.minutes
    deadline = time.monotonic() + 60 * minutes
    jobs = {stage: jobs_of(stage, size) for stage in STAGES}
    every = list(chain.from_iterable(jobs.values()))
    asked = [job for stage in dict.fromkeys(options.stage) for job in jobs[stage]]
    if size == "gpu" and not torch.cuda.is_available():
        raise UsageError("--size gpu needs a CUDA device and torch finds none: use --size cpu")
    with OutputFolder(out) as output, _Stop(output, deadline) as stop:
        output.hold()
        corpus = open_corpus(out, data, SIZES[size], stop.check)
        for job in every:  # all stages: they are summed up together, of one text and one design
            check_folder(out / job.name, job.config, corpus)
        train_series(out, data, asked, options.workers, stop)
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
