"""The command line: every mistake is one line that says what to do, before anything is written."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.command_line import CommandLine, OptionError, integer, number
from continual.memory_methods import METHODS
from continual.permuted_digits import Run, Settings

__all__ = ["Arguments", "parse_arguments"]

_SWEEP_SEED = 100  # the seeds of --sweep start here, so that none is used for both


@dataclass(frozen=True)
class _Defaults:
    """What --quick changes."""

    out: str
    tasks: tuple[int, ...]
    seeds: int
    epochs: int


_FULL = _Defaults("out/digits", (5, 10), 5, 20)
_QUICK = _Defaults("out/digits-quick", (3,), 2, 2)

_DESCRIPTION = """\
Learn the 8 x 8 digits that come with scikit-learn again and again, each time with their pixels in
another fixed random order, and measure what is left of the earlier orders. One network of
64-256-256-10 units with one head learns them all, by ARSAdamW under the penalty of each method; all
methods see the same data in the same order."""

_EPILOG = f"""\
methods: {", ".join(METHODS)}

Results: results.json (the accuracy on every task after every task), table.md and figures in the
output folder. Interrupt at any time (Ctrl-C) and run the same command again to go on: runs that are
done are kept. Exit status: 0 done; 2 the command line or the output folder is wrong; 130 or 143
interrupted."""


@dataclass(frozen=True)
class Arguments:
    """What the user asked for.

    Args:
        out: output folder.
        settings: of all runs.
        runs: in the order of doing.
        threads: CPU threads.
        sweep: compare strengths rather than methods.
    """

    out: Path
    settings: Settings
    runs: tuple[Run, ...]
    threads: int
    sweep: bool


def _tasks(text: str) -> tuple[int, ...]:
    parse = integer(2, 100)
    return tuple(dict.fromkeys(parse(part) for part in text.split(",")))


def _methods(text: str) -> tuple[tuple[str, float | None], ...]:
    chosen: list[tuple[str, float | None]] = []
    for part in text.split(","):
        name, equals, strength = part.partition("=")
        if name not in METHODS:
            raise argparse.ArgumentTypeError(
                f"{name!r} is not a method: choose among {', '.join(METHODS)}"
            )
        if not equals:
            chosen.append((name, None))
            continue
        if METHODS[name].strength == 0:
            raise argparse.ArgumentTypeError(f"{name!r} has no strength: leave out ={strength}")
        try:
            chosen.append((name, number(0, 1e30)(strength)))
        except OptionError as error:
            raise argparse.ArgumentTypeError(f"{name}: {error}") from None
    return tuple(dict.fromkeys(chosen))


def _build_parser() -> CommandLine:
    parser = CommandLine("continual_digits.py", _DESCRIPTION, _EPILOG)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"output folder (default: {_FULL.out}, with --quick {_QUICK.out}, with --sweep either "
        "of them and -sweep)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the whole path in well under a minute: smaller defaults for the options that name a "
        "value with --quick (default: off)",
    )
    parser.add_argument(
        "--methods",
        type=_methods,
        metavar="M[=S][,...]",
        help="which methods (see below), each with the strength of its penalty if it is to be "
        "another than the chosen one, as in ewc=1e12,kfac (default: all)",
    )
    parser.add_argument(
        "--tasks",
        type=_tasks,
        metavar="K[,K...]",
        help="permutations a sequence, from 2 to 100 (default: "
        f"{','.join(map(str, _FULL.tasks))}, with --quick {_QUICK.tasks[0]}, "
        f"with --sweep {_FULL.tasks[0]})",
    )
    parser.add_argument(
        "--seeds",
        type=integer(1, 100),
        metavar="N",
        help="repetitions: seeds 0 to N - 1 give the permutations, the weights and the order of "
        f"the images; with --sweep {_SWEEP_SEED} to {_SWEEP_SEED - 1} + N "
        f"(default: {_FULL.seeds}, with --quick {_QUICK.seeds}, with --sweep 2)",
    )
    parser.add_argument(
        "--epochs",
        type=integer(1, 1000),
        metavar="N",
        help="passes over the images for each permutation "
        f"(default: {_FULL.epochs}, with --quick {_QUICK.epochs})",
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="try a grid of strengths for the methods that have one, on other seeds, and measure "
        "on images held out of the training set, never on the test images: how they were chosen "
        "(default: off)",
    )
    parser.add_argument(
        "--threads",
        type=integer(1, 1024),
        default=1,
        metavar="N",
        help="CPU threads; the network is too small for more than one (default: %(default)s)",
    )
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """Read and check the command line; exit with status 2 and one line if it is wrong.

    Args:
        argv: the words after the program's name; ``None`` for those of this process.
    """
    parser = _build_parser()
    given = parser.parse_args(argv)
    base = _QUICK if given.quick else _FULL
    sweep: bool = given.sweep
    chosen: tuple[tuple[str, float | None], ...] = given.methods or tuple(
        (name, None) for name in METHODS
    )
    if sweep:
        if any(strength is not None for _, strength in chosen):
            parser.error("argument --sweep: leave out the strengths of --methods")
        chosen = tuple((name, strength) for name, _ in chosen for strength in METHODS[name].grid)
        if not chosen:
            swept = ", ".join(name for name, method in METHODS.items() if method.grid)
            parser.error(f"argument --sweep: choose --methods among {swept}")
    tasks = given.tasks or (base.tasks[:1] if sweep else base.tasks)
    seeds = given.seeds or (2 if sweep else base.seeds)
    first = _SWEEP_SEED if sweep else 0
    runs = (
        Run(name, METHODS[name].strength if strength is None else strength, k, seed)
        for k in tasks
        for name, strength in chosen
        for seed in range(first, first + seeds)
    )
    return Arguments(
        out=given.out or Path(base.out + ("-sweep" if sweep else "")),
        settings=Settings(epochs=given.epochs or base.epochs, validation=sweep),
        runs=tuple(dict.fromkeys(runs)),  # a strength may be given beside the same default
        threads=given.threads,
        sweep=sweep,
    )
