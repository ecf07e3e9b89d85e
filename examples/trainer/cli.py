"""The command line: every mistake is one line that says what to do, before anything is written."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from trainer.arguments import Parser, integer, number
from trainer.config import ARS_CHOICES, DEFAULT_EWC_STRENGTH, SeriesConfig, default_steps

__all__ = ["Arguments", "parse_arguments"]

_LARGEST_DEPTH = 20


@dataclass(frozen=True)
class _Defaults:
    """What --quick changes."""

    out: str
    depths: tuple[int, ...]
    steps: tuple[int, ...]
    batch_size: int
    sequence_len: int
    fisher_samples: int


_FULL = _Defaults("out/demo", (2, 3, 4), default_steps((2, 3, 4)), 4, 256, 64)
_QUICK = _Defaults("out/quick", (1, 2, 3), (24, 24, 24), 8, 64, 16)

_DESCRIPTION = """\
Train a miniseries of byte-level GPTs (width 64 x depth, heads of 64 channels) on the source of
Python's own standard library. Every model is grown out of the one before it, function-preserving,
with its whole training state and a Fisher-weighted EWC penalty, and compared with a model of the
same size from scratch that gets the FLOPs of the whole lineage."""

_EPILOG = """\
Results: table.md, metrics.json, loss_*.png, log_*.csv and checkpoints/ in the output folder.
Interrupt at any time (Ctrl-C) and run the same command again to go on where it stopped."""


@dataclass(frozen=True)
class Arguments:
    """What the user asked for.

    Args:
        out: output folder.
        data: text file to train on; ``None`` for the standard library.
        threads: CPU threads; ``None`` leaves torch's own choice.
        config: the settings of the series.
        ratio: tokens per scaling parameter, to replace ``config.steps``; ``None`` keeps them.
    """

    out: Path
    data: Path | None
    threads: int | None
    config: SeriesConfig
    ratio: float | None


def _depths(text: str) -> tuple[int, ...]:
    try:
        if "-" in text:
            first, last = (int(part) for part in text.split("-"))
            depths = tuple(range(first, last + 1))
        else:
            depths = tuple(int(part) for part in text.split(","))
    except ValueError:
        depths = ()
    ascending = all(a < b for a, b in pairwise(depths))
    if len(depths) < 2 or not ascending or depths[0] < 1 or depths[-1] > _LARGEST_DEPTH:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a series: give two or more ascending depths from 1 to "
            f"{_LARGEST_DEPTH}, such as 2-4 or 2,3,4"
        )
    return depths


def _steps(text: str) -> tuple[int, ...]:
    parse = integer(1, 10_000_000)
    return tuple(parse(part) for part in text.split(","))


def _build_parser() -> Parser:
    parser = Parser(
        prog="miniseries.py",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"output folder (default: {_FULL.out}, with --quick {_QUICK.out})",
    )
    files.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="any file: its bytes are the tokens, its last tenth is for validation "
        "(default: the Python files of the standard library, split by file)",
    )
    size = parser.add_argument_group("size")
    size.add_argument(
        "--quick",
        action="store_true",
        help="the whole path in under a minute: smaller defaults for the options that name a "
        "value with --quick (default: off)",
    )
    size.add_argument(
        "--depths",
        type=_depths,
        metavar="D",
        help="layers of each model, as 2-4 or 2,3,4 (default: 2-4, with --quick 1-3)",
    )
    budget = size.add_mutually_exclusive_group()
    budget.add_argument(
        "--steps",
        type=_steps,
        metavar="N[,N...]",
        help="trunk steps, one number for all depths or one for each; the cooled branch adds a "
        f"quarter (default: {','.join(map(str, _FULL.steps))} for depths 2,3,4, "
        f"{default_steps((_LARGEST_DEPTH,))[0]} for others, with --quick {_QUICK.steps[0]})",
    )
    budget.add_argument(
        "--ratio",
        type=number(0, 1000, above=True),
        metavar="R",
        help="instead of --steps: trunk tokens per parameter in matrix products; about 10 is "
        "optimal for a model from scratch (default: not used)",
    )
    size.add_argument(
        "--batch-size",
        type=integer(1, 4096),
        metavar="B",
        help=f"sequences a step (default: {_FULL.batch_size}, with --quick {_QUICK.batch_size})",
    )
    size.add_argument(
        "--sequence-len",
        type=integer(8, 8192),
        metavar="T",
        help=f"bytes a sequence (default: {_FULL.sequence_len}, "
        f"with --quick {_QUICK.sequence_len})",
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--lr",
        type=number(0, 1, above=True),
        default=3e-3,
        help="constant learning rate of the trunk, both arms (default: %(default)s)",
    )
    training.add_argument(
        "--ewc-strength",
        type=number(0, 1e12),
        default=DEFAULT_EWC_STRENGTH,
        metavar="S",
        help="weight of the EWC penalty of inherited models; 0 trains without it and without "
        "the Fisher pass (default: %(default)s)",
    )
    training.add_argument(
        "--fisher-samples",
        type=integer(1, 1_000_000),
        metavar="N",
        help="sequences that the Fisher information is averaged over "
        f"(default: {_FULL.fisher_samples}, with --quick {_QUICK.fisher_samples})",
    )
    training.add_argument(
        "--ars",
        choices=ARS_CHOICES,
        default="default",
        help="stability controller of the optimizer, both arms (default: %(default)s)",
    )
    training.add_argument(
        "--seed",
        type=integer(0, 2**32 - 1),
        default=0,
        help="of weights, batches and Fisher sketch (default: %(default)s)",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)"
    )
    machine.add_argument(
        "--threads",
        type=integer(1, 1024),
        metavar="N",
        help="CPU threads; numbers repeat bit by bit for one choice (default: torch's choice)",
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
    depths: tuple[int, ...] = given.depths or base.depths
    steps: tuple[int, ...] = given.steps or (
        base.steps[:1] if given.quick else default_steps(depths)
    )
    if len(steps) == 1:
        steps *= len(depths)
    if len(steps) != len(depths):
        parser.error(
            f"argument --steps: {len(steps)} numbers for {len(depths)} depths: "
            "give one for all or one for each"
        )
    config = SeriesConfig(
        depths=depths,
        steps=steps,
        batch_size=given.batch_size or base.batch_size,
        sequence_len=given.sequence_len or base.sequence_len,
        lr=given.lr,
        ewc_strength=given.ewc_strength,
        fisher_samples=given.fisher_samples or base.fisher_samples,
        ars=given.ars,
        seed=given.seed,
        device=given.device,
    )
    return Arguments(
        out=given.out or Path(base.out),
        data=given.data,
        threads=given.threads,
        config=config,
        ratio=given.ratio,
    )
