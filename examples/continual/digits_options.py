"""What the digits' program is asked to do, and the runs that this means."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.command_line import CommandLine, OptionError, integer, items, number, option, path
from continual.digit_tasks import CLASSES, Run, Settings
from continual.memory_methods import METHODS, REPLAY

__all__ = ["Options", "parse_options"]

_SWEEP_SEED = 100  # the seeds of --sweep start here, so that none is used for both
_FACTORS = (0.01, 1.0, 100.0)  # of the chosen strengths, tried with --by-class
_MOST_KEPT = 1000  # images of a task

_DESCRIPTION = """\
Learn the 8 x 8 digits that come with scikit-learn again and again, each time with their pixels in
another fixed random order, or a few classes after the other, and measure what is left of the
earlier tasks. One network of 64-256-256-10 units with one head learns them all, by ARSAdamW under
the penalty of each method; all methods see the same data in the same order."""

_EPILOG = f"""\
methods: {", ".join(METHODS)}

Results: results.json (the accuracy on every task after every task), table.md and figures in the
output folder. Interrupt at any time (Ctrl-C) and run the same command again to go on: runs that are
done are kept. Exit status: 0 done; 2 the command line or the output folder is wrong; 130 or 143
interrupted."""

Chosen = tuple[tuple[str, float | None], ...]  # methods, each with its strength if it is given


def _tasks(given: Any) -> tuple[int, ...]:
    return tuple(dict.fromkeys(map(integer(2, 100), items(given))))


def _methods(given: Any) -> Chosen:
    return given if isinstance(given, tuple) else tuple(dict.fromkeys(map(_method, items(given))))


def _method(word: str) -> tuple[str, float | None]:
    name, equals, strength = word.partition("=")
    if name not in METHODS:
        raise OptionError(f"{name!r} is not a method: choose among {', '.join(METHODS)}")
    if not equals:
        return name, None
    if METHODS[name].strength == 0:
        raise OptionError(f"{name!r} has no strength: leave out ={strength}")
    kind = integer(1, _MOST_KEPT) if name == REPLAY else number(0, 1e30)
    try:
        return name, float(kind(strength))
    except OptionError as error:
        raise OptionError(f"{name}: {error}") from None


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Args:
        out: output folder; ``None``: out/digits, with --quick out/digits-quick, with --sweep either
            of them and -sweep.
        methods: which of those below, each with the strength of its penalty if it is to be another
            than the chosen one, as in ewc=1e12,kfac, or with the images of each task that replay
            keeps; ``None``: all.
        tasks: tasks a sequence, each number from 2 to 100; ``None``: 5,10, with --quick 3, with
            --by-class or --sweep 5.
        by_class: divide the ten classes evenly among 2, 5 or 10 tasks, in place of permutations;
            penalties are tried at 0.01 and 100 times the strength chosen for those, too.
        seeds: repetitions: seeds 0 to N - 1 give the tasks, the weights and the order of the
            images, with --sweep 100 to 99 + N; ``None``: 5, with --by-class 10, with --quick or
            --sweep 2.
        epochs: passes over the images of each task; ``None``: 20, with --quick 2.
        quick: the whole path in well under a minute, by smaller defaults.
        sweep: try a grid of strengths for the methods that have one, on other seeds, and measure on
            images held out of the training set, never on the test images: how they were chosen.
        threads: of the CPU; the network is too small for more than one.
    """

    out: Path | None = option(None, path)
    methods: Chosen | None = option(None, _methods)
    tasks: tuple[int, ...] | None = option(None, _tasks)
    by_class: bool = False
    seeds: int | None = option(None, integer(1, 100))
    epochs: int | None = option(None, integer(1, 1000))
    quick: bool = False
    sweep: bool = False
    threads: int = option(1, integer(1, 1024))

    @property
    def folder(self) -> Path:
        """Where the results go."""
        modes = "-by-class" * self.by_class + "-quick" * self.quick + "-sweep" * self.sweep
        return self.out or Path("out/digits" + modes)

    @property
    def settings(self) -> Settings:
        """Those of all runs."""
        epochs = self.epochs or (2 if self.quick else 20)
        return Settings(epochs, by_class=self.by_class, validation=self.sweep)

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs, in the order of doing."""
        chosen = self.methods or tuple((name, None) for name in METHODS)
        if self.sweep:
            chosen = tuple((name, value) for name, _ in chosen for value in METHODS[name].grid)
        elif self.by_class and not self.quick:
            chosen = tuple(each for pair in chosen for each in _at_other_strengths(*pair))
        tasks = self.tasks or self._usual_tasks
        few = 10 if self.by_class else 5
        seeds = self.seeds or (2 if self.quick or self.sweep else few)
        first = _SWEEP_SEED if self.sweep else 0
        runs = (
            Run(name, METHODS[name].strength if strength is None else strength, k, seed)
            for k in tasks
            for name, strength in chosen
            for seed in range(first, first + seeds)
        )
        return tuple(dict.fromkeys(runs))  # a strength may be given beside the same default

    @property
    def _usual_tasks(self) -> tuple[int, ...]:
        if self.by_class or self.sweep:
            return (5,)
        return (3,) if self.quick else (5, 10)


def _at_other_strengths(name: str, strength: float | None) -> Chosen:
    """A method whose strength was chosen for permutations, at others too unless one is given."""
    if strength is not None or not METHODS[name].grid:
        return ((name, strength),)
    return tuple((name, factor * METHODS[name].strength) for factor in _FACTORS)


def parse_options(words: Sequence[str] | None) -> Options:
    """Read the command line; a mistake ends the program with status 2.

    Args:
        words: after the program's name; ``None`` for those of this process.
    """
    line = CommandLine("continual_digits.py", _DESCRIPTION, _EPILOG)
    line.add_settings("settings", Options, in_files=False)
    options: Options = line.build(Options, line.parse(words))
    if options.sweep and any(strength is not None for _, strength in options.methods or ()):
        line.error("argument --sweep: leave out the strengths of --methods")
    if options.by_class and any(CLASSES % run.tasks for run in options.runs):
        line.error("argument --tasks: --by-class divides ten classes evenly: choose 2, 5 or 10")
    if not options.runs:
        swept = ", ".join(name for name, method in METHODS.items() if method.grid)
        line.error(f"argument --sweep: choose --methods among {swept}")
    return options
