"""The command line of the experiment."""

import argparse
import math
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch

from experiment.design import SIZES, STAGES, jobs_of
from experiment.jobs import open_corpus, run_jobs
from experiment.summary import write_summary
from trainer.arguments import Parser, integer, number
from trainer.errors import UsageError
from trainer.folder import OutputFolder
from trainer.program import command, quit_on_signals
from trainer.series import check_folder
from trainer.signals import StopRequest

__all__ = ["parse_arguments", "run"]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; a mistake ends the program with status 2.

    Args:
        argv: the words after the program's name; ``None`` for those of this process.
    """
    parser = Parser(
        prog="inheritance.py",
        description="Train every arm of the miniseries at equal total FLOPs, after tuning what is "
        "compared with; sweep the strengths of the penalties on one transition; and give the "
        "largest model's operations to smaller ones.",
        epilog="Interrupt at any time (Ctrl-C) and run the same command again to go on.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR",
        help="output folder (default: out/inheritance-SIZE)")  # fmt: skip
    add("--data", metavar="SOURCE",
        help="text, as for miniseries.py (default: the standard library's source)")  # fmt: skip
    add("--size", choices=sorted(SIZES), default="cpu",
        help="cpu: d2 to d4; gpu: d4 to d10; quick: d1 to d3 (default: %(default)s)")  # fmt: skip
    add("--stage", choices=STAGES, nargs="+", default=list(STAGES),
        help="what to do (default: all)")  # fmt: skip
    add("--workers", type=integer(1, 256), default=1, metavar="N",
        help="series trained at a time, each on one thread (default: %(default)s)")  # fmt: skip
    add("--minutes", type=number(0, 1e6, above=True), metavar="M",
        help="stop in good order after so long, to be continued (default: never)")  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.out is None:
        arguments.out = Path(f"out/inheritance-{arguments.size}")
    return arguments


def run(arguments: argparse.Namespace) -> str:
    """Train what is not yet trained and sum it up.

    Args:
        arguments: of `parse_arguments`.

    Returns:
        What to tell the user.

    Raises:
        RunInterruptedError: a signal arrived, or the minutes are over.
        UsageError: the device, the text or the folder cannot be used, or a series failed.
    """
    minutes = math.inf if arguments.minutes is None else arguments.minutes
    deadline = time.monotonic() + 60 * minutes
    out, size, data = arguments.out, arguments.size, arguments.data
    stages = {stage: jobs_of(stage, size) for stage in STAGES}
    every = list(chain.from_iterable(stages.values()))
    asked = [job for stage in dict.fromkeys(arguments.stage) for job in stages[stage]]
    if size == "gpu" and not torch.cuda.is_available():
        raise UsageError("--size gpu needs a CUDA device and torch finds none: use --size cpu")
    with StopRequest() as stop, OutputFolder(out) as output:
        output.hold()

        def check() -> None:
            stop.check()
            output.check()
            if time.monotonic() >= deadline:
                stop.leave()

        corpus = open_corpus(out, data, SIZES[size], check)
        for job in every:  # all stages: they are summed up together, of one text and one design
            check_folder(out / job.name, job.config, corpus)
        run_jobs(out, data, asked, arguments.workers, check)
        stop.check()
        # All is trained, so that nothing has to be saved: a signal ends the program at once.
        quit_on_signals(f"interrupted while summing up: run `{command()}` again")
        summary = write_summary(out, {job.name for job in every})
        output.check()
        return summary
