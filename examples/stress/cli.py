"""The command line of the stress tests: every mistake is one line that says what to do."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.command_line import CommandLine, integer
from stress.compared_optimizers import ARMS
from stress.scenarios import SCENARIOS, SIZES, Size
from stress.stress_run import Job

__all__ = ["SENSITIVITY_PAIRS", "Arguments", "parse_arguments"]

_FIRST_SEED = 0
_MODES = ("quick", "sensitivity", "oscillation")
_QUICK_ARMS = ("adamw", "adamw-clip", "paper", "default")
_QUICK_SCENARIOS = ("ordinary", "bytes", "loop", "edge")

SENSITIVITY_PAIRS = (
    (("window", (25, 50, 100)), ("threshold", (5.0, 10.0, 20.0))),
    (("phi_min", (0.03, 0.1, 0.3)), ("first_release", (5, 20, 80, 400))),
    (("gate", (("betas",), ("lr",), ("grad",), ("betas", "lr"))), ("alpha", (0.3, 1.0, 3.0))),
)
_SENSITIVITY_SCENARIOS = ("ordinary", "bytes", "edge")

_DESCRIPTION = """\
Train a small byte-level GPT on the source of Python's own standard library, in ordinary training
and through stresses that begin half-way, with AdamW, AdamW with clipping, the controller as
proposed and its parts, the default controller, and the default on SGD and Muon. Prints a table a
scenario."""

_EPILOG = """\
Results: tables.md, runs.csv, summary.json, <scenario>.png and runs/ (one JSON file a run).
Interrupt at any time (Ctrl-C) and run the same command again to go on where it stopped."""


@dataclass(frozen=True)
class Arguments:
    """What the user asked for.

    Args:
        out: output folder.
        data: text file to train on; ``None`` for the standard library.
        workers: processes.
        sensitivity: whether it is the sweep over the settings of the controller.
        oscillation: seeds of the self-oscillation, empty if that is not asked for.
        size: of a run.
        jobs: the runs.
    """

    out: Path
    data: Path | None
    workers: int
    sensitivity: bool
    oscillation: range
    size: Size
    jobs: tuple[Job, ...]


def _names(known: Sequence[str]) -> "type[str]":
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse  # type: ignore[return-value]


def _build_parser() -> CommandLine:
    parser = CommandLine("narcissus.py", _DESCRIPTION, _EPILOG)
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="output folder (default: out/narcissus, with --quick out/narcissus-quick, and so on)",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, metavar="FILE",
        help="any file: its bytes are the tokens, its last tenth is for validation "
        "(default: the Python files of the standard library, split by file)",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true",
        help="under three minutes: one seed, four scenarios, four arms (default: off)",
    )  # fmt: skip
    parser.add_argument(
        "--sensitivity", action="store_true",
        help="instead of the arms, the default controller with other settings (default: off)",
    )  # fmt: skip
    parser.add_argument(
        "--oscillation", action="store_true",
        help="instead of a GPT, logistic regression that alternates beyond the edge; a minute "
        "(default: off)",
    )  # fmt: skip
    parser.add_argument(
        "--scenarios", type=_names(tuple(SCENARIOS)), metavar="NAME[,NAME...]",
        help=f"some of {', '.join(SCENARIOS)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--arms", type=_names(tuple(ARMS)), metavar="NAME[,NAME...]",
        help=f"some of {', '.join(ARMS)} (default: all in the stresses, the main ones in "
        "ordinary and reversal)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=integer(1, 1000), metavar="N",
        help="number of seeds (default: 10, with --quick 1, with --sensitivity 2)",
    )  # fmt: skip
    parser.add_argument(
        "--first-seed", type=integer(0, 2**31), default=_FIRST_SEED, metavar="S",
        help="the first of them (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--size", choices=tuple(SIZES), default="small",
        help="of model and run; gpu needs a CUDA device (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=integer(1, 256), default=1, metavar="N",
        help="processes, one thread each (default: %(default)s)",
    )  # fmt: skip
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Read and check the command line; exit with status 2 and one line if it is wrong.

    Args:
        argv: the words after the program's name; ``None`` for those of this process.
    """
    parser = _build_parser()
    given = parser.parse_args(argv)
    chosen = [mode for mode in _MODES if getattr(given, mode)]
    if given.sensitivity and (given.quick or given.arms):
        parser.error("argument --sensitivity: takes neither --quick nor --arms")
    if given.oscillation and (len(chosen) > 1 or given.arms or given.scenarios or given.data):
        parser.error("argument --oscillation: takes --out, --seeds and --first-seed only")
    size = SIZES[given.size]
    suffix = f"-{chosen[0]}" if chosen else ""
    seeds = given.seeds or (2 if given.sensitivity else 1 if given.quick else 10)
    numbers = range(given.first_seed, given.first_seed + seeds)
    if given.oscillation:
        jobs: tuple[Job, ...] = ()
    elif given.sensitivity:
        jobs = _sensitivity_jobs(given.scenarios or _SENSITIVITY_SCENARIOS, numbers, size)
    else:
        scenarios = given.scenarios or (_QUICK_SCENARIOS if given.quick else tuple(SCENARIOS))
        arms = given.arms or (_QUICK_ARMS if given.quick else ())
        jobs = tuple(
            Job(scenario, arm, rate, seed, size)
            for seed in numbers
            for scenario in scenarios
            for rate in ((1.0,) if given.quick else SCENARIOS[scenario].rates)
            for arm in arms or SCENARIOS[scenario].arms or ARMS
        )
    return Arguments(
        out=given.out or Path(f"out/narcissus{suffix}"),
        data=given.data,
        workers=given.workers,
        sensitivity=given.sensitivity,
        oscillation=numbers if given.oscillation else range(0),
        size=size,
        jobs=jobs,
    )


def _sensitivity_jobs(
    scenarios: Sequence[str], seeds: Sequence[int], size: Size
) -> tuple[Job, ...]:
    return tuple(
        Job(scenario, "default", 1.0, seed, size, ((down, y), (across, x)))
        for scenario in scenarios
        for (down, ys), (across, xs) in SENSITIVITY_PAIRS
        for y in ys
        for x in xs
        for seed in seeds
    )
