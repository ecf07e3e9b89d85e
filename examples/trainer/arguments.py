"""The command lines of ``miniseries.py``: every mistake is one line, before anything is written.

Nothing here imports torch, so that a mistake is told at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from common.command_line import (
    CommandLine,
    choice,
    integer,
    number,
    option,
    optional,
    path,
    text,
)  # fmt: skip
from trainer.settings import QUICK, Files, Machine, SeriesConfig

__all__ = [
    "Arguments", "PlanArguments", "SampleArguments", "parse_arguments", "parse_plan",
    "parse_sample",
]  # fmt: skip

_DESCRIPTION = """\
Train a miniseries of GPTs, by default of bytes and on the source of Python's own standard library.
Each model is grown out of the one before it, function-preserving, with its whole training state,
and held against its twin: the model of the same size from scratch. The report says what share of
its twin's operations each needs for the same loss, and what the whole series saves.

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
class Arguments(Files):
    """What the user asked for.

    Args:
        out: and further fields, see `Files`.
        config: the settings of the series.
        machine: what it is trained with.
    """

    config: SeriesConfig = SeriesConfig()
    machine: Machine = Machine()


@dataclass(frozen=True)
class _OnPaper:
    """What a plan assumes.

    Args:
        series: own: by the options; on paper, nanochat: its first miniseries, d10 to d20; doubling:
            7M to 7.2B.
        mfu: share of --peak-flops that is reached.
        devices: that work at once.
        price: of a device hour; ``None``: unknown.
    """

    series: str = option("own", choice("own", "nanochat", "doubling"))
    mfu: float = option(0.4, number(0, 1, above=True))
    devices: int = option(1, integer(1, 1_000_000))
    price: float | None = option(None, number(0, 1e6))


@dataclass(frozen=True)
class PlanArguments(_OnPaper):
    """What the user wants planned.

    Args:
        series: and further fields, see `_OnPaper`.
        arguments: of the training that is planned; its machine names the peak.
    """

    arguments: Arguments = Arguments()


@dataclass(frozen=True)
class SampleArguments:
    """What the user wants continued.

    Args:
        checkpoint: a file of the checkpoints folder of a run, such as
            out/demo/checkpoints/d4-scratch+ars.pt; has to be named.
        prompt: beginning of the text.
        tokens: to add.
        temperature: below 1 likelier tokens are preferred; 0 takes the likeliest.
        top_k: draw from the K likeliest tokens; ``None``: from all.
        seed: of the draws.
        count: samples.
        device: cpu, cuda or cuda:N.
    """

    checkpoint: Path = option(None, optional(path))
    prompt: str = option("", str)
    tokens: int = option(200, integer(1, 1_000_000))
    temperature: float = option(0.8, number(0.001, 100, or_zero=True))
    top_k: int | None = option(None, optional(integer(1, 1_000_000)))
    seed: int = option(0, integer(0, 2**32 - 1))
    count: int = option(1, integer(1, 1000))
    device: str = option("cpu", text)


def parse_arguments(words: Sequence[str]) -> Arguments:
    """Read the command line of training; exit with status 2 and one line if it is wrong.

    Args:
        words: after the program's name.
    """
    line = _training("miniseries.py", _DESCRIPTION, _EPILOG)
    return _arguments(line, line.parse(words))


def parse_plan(words: Sequence[str]) -> PlanArguments:
    """Read the command line of planning; exit with status 2 and one line if it is wrong.

    Args:
        words: after the mode.
    """
    line = _training("miniseries.py plan", _PLAN_DESCRIPTION)
    line.add_settings("plan", _OnPaper, in_files=False)
    values = line.parse(words)
    arguments = _arguments(line, values)
    named = [word.split("=")[0] for word in words if word.startswith("--")]
    if values["series"] != "own":
        useless = [name for name in named if name not in _ON_PAPER]
        if useless:
            line.error(f"argument {useless[0]}: --series {values['series']} is on paper and takes "
                       f"only {', '.join(_ON_PAPER[1:])}: leave it out")  # fmt: skip
    needing = [name for name in ("--mfu", "--devices", "--price") if name in named]
    if needing and arguments.machine.peak_flops is None:
        line.error(f"argument {needing[0]}: it takes --peak-flops, to know the hours")
    return PlanArguments(
        **{each.name: values[each.name] for each in fields(_OnPaper)}, arguments=arguments
    )


def parse_sample(words: Sequence[str]) -> SampleArguments:
    """Read the command line of sampling; exit with status 2 and one line if it is wrong.

    Args:
        words: after the mode.
    """
    line = CommandLine("miniseries.py sample", _SAMPLE_DESCRIPTION)
    line.add_settings("sample", SampleArguments, in_files=False)
    asked: SampleArguments = line.build(SampleArguments, line.parse(words))
    if asked.checkpoint is None:  # which no default could be
        line.error("--checkpoint is missing: name a file of a run's checkpoints folder")
    return asked


def _training(program: str, description: str, epilog: str = "") -> CommandLine:
    line = CommandLine(
        program,
        description,
        epilog,
        quick=QUICK,
        rivals=[("steps", "ratio"), ("lineage", "shares")],
    )
    line.add_settings_file()
    line.add_settings("files", Files)
    line.add_settings("series", SeriesConfig, defaults={"steps": None, "ratio": None})
    line.add_settings("machine", Machine)
    return line


def _arguments(line: CommandLine, values: dict[str, Any]) -> Arguments:
    series = dict(values)
    if series["ratio"] is None:
        series["ratio"] = SeriesConfig.ratio
        if series["steps"] is not None and len(series["steps"]) == 1:
            series["steps"] *= len(series["depths"])
    config = line.build(SeriesConfig, series)
    if values["print_config"]:
        print(line.as_file({**series, "ratio": values["ratio"]}), end="")
        line.exit(0)
    return Arguments(
        **{each.name: values[each.name] for each in fields(Files)},
        config=config,
        machine=line.build(Machine, values),
    )
