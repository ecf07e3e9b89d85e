"""The options of a series: their types, what they mean, and the defaults of `SeriesConfig`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ActionYesNo

from trainer import values
from trainer.arguments import integer, number
from trainer.config import SeriesConfig
from trainer.machine import Machine
from trainer.parser import OptionParser
from trainer.peak_flops import PEAK_FLOPS

__all__ = ["QUICK", "add_files", "add_machine", "add_series", "default_steps"]

# What --quick changes; "steps" stands for every depth.
QUICK: dict[str, Any] = {
    "out": Path("out/quick"),
    "depths": (1, 2, 3),
    "steps": (24,),
    "batch_size": 8,
    "sequence_len": 64,
    "fisher_samples": 16,
}
_CONFIG = SeriesConfig()
_STEPS = dict(zip(_CONFIG.depths, _CONFIG.steps or (), strict=True))
_OTHER_STEPS = 240
_SHARE = number(0, 1, above=True)


def default_steps(depths: tuple[int, ...]) -> tuple[int, ...]:
    """Trunk steps of each depth when the user names none.

    Example:
        >>> default_steps((2, 3, 4)), default_steps((4, 5))
        ((450, 240, 240), (240, 240))
    """
    return tuple(_STEPS.get(depth, _OTHER_STEPS) for depth in depths)


@dataclass(frozen=True)
class _Files:
    out: Path = Path("out/demo")
    tokenizer: str = "bytes"


class _Group:
    """Options under a title, whose defaults are the fields of a dataclass."""

    def __init__(self, parser: OptionParser, title: str, defaults: Any) -> None:
        self._group = parser.add_argument_group(title)
        self._defaults = defaults

    def add(
        self,
        name: str,
        convert: Callable[[Any], Any],
        metavar: str,
        meaning: str,
        *,
        shown: str | None = None,
    ) -> None:
        """Add an option.

        Args:
            name: of the option; with underscores, of the field.
            convert: its type.
            metavar: stands for a value.
            meaning: one line for --help.
            shown: its default in words, where the field's value would not say it.
        """
        key = name.replace("-", "_")
        default = getattr(self._defaults, key, None)
        words = _in_words(default) if shown is None else shown
        if key in QUICK and shown is None:
            words += f", with --quick {_in_words(QUICK[key])}"
        self._group.add_argument(
            f"--{name}",
            type=convert,
            default=default if shown is None else None,
            metavar=metavar,
            help=f"{meaning} (default: {words})".replace("%", "%%"),
        )

    def add_switch(self, name: str, meaning: str) -> None:
        """Add ``--name`` and ``--no-name``."""
        default = getattr(self._defaults, name)
        self._group.add_argument(
            f"--{name}",
            action=ActionYesNo(no_prefix="no-"),
            default=default,
            help=f"{meaning} (default: {'on' if default else 'off'})",
        )


def _in_words(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "none" if value is None else str(value)


def add_files(parser: OptionParser) -> None:
    """Add what a series reads and writes."""
    parser.add_settings_file()
    group = _Group(parser, "files", _Files())
    group.add("out", values.path, "DIR", "output folder")
    group.add("data", values.optional(values.text), "SOURCE",
              "text, CSV or parquet file or folder, or hf:NAME",
              shown="the Python files of the standard library")  # fmt: skip
    group.add("column", values.optional(values.text), "NAME", "column of a table that is the text",
              shown="text for hf:NAME; a table's has to be named")  # fmt: skip
    group.add("tokenizer", values.text, "T", "bytes, bpe:N to train one of N tokens, or a file")
    group.add("cache", values.optional(values.path), "DIR", "folder for the text as tokens",
              shown="data/ in the output folder")  # fmt: skip


def add_series(parser: OptionParser) -> None:
    """Add the fields of `SeriesConfig`, and --quick."""
    _add_size(parser)
    parser.set_rivals("steps", "ratio")
    _add_training(parser)
    group = _Group(parser, "inheritance", _CONFIG)
    strength = number(0, 1e12)
    group.add("ewc-strength", strength, "S", "weight of ewc; 0 spares its Fisher pass")
    group.add("subspace-strength", strength, "S", "weight of subspace")
    group.add("distill-strength", strength, "S", "weight of distill")
    group.add("distill-temperature", number(0.01, 1000), "T",
              "softens what distill compares")  # fmt: skip
    group.add("fisher-samples", integer(1, 1_000_000), "N",
              "sequences that the Fisher information is averaged over")  # fmt: skip
    group = _Group(parser, "evaluation", _CONFIG)
    windows = integer(1, 10_000_000)
    group.add("eval-windows", windows, "N", "validation sequences of the reported number at most")
    group.add("curve-windows", windows, "N", "the same for the points of the validation curve")
    group.add("curve-points", integer(1, 100_000), "N", "points of the validation curve")


def _add_size(parser: OptionParser) -> None:
    group = _Group(parser, "size", _CONFIG)
    parser.add_command_switch(
        "--quick",
        "the whole path in under a minute: smaller defaults for the options that name a value "
        "with --quick (default: off)",
    )
    group.add("arms", values.arms, "A[,A...]",
              "ways to train that are compared: scratch or grown, then +muon (scratch); +ewc, "
              "+subspace, +distill (grown); +ars or +paper, the controllers")  # fmt: skip
    group.add("depths", values.depths, "D", "layers of each model, as 2-4 or 2,3,4")
    group.add("parents", values.optional(values.parents), "D",
              "depths that larger ones are grown out of, each out of the largest below it",
              shown="all depths")  # fmt: skip
    some = ",".join(map(str, _STEPS.values()))
    group.add("steps", values.optional(values.steps), "N[,N...]",
              "trunk steps, one number for all depths or one for each; the cooled branch is extra",
              shown=f"{some} for depths {','.join(map(str, _STEPS))}, {_OTHER_STEPS} for others, "
              f"with --quick {QUICK['steps'][0]}")  # fmt: skip
    group.add("ratio", values.optional(number(0, 1000, above=True)), "R",
              "instead of --steps: tokens, trunk and cooled branch, per parameter in matrix "
              "products; about 10 is optimal for a model from scratch",
              shown="not used")  # fmt: skip
    group.add("batch-size", values.rule_or(integer(1, 4096)), "B",
              "sequences a step over all processes, or rule: by the depth")  # fmt: skip
    group.add("sequence-len", integer(8, 8192), "T", "tokens a sequence")


def _add_training(parser: OptionParser) -> None:
    group = _Group(parser, "training", _CONFIG)
    group.add("lr", values.rule_or(_SHARE), "X", "learning rate of the trunk, or rule")
    group.add("muon-lr", values.rule_or(_SHARE), "X", "the same of Muon, or rule")
    group.add("muon-adamw-lr", values.rule_or(_SHARE), "X",
              "the same of the AdamW beside Muon, or rule")  # fmt: skip
    group.add("weight-decay", values.rule_or(number(0, 10)), "X", "decoupled, or rule")
    group.add("betas", values.betas, "B,B", "of Adam")
    group.add("max-grad-norm", number(0, 1e12), "X", "gradients are clipped to it; 0 clips none")
    group.add("warmup-steps", integer(0, 10_000_000), "N", "of models that are not grown")
    group.add("cooldown", _SHARE, "X", "steps of the cooled branch per step of the trunk")
    group.add("precision", values.choice("fp32", "bf16", "fp16"), "P",
              "fp32, bf16 or fp16, of the passes; weights and moments are fp32")  # fmt: skip
    group.add("seed", integer(0, 2**32 - 1), "N", "of weights, batches and Fisher sketch")


def add_machine(parser: OptionParser) -> None:
    """Add the fields of `Machine`."""
    group = _Group(parser, "machine", Machine())
    group.add("device", values.text, "D", "cpu, cuda or cuda:N")
    group.add("threads", values.optional(integer(1, 1024)), "N",
              "CPU threads; numbers repeat bit by bit for one choice",
              shown="torch's choice")  # fmt: skip
    group.add("device-batch-size", values.optional(integer(1, 4096)), "B",
              "sequences a process differentiates at a time; a step's batch is accumulated",
              shown="all at once")  # fmt: skip
    group.add_switch("compile", "compile the models with torch.compile")
    group.add_switch("recompute", "keep only the inputs of blocks and compute them twice: less "
                     "memory, a third more work")  # fmt: skip
    group.add("keep", integer(1, 1000), "N", "states of a model in training that are kept")
    group.add("checkpoint-seconds", number(0, 86400), "X", "between two of these")
    names = ", ".join(PEAK_FLOPS)
    group.add("peak-flops", values.optional(values.peak_flops), "X",
              f"operations a second of one device, for the MFU, or its name: {names}",
              shown="unknown")  # fmt: skip
    group.add_switch("tensorboard", "write event files to tensorboard/ in the output folder")
    group.add("wandb", values.optional(values.text), "PROJECT",
              "report to this project of Weights & Biases", shown="no report")  # fmt: skip
