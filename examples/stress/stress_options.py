"""What the stress tests are asked to do, and the runs that this means."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.command_line import CommandLine, Kind, OptionError, choice, integer, option, path
from stress.anchored_loop import ANCHORS, ORDINARY, SHARES, LoopJob
from stress.compared_optimizers import ARMS
from stress.loop_report import TUNING_SEED
from stress.scenarios import SCENARIOS, SIZES, Size
from stress.stress_run import Job

__all__ = ["SENSITIVITY_PAIRS", "Options", "parse_options"]

_QUICK_ARMS = ("adamw", "adamw-clip", "paper", "default")
_TUNING_SEEDS = 5  # of --anchor
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

_EPILOG = f"""\
scenarios: {", ".join(SCENARIOS)}
arms: {", ".join(ARMS)}

Results: tables.md, runs.csv, summary.json, <scenario>.png and runs/ (one JSON file a run).
Interrupt at any time (Ctrl-C) and run the same command again to go on where it stopped."""


def _names(known: Iterable[str]) -> Kind:
    def parse(given: str | tuple[str, ...]) -> tuple[str, ...]:
        names = given if isinstance(given, tuple) else tuple(dict.fromkeys(given.split(",")))
        for name in names:
            if name not in known:
                raise OptionError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Args:
        out: output folder; ``None``: out/narcissus, with --quick out/narcissus-quick, and so on.
        data: any file: its bytes are the tokens, its last tenth is for validation; ``None``: the
            Python files of the standard library, split by file.
        quick: under three minutes: one seed, four scenarios, four arms.
        sensitivity: instead of the arms, the default controller with other settings.
        oscillation: instead of a GPT, logistic regression that alternates beyond the edge; a
            minute.
        anchor: instead of the arms, the feedback loop under penalties towards the model half-way,
            with 0, 1 and 10 % of real text, and the signals that might notice it.
        scenarios: some of those below; ``None``: all.
        arms: some of those below; ``None``: all in the stresses, the main ones in ordinary and
            reversal.
        seeds: number of seeds; ``None``: 10, with --quick 1, with --sensitivity 2.
        first_seed: the first of them.
        size: of model and run: tiny, small, medium, large, or gpu, which needs a CUDA device.
        workers: processes, one thread each.
    """

    out: Path | None = option(None, path)
    data: Path | None = option(None, path)
    quick: bool = False
    sensitivity: bool = False
    oscillation: bool = False
    anchor: bool = False
    scenarios: tuple[str, ...] | None = option(None, _names(SCENARIOS))
    arms: tuple[str, ...] | None = option(None, _names(ARMS))
    seeds: int | None = option(None, integer(1, 1000))
    first_seed: int = option(0, integer(0, 2**31))
    size: str = option("small", choice(*SIZES))
    workers: int = option(1, integer(1, 256))

    @property
    def folder(self) -> Path:
        """Where the results go."""
        modes = [
            mode
            for mode in ("anchor", "quick", "sensitivity", "oscillation")
            if getattr(self, mode)
        ]
        return self.out or Path("-".join(["out/narcissus", *modes]))

    @property
    def seed_range(self) -> range:
        """The seeds themselves."""
        count = self.seeds or (2 if self.sensitivity else 1 if self.quick else 10)
        return range(self.first_seed, self.first_seed + count)

    @property
    def loop_jobs(self) -> tuple[LoopJob, ...]:
        """The runs of --anchor: the reported seeds, then those that limits are taken from."""
        size = SIZES[self.size]
        tuning = range(TUNING_SEED, TUNING_SEED + (1 if self.quick else _TUNING_SEEDS))
        return (
            *(
                LoopJob(anchor, share, seed, size)
                for seed in self.seed_range
                for anchor in ANCHORS
                for share in (*SHARES, *([ORDINARY] if anchor == "none" else []))
            ),
            *(LoopJob("none", ORDINARY, seed, size) for seed in tuning),
        )

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The runs."""
        size = SIZES[self.size]
        if self.sensitivity:
            scenarios = self.scenarios or _SENSITIVITY_SCENARIOS
            return _sensitivity_jobs(scenarios, self.seed_range, size)
        scenarios = self.scenarios or (_QUICK_SCENARIOS if self.quick else tuple(SCENARIOS))
        arms = self.arms or (_QUICK_ARMS if self.quick else ())
        return tuple(
            Job(scenario, arm, rate, seed, size)
            for seed in self.seed_range
            for scenario in scenarios
            for rate in ((1.0,) if self.quick else SCENARIOS[scenario].rates)
            for arm in arms or SCENARIOS[scenario].arms or ARMS
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


def parse_options(words: Sequence[str] | None) -> Options:
    """Read the command line; a mistake ends the program with status 2.

    Args:
        words: after the program's name; ``None`` for those of this process.
    """
    line = CommandLine("narcissus.py", _DESCRIPTION, _EPILOG)
    line.add_settings("settings", Options, in_files=False)
    options: Options = line.build(Options, line.parse(words))
    if options.sensitivity and (options.quick or options.arms):
        line.error("argument --sensitivity: takes neither --quick nor --arms")
    others = (
        options.quick, options.sensitivity, options.arms, options.scenarios, options.data,
        options.anchor,
    )  # fmt: skip
    if options.oscillation and any(others):
        line.error("argument --oscillation: takes --out, --seeds and --first-seed only")
    if options.anchor and any((options.sensitivity, options.arms, options.scenarios)):
        line.error("argument --anchor: takes neither --sensitivity, --arms nor --scenarios")
    if options.anchor and options.seed_range[-1] >= TUNING_SEED:
        line.error(f"argument --anchor: seeds from {TUNING_SEED} on are those of the limits")
    return options
