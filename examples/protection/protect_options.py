"""What the protection's program is asked to do, and the runs that this means."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.command_line import (
    CommandLine,
    OptionError,
    integer,
    items,
    number,
    option,
    optional,
    path,
    text,
)
from protection.methods import METHODS, PLAIN
from protection.second_training import BASE, Run, Settings

__all__ = ["Options", "parse_options"]

_DESCRIPTION = """\
Train a small GPT on a first text, then on a second one by each of the methods, and measure the loss
on both: what is learned, and what is kept. All methods of a seed begin with one model and read one
order of the second text."""

_EPILOG = f"""\
methods: {", ".join(METHODS)}

Results: results.json (a record a run), table.md and figures in the output folder. Interrupt at
any time (Ctrl-C) and run the same command again to go on: runs that are done are kept. Exit status:
0 done; 2 the command line, a text or the output folder is wrong; 130 or 143 interrupted."""

_QUICK = Settings(
    layers=1, width=32, sequence_len=32, batch_size=8, first_tokens=2.0, second_tokens=1.0,
    fisher_samples=16, windows=32,
)  # fmt: skip
_QUICK_STRENGTHS = 1


def _methods(given: Any) -> tuple[str, ...]:
    names = given if isinstance(given, tuple) else tuple(dict.fromkeys(items(given)))
    for name in names:
        if name not in METHODS:
            raise OptionError(f"{name!r} is not a method: choose among {', '.join(METHODS)}")
    return names


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Args:
        out: output folder; ``None``: out/protect, with --quick out/protect-quick.
        first: text that is to be kept, as --data of miniseries.py takes it; ``None``: the Python
            files of the standard library.
        second: text that is trained on afterwards; ``None``: the language reference that Python
            carries with it.
        methods: which of those below; ``None``: all.
        seeds: repetitions, seeds 0 to N - 1; ``None``: 5, with --quick 1.
        layers: of the model; ``None``: 3, with --quick 1.
        width: of the model, a multiple of 16; ``None``: 48, with --quick 32.
        first_tokens: of the first training, a parameter in matrix products; ``None``: 8, with
            --quick 2.
        second_tokens: of the second training; ``None``: 2, with --quick 1.
        fisher_samples: sequences of the first text that penalties are fitted on; ``None``: 256,
            with --quick 16.
        quick: the whole path in about a minute, by smaller defaults and one strength a method.
        workers: runs at a time, each on one thread.
    """

    out: Path | None = option(None, optional(path))
    first: str | None = option(None, optional(text))
    second: str | None = option(None, optional(text))
    methods: tuple[str, ...] | None = option(None, optional(_methods))
    seeds: int | None = option(None, optional(integer(1, 100)))
    layers: int | None = option(None, optional(integer(1, 100)))
    width: int | None = option(None, optional(integer(16, 4096)))
    first_tokens: float | None = option(None, optional(number(0, 1000, above=True)))
    second_tokens: float | None = option(None, optional(number(0, 1000, above=True)))
    fisher_samples: int | None = option(None, optional(integer(1, 100_000)))
    quick: bool = False
    workers: int = option(1, integer(1, 256))

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.out or Path("out/protect" + "-quick" * self.quick)

    @property
    def settings(self) -> Settings:
        """Those of all runs."""
        base = _QUICK if self.quick else Settings()
        named = ("layers", "width", "first_tokens", "second_tokens", "fisher_samples")
        chosen = {name: getattr(self, name) for name in named if getattr(self, name) is not None}
        return Settings(**{**base.to_dict(), **chosen})

    @property
    def first_runs(self) -> tuple[Run, ...]:
        """What all other runs of a seed begin with."""
        return tuple(Run(BASE, 0.0, seed) for seed in self._seeds)

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs of the methods, in the order of doing."""
        return tuple(
            Run(name, strength, seed)
            for seed in self._seeds
            for name in self.methods or tuple(METHODS)
            if name != PLAIN  # which the first runs are
            for strength in self._strengths(name)
        )

    @property
    def _seeds(self) -> range:
        return range(self.seeds or (1 if self.quick else 5))

    def _strengths(self, name: str) -> tuple[float, ...]:
        method = METHODS[name]
        if method.kind == "merge":
            return (0.0,)
        return method.grid[:_QUICK_STRENGTHS] if self.quick else method.grid


def parse_options(words: Sequence[str] | None) -> Options:
    """Read the command line; a mistake ends the program with status 2.

    Args:
        words: after the program's name; ``None`` for those of this process.
    """
    line = CommandLine("protect.py", _DESCRIPTION, _EPILOG)
    line.add_settings("settings", Options, in_files=False)
    options: Options = line.build(Options, line.parse(words))
    if options.width is not None and options.width % 16:
        line.error("argument --width: heads have 16 channels, choose a multiple of 16")
    return options
