"""The command lines of the trainer: every mistake is one line, before anything is written.

Nothing here imports torch, so that a mistake is told at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from trainer import values
from trainer.arguments import integer, number
from trainer.config import SeriesConfig
from trainer.machine import Machine
from trainer.options import QUICK, add_files, add_machine, add_series, default_steps
from trainer.parser import OptionParser

__all__ = [
    "Arguments", "PlanArguments", "SampleArguments", "parse_arguments", "parse_plan",
    "parse_sample",
]  # fmt: skip

_DESCRIPTION = """\
Train a miniseries of GPTs (width 64 x depth, heads of 64 channels), by default of bytes and on the
source of Python's own standard library. Models are grown out of the one before them,
function-preserving, with their whole training state, and compared with models of the same size
from scratch that get the FLOPs of the whole lineage.

Other modes: miniseries.py plan --help, miniseries.py sample --help."""

_EPILOG = """\
Results in the output folder: report.html, table.md, metrics.json, metrics/, loss_*.png, log_*.csv
and checkpoints/.
Interrupt at any time (Ctrl-C) and run the same command again to go on where it stopped."""

_PLAN_DESCRIPTION = """\
Print what a series would be, without training and without reading any data: the settings of every
depth, and what every model costs, lineage included. Takes the options of training, and:"""

_ON_PAPER = ("--series", "--peak-flops", "--mfu", "--devices", "--price")

_SAMPLE_DESCRIPTION = "Print what a trained model makes of the beginning of a text."


@dataclass(frozen=True)
class Arguments:
    """What the user asked for.

    Args:
        out: output folder.
        data: what `corpus.prepare_corpus` reads; ``None`` for the standard library.
        column: of a table.
        tokenizer: "bytes", "bpe:N" or a path.
        cache: folder of the tokens; ``None`` for one inside ``out``.
        config: the settings of the series.
        machine: what it is trained with.
    """

    out: Path
    data: str | None
    column: str | None
    tokenizer: str
    cache: Path | None
    config: SeriesConfig
    machine: Machine


@dataclass(frozen=True)
class PlanArguments:
    """What the user wants planned.

    Args:
        arguments: of the training that is planned; its machine names the peak.
        series: "own", or a series on paper: "nanochat" or "doubling".
        mfu: share of the peak that is reached.
        devices: that work at once.
        price: of a device hour; ``None`` for unknown.
    """

    arguments: Arguments
    series: str
    mfu: float
    devices: int
    price: float | None


@dataclass(frozen=True)
class SampleArguments:
    """What the user wants continued.

    Args:
        checkpoint: of a model in the folder of a run.
        prompt: beginning of the text.
        tokens: to add.
        temperature: 0 takes the likeliest token.
        top_k: only so many of the likeliest; ``None`` for all.
        seed: of the draws.
        count: of samples.
        device: "cpu", "cuda" or "cuda:N".
    """

    checkpoint: Path
    prompt: str
    tokens: int
    temperature: float
    top_k: int | None
    seed: int
    count: int
    device: str


def parse_arguments(words: Sequence[str]) -> Arguments:
    """Read the command line of training; exit with status 2 and one line if it is wrong.

    Args:
        words: after the program's name.
    """
    parser = OptionParser("miniseries.py", _DESCRIPTION, _EPILOG)
    return _arguments(parser, words)[1]


def parse_plan(words: Sequence[str]) -> PlanArguments:
    """Read the command line of planning; exit with status 2 and one line if it is wrong.

    Args:
        words: after the mode.
    """
    parser = OptionParser("miniseries.py plan", _PLAN_DESCRIPTION)
    parser.add_command_option(
        "--series", values.choice("own", "nanochat", "doubling"), "own", "NAME",
        "own: by the options; on paper, nanochat: its first miniseries, d10 to d20; doubling: "
        "7M to 7.2B (default: own)",
    )  # fmt: skip
    parser.add_command_option(
        "--mfu", number(0, 1, above=True), 0.4, "X",
        "share of --peak-flops that is reached (default: 0.4)",
    )  # fmt: skip
    parser.add_command_option(
        "--devices", integer(1, 1_000_000), 1, "N", "devices that work at once (default: 1)"
    )
    parser.add_command_option(
        "--price", number(0, 1e6), None, "P", "of a device hour (default: unknown)"
    )
    given, arguments = _arguments(parser, words)
    named = [word.split("=")[0] for word in words if word.startswith("--")]
    if given.series != "own":
        useless = [name for name in named if name not in _ON_PAPER]
        if useless:
            parser.error(f"argument {useless[0]}: --series {given.series} is on paper and takes "
                         f"only {', '.join(_ON_PAPER[1:])}: leave it out")  # fmt: skip
    needing = [name for name in ("--mfu", "--devices", "--price") if name in named]
    if needing and arguments.machine.peak_flops is None:
        parser.error(f"argument {needing[0]}: it takes --peak-flops, to know the hours")
    return PlanArguments(arguments, given.series, given.mfu, given.devices, given.price)


def parse_sample(words: Sequence[str]) -> SampleArguments:
    """Read the command line of sampling; exit with status 2 and one line if it is wrong.

    Args:
        words: after the mode.
    """
    parser = OptionParser("miniseries.py sample", _SAMPLE_DESCRIPTION)
    add = parser.add_command_option
    add("--checkpoint", values.optional(values.path), None, "FILE",
        "a file of the checkpoints folder of a run, such as out/demo/checkpoints/d4-scratch+ars.pt "
        "(default: none, it has to be named)")  # fmt: skip
    add("--prompt", str, "", "TEXT", "beginning of the text (default: empty)")
    add("--tokens", integer(1, 1_000_000), 200, "N", "tokens to add (default: 200)")
    add("--temperature", values.zero_or(number(0.001, 100)), 0.8, "X",
        "below 1 likelier tokens are preferred; 0 takes the likeliest (default: 0.8)")  # fmt: skip
    add("--top-k", values.optional(integer(1, 1_000_000)), None, "K",
        "draw from the K likeliest tokens (default: all)")  # fmt: skip
    add("--seed", integer(0, 2**32 - 1), 0, "N", "of the draws (default: 0)")
    add("--count", integer(1, 1000), 1, "N", "samples (default: 1)")
    add("--device", values.text, "cpu", "D", "cpu, cuda or cuda:N (default: cpu)")
    given = parser.parse_words(words)
    if given.checkpoint is None:
        parser.error("--checkpoint is missing: name a file of a run's checkpoints folder")
    return SampleArguments(**{f.name: given[f.name] for f in fields(SampleArguments)})


def _arguments(parser: OptionParser, words: Sequence[str]) -> tuple[Namespace, Arguments]:
    add_files(parser)
    add_series(parser)
    add_machine(parser)
    quick = "--quick" in words
    if quick:
        parser.set_defaults({**QUICK, "steps": None})
    given = parser.parse_words(words)
    if given.ratio is None:
        given.steps = _steps_of(parser, given, quick=quick)
    kept = {} if given.ratio is None else {"ratio": given.ratio}
    config = SeriesConfig(
        **kept, **{f.name: given[f.name] for f in fields(SeriesConfig) if f.name != "ratio"}
    )
    machine = Machine(**{f.name: given[f.name] for f in fields(Machine)})
    _check(parser, config)
    if given.print_config:
        print(_as_file(parser, given), end="")
        parser.exit(0)
    arguments = Arguments(
        out=given.out,
        data=given.data,
        column=given.column,
        tokenizer=given.tokenizer,
        cache=given.cache,
        config=config,
        machine=machine,
    )
    return given, arguments


def _steps_of(parser: OptionParser, given: Namespace, *, quick: bool) -> tuple[int, ...]:
    depths: tuple[int, ...] = given.depths
    steps: tuple[int, ...] = given.steps or (QUICK["steps"] if quick else default_steps(depths))
    if len(steps) == 1:
        steps *= len(depths)
    if len(steps) != len(depths):
        parser.error(
            f"argument --steps: {len(steps)} numbers for {len(depths)} depths: "
            "give one for all or one for each"
        )
    return steps


def _check(parser: OptionParser, config: SeriesConfig) -> None:
    """What no option can know of itself."""
    if config.parents is not None:
        strangers = [depth for depth in config.parents if depth not in config.depths]
        if strangers:
            parser.error(f"argument --parents: {strangers[0]} is not among --depths "
                         f"{','.join(map(str, config.depths))}")  # fmt: skip
        if config.parents[0] != config.depths[0]:
            parser.error(f"argument --parents: the first depth, {config.depths[0]}, has to be "
                         "there: every chain begins with it")  # fmt: skip


def _as_file(parser: OptionParser, given: Namespace) -> str:
    content: dict[str, Any] = {}
    for key in parser.file_keys():
        value = given[key]
        content[key] = str(value) if isinstance(value, Path) else value
    return str(yaml.safe_dump(content, sort_keys=False))
