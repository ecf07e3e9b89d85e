"""The experiment from end to end: its runs, several at a time, their results and the summary.

The records and settings of every run are kept, so that an experiment of many hours is done in
several sittings, on other machines too: a run whose records are there is not repeated. Within a
sitting a stopped run goes on where it stopped.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common.command_line import CommandLine, choice, integer, number, option, optional, path, text
from common.errors import UsageError
from common.jobs import run_jobs
from common.output_folder import OutputFolder
from common.plain_files import read_json, write_atomically
from common.program import StopRequest, command, quit_on_signals
from corpus import Corpus, prepare_corpus
from experiment.series_design import DESIGNS, STAGES, Job, jobs_of
from experiment.series_results import records_of, write_results
from trainer.parallel import Parallel
from trainer.series_plan import plans_of
from trainer.series_run import CONFIG_FILE, Run, check_folder
from trainer.settings import SeriesConfig
from trainer.train_series import run_series

__all__ = ["Options", "parse_options", "run_experiment"]

_DESCRIPTION = """\
Measure what growing saves: train every member of a series from scratch (its twin) and grow it out
of the member before it, and say what share of the twins' operations the grown series takes."""
_EPILOG = "Interrupt at any time (Ctrl-C) and run the same command again to go on."
_BYTES = 256
_DEFAULTS = {**SeriesConfig().to_dict(), "lineage": None}


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Args:
        out: folder of the runs; ``None``: out/inheritance- and the design.
        results: folder of the results, with the records of each run; ``None``: results/ in the
            folder of the runs. Runs whose records are there are not repeated.
        data: text, as for miniseries.py; ``None``: the standard library's source.
        design: miniature: eleven members from 0.1M to 0.8M parameters; half: the first six of
            these, an eighth of the operations; half-at-20-tokens: the same, trained 2.5 times as
            long; quick: three tiny ones.
        stage: what to train, one or more of twin, miniature, muon, factor, point and search; none
            only sums up.
        workers: runs at a time, each on one thread.
        minutes: stop in good order after so long, to be continued; ``None``: never.
    """

    out: Path | None = option(None, optional(path))
    results: Path | None = option(None, optional(path))
    data: str | None = option(None, optional(text))
    design: str = option("miniature", choice(*sorted(DESIGNS)))
    stage: tuple[str, ...] = option(("miniature",), choice(*STAGES, "none"), many=True)
    workers: int = option(1, integer(1, 256))
    minutes: float | None = option(None, optional(number(0, 1e6, above=True)))

    @property
    def folder(self) -> Path:
        """Where the runs go."""
        return self.out or Path(f"out/inheritance-{self.design}")

    @property
    def results_folder(self) -> Path:
        """Where their results go."""
        return self.results or self.folder / "results"


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
    """Train what has no results yet, and sum up what has.

    Args:
        options: what to train, and where.

    Returns:
        What to tell the user.

    Raises:
        RunInterruptedError: a signal arrived, or the minutes are over.
        UsageError: the text or a folder cannot be used, a run failed, or results are of other
            settings.
    """
    out, results, design = options.folder, options.results_folder, DESIGNS[options.design]
    minutes = math.inf if options.minutes is None else options.minutes
    deadline = time.monotonic() + 60 * minutes
    asked = [job for stage in STAGES if stage in options.stage for job in jobs_of(stage, design)]
    with OutputFolder(out) as output, _Stop(output, deadline) as stop:
        output.hold()
        waiting = [job for job in asked if not _has_results(job, results)]
        if waiting:
            corpus = _open_corpus(out, options.data, waiting[0].config, stop.check)
            for job in waiting:
                check_folder(out / job.name, job.config, corpus)
            _train_runs(out, results, options.data, waiting, options.workers, stop)
        if stop.requested:  # not for the minutes, which are of the training
            stop.leave()
        # All is trained, so that nothing has to be saved: a signal ends the program at once.
        quit_on_signals(f"interrupted while summing up: run `{command()}` again")
        summary = write_results(results, design, options.design)
        output.check()
        return summary


def _has_results(job: Job, results: Path) -> bool:
    path = records_of(job.name, results)
    if not path.exists():
        return False
    remedy = "delete its folder to train again"
    settings = read_json(path.with_name(CONFIG_FILE), remedy=remedy).get("settings")
    if not isinstance(settings, dict) or _deciding(settings) != _deciding(job.config.to_dict()):
        raise UsageError(f"{path.parent} has the records of a run with other settings: {remedy}")
    return True


def _deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that a run depends on.

    Records that were made before a setting existed were made with its default.
    """
    found = {**_DEFAULTS, **settings}
    if found["lineage"] is not None or "grown" not in " ".join(found["arms"]):
        found["shares"] = None
    if found["shares"] is not None or "grown" not in " ".join(found["arms"]):
        found["lineage"] = None
    return found


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


def _open_corpus(
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


def _train_runs(
    out: Path, results: Path, data: str | None, jobs: Sequence[Job], workers: int, stop: StopRequest
) -> None:
    """Finish every run; one that fails stops the others, which save what they have.

    Raises:
        UsageError: a run failed; its last words and its log are in the message.
    """
    # Runs differ in length by two orders of magnitude: they are weighed by operations.
    costs = {job.name: sum(plan.flops for plan in plans_of(job.config, _BYTES)) for job in jobs}
    done: list[str] = []

    def keep(job: Job, _: None) -> None:
        path = records_of(job.name, results)
        path.parent.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG_FILE, path.name):  # the records last: they say that it is finished
            write_atomically(path.with_name(name), (out / job.name / name).read_text("utf-8"))
        done.append(job.name)

    run_jobs(
        jobs,
        partial(_train, out=out, data=data),
        keep,
        stop,
        workers=workers,
        threads=1,
        share_done=lambda: sum(costs[name] for name in done) / sum(costs.values()),
        log=lambda job: out / f"{job.name}.log",
    )


def _train(job: Job, stop: StopRequest, out: Path, data: str | None) -> None:
    with OutputFolder(out / job.name) as output:
        output.hold()  # against what a killed experiment may have left running
        corpus = _open_corpus(out, data, job.config, stop.check)
        parallel = Parallel(job.machine.device)
        run_series(Run(output, job.config, job.machine, corpus, parallel, stop))
