"""The command line of the experiment."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from common.command_line import CommandLine, integer, number
from experiment.experiment_design import SIZES, STAGES

__all__ = ["parse_arguments"]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; a mistake ends the program with status 2.

    Args:
        argv: the words after the program's name; ``None`` for those of this process.
    """
    parser = CommandLine(
        "inheritance.py",
        "Train every arm of the miniseries at equal total FLOPs, after tuning what is "
        "compared with; sweep the strengths of the penalties on one transition; and give the "
        "largest model's operations to smaller ones.",
        "Interrupt at any time (Ctrl-C) and run the same command again to go on.",
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
    add("--minutes", type=number(0, 1e6, above=True), default=math.inf, metavar="M",
        help="stop in good order after so long, to be continued (default: never)")  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.out is None:
        arguments.out = Path(f"out/inheritance-{arguments.size}")
    return arguments
