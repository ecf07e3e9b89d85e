"""What the comparison with peers is asked to do, and the runs that this means."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from common.command_line import CommandLine, Kind, OptionError, choice, integer, items, option, path
from common.errors import UsageError, understanding
from common.plain_files import read_json
from stress.compared_optimizers import Step, arm_named
from stress.faults import FAULTS
from stress.networks import NETWORKS
from stress.scenarios import SIZES
from stress.stress_run import Job

__all__ = [
    "COLUMNS", "GRIDS", "OURS", "ROWS", "ROWS_OF", "Options", "Tuned", "control_of",
    "parse_options", "read_tuned",
]  # fmt: skip

Changes = tuple[tuple[str, Any], ...]
Tuned = Mapping[str, Mapping[str, Changes]]  # network -> arm -> settings

OURS = ("default", "default-max-norm", "default-400")
COLUMNS = (
    "adamw", "adamw-clip", "zclip", "adagc", "spam", "stableadamw", "skip", "low-beta2", *OURS,
)  # fmt: skip
# The rate x 100 is an older scenario of the same kind.
ROWS = (
    "ordinary",
    *(name for name in FAULTS if name.split("-")[0] in ("random", "repeated", "swapped")),
    "rate-3", "rate-10", "edge", "no-warmup", "bf16", "plain-attention", "entropy", "short",
    "lost-moments", "noisy",
)  # fmt: skip
# A network without attention has no QK-norm; the rest is left out because it takes long.
_OTHERS = (
    "ordinary", "random-1", "random-5", "random-50", "rate-3", "rate-10", "edge", "no-warmup",
    "lost-moments", "noisy",
)  # fmt: skip
ROWS_OF = {"gpt": ROWS, "lstm": _OTHERS, "conv": _OTHERS}

# One or two numbers an arm; of equal scores the first counts. Ours are not tuned here: they were,
# on the same seeds, with the scenarios of narcissus.py; the norm of the clipped one is the peer's.
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "adamw-clip": {"clip": (1.0, 0.1, 0.3, 3.0)},
    "zclip": {"threshold": (2.5, 2.0), "alpha": (0.97, 0.9)},
    "adagc": {"relative": (1.05, 1.5), "beta": (0.98, 0.9)},
    "spam": {"theta": (5000.0, 20.0), "interval": (80, 40)},
    "stableadamw": {"beta2": (0.95, 0.9, 0.98)},
    "skip": {"sigmas": (6.0, 3.0), "window": (50, 20)},
    "low-beta2": {"beta2": (0.8, 0.9, 0.5)},
}
_SHARED_CLIP = {"default-max-norm": "adamw-clip"}
_TUNED_ON = ("ordinary", "random-5", "rate-10")
_TUNING_SEEDS = (100, 8)  # the first, and how many: none of them is reported
_QUICK_ROWS = ("ordinary", "random-5", "rate-10", "lost-moments")
_QUICK_OTHERS = ("ordinary", "rate-10")
_QUICK_ARMS = ("adamw", "zclip", "spam", "skip", "default", "default-max-norm")

_DESCRIPTION = """\
Train a small byte-level GPT, an LSTM and a convolutional network through faults that happen
(corrupted data, wrong rates, bfloat16, lost states), by the package's default and by what others
use against spikes. Prints a table a network: how much each fault costs each of them."""

_EPILOG = f"""\
networks: {", ".join(NETWORKS)}
scenarios: {", ".join(ROWS)}
arms: {", ".join(COLUMNS)}

Results: tables.md, steady.png, steady.json, runs.csv, times-*.json (one a network) and runs/ (one
JSON file a run); with --tune tuning.json and runs/. Interrupt at any time (Ctrl-C) and run the same
command again to go on where it stopped. Exit status: 0 done; 2 the command line, a file or the
output folder is wrong; 130 or 143 interrupted."""


def _names(known: Iterable[str]) -> Kind:
    known = tuple(known)

    def parse(given: Any) -> tuple[str, ...]:
        names = given if isinstance(given, tuple) else tuple(dict.fromkeys(items(given)))
        for name in names:
            if name not in known:
                raise OptionError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse


def control_of(scenario: str) -> str:
    """The scenario of the undisturbed run that one is held against.

    Args:
        scenario: of `ROWS`.

    Example:
        >>> control_of("edge"), control_of("entropy")
        ('ordinary', 'plain-attention')
    """
    return FAULTS[scenario].control if scenario in FAULTS else "ordinary"


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Args:
        out: output folder; ``None``: out/steady, with --quick out/steady-quick, with --tune
            out/steady-tune.
        data: any file: its bytes are the tokens, its last tenth is for validation; ``None``: the
            Python files of the standard library, split by file.
        quick: under a minute: the smallest size, one seed, six arms, four scenarios of the GPT and
            two of the other networks.
        tune: instead of the comparison, each peer with the settings of its grid, on ordinary
            training and two faults; writes what is best to tuning.json.
        tuned: a tuning.json whose settings the arms take; ``None``: those of the papers.
        networks: some of those below; ``None``: all.
        scenarios: some of those below, and the undisturbed ones they need; ``None``: all that the
            network is run through.
        arms: some of those below, and AdamW; ``None``: all, with --tune those that have a grid.
        seeds: number of seeds; ``None``: 10, with --quick 1, with --tune 8.
        first_seed: the first of them; ``None``: 0, with --tune 100.
        size: of model and run: tiny, small, medium, large, or gpu, which needs a CUDA device;
            ``None``: small, with --quick tiny.
        workers: processes, one thread each.
    """

    out: Path | None = option(None, path)
    data: Path | None = option(None, path)
    quick: bool = False
    tune: bool = False
    tuned: Path | None = option(None, path)
    networks: tuple[str, ...] = option(tuple(NETWORKS), _names(NETWORKS))
    scenarios: tuple[str, ...] | None = option(None, _names(ROWS))
    arms: tuple[str, ...] | None = option(None, _names(COLUMNS))
    seeds: int | None = option(None, integer(1, 1000))
    first_seed: int | None = option(None, integer(0, 2**31))
    size: str | None = option(None, choice(*SIZES))
    workers: int = option(1, integer(1, 256))

    @property
    def folder(self) -> Path:
        """Where the results go."""
        mode = "-tune" if self.tune else "-quick" if self.quick else ""
        return self.out or Path(f"out/steady{mode}")

    @property
    def size_name(self) -> str:
        """Of model and run."""
        return self.size or ("tiny" if self.quick else "small")

    @property
    def seed_range(self) -> range:
        """The seeds themselves."""
        first, count = _TUNING_SEEDS if self.tune else (0, 1 if self.quick else 10)
        first = first if self.first_seed is None else self.first_seed
        return range(first, first + (self.seeds or count))

    @property
    def arm_names(self) -> tuple[str, ...]:
        """Columns of the table, in its order."""
        wanted = self.arms or (_QUICK_ARMS if self.quick else COLUMNS)
        return tuple(name for name in COLUMNS if name in (*wanted, "adamw"))

    def rows(self, network: str) -> tuple[str, ...]:
        """What a network is run through, undisturbed runs among them; nothing if not asked for.

        Args:
            network: of `NETWORKS`.
        """
        quick = _QUICK_ROWS if network == "gpt" else _QUICK_OTHERS
        wanted = self.scenarios or (quick if self.quick else ROWS)
        wanted = tuple(row for row in wanted if row in ROWS_OF[network])
        if network not in self.networks or not wanted:
            return ()
        needed = {"ordinary", *wanted, *map(control_of, wanted)}
        return tuple(row for row in ROWS_OF[network] if row in needed)

    def jobs(self, tuned: Tuned) -> tuple[Job, ...]:
        """The runs of the comparison.

        Args:
            tuned: the settings that arms take.
        """
        size = SIZES[self.size_name]
        return tuple(
            Job(row, arm, 1.0, seed, size, tuned.get(network, {}).get(arm, ()), network)
            for network in NETWORKS
            for seed in self.seed_range
            for row in self.rows(network)
            for arm in self.arm_names
        )

    @property
    def tuning_jobs(self) -> tuple[Job, ...]:
        """The runs of --tune."""
        return tuple(
            Job(row, arm, 1.0, seed, SIZES[self.size_name], changes, network)
            for network in self.networks
            for arm in self.arms or GRIDS
            for changes in _settings(GRIDS[arm])
            for row in _TUNED_ON
            for seed in self.seed_range
        )


def _settings(grid: Mapping[str, tuple[float, ...]]) -> Iterator[Changes]:
    for values in product(*grid.values()):
        yield tuple(zip(grid, values, strict=True))


def read_tuned(file: Path, networks: Iterable[str]) -> dict[str, dict[str, Changes]]:
    """The settings that ``--tune`` has chosen; the clipped default takes the peer's norm.

    Args:
        file: a ``tuning.json``.
        networks: whose settings are needed; it may hold those of others.

    Raises:
        UsageError: it cannot be read, a network or an arm with a grid is missing, or a setting is
            none of its arm's.
    """
    remedy = "give the tuning.json that --tune wrote"
    content = read_json(file, remedy=remedy)
    with understanding(str(file), remedy):
        chosen = {
            str(network): {str(arm): dict(settings) for arm, settings in arms.items()}
            for network, arms in content["chosen"].items()
        }
    missing = [network for network in networks if network not in chosen]
    if missing:
        again = f"run --tune --networks {','.join([*chosen, *missing])} again, or leave it out"
        raise UsageError(f"{file} has no settings for {', '.join(missing)}: {again}")
    return {network: _tuned_arms(file, chosen[network], remedy) for network in networks}


def _tuned_arms(file: Path, chosen: dict[str, dict[str, Any]], remedy: str) -> dict[str, Changes]:
    wrong = sorted(GRIDS.keys() ^ chosen.keys())
    if wrong:
        what = "lacks" if wrong[0] in GRIDS else "knows"
        raise UsageError(f"{file} {what} {', '.join(wrong)}: {remedy}")
    for arm, settings in chosen.items():
        if settings.keys() != GRIDS[arm].keys():
            named = ", ".join(GRIDS[arm])
            raise UsageError(f"{file} does not set {named} of {arm}, and nothing else: {remedy}")
        try:
            _check(arm, settings)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{file}, {arm}: {error}: {remedy}") from None
    chosen |= {ours: chosen[peer] for ours, peer in _SHARED_CLIP.items()}
    return {arm: tuple(settings.items()) for arm, settings in chosen.items()}


def _check(arm: str, settings: Mapping[str, Any]) -> None:
    from torch import nn

    for value in settings.values():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{value!r} is not a number")
    if (clip := arm_named(arm, settings).clip) is not None and clip <= 0:
        raise ValueError(f"clip must be above 0, got {clip}")
    Step(arm, nn.Linear(1, 1), 1.0, settings)


def parse_options(words: Sequence[str] | None) -> Options:
    """Read the command line; a mistake ends the program with status 2.

    Args:
        words: after the program's name; ``None`` for those of this process.
    """
    line = CommandLine("steady.py", _DESCRIPTION, _EPILOG)
    line.add_settings("settings", Options, in_files=False)
    options: Options = line.build(Options, line.parse(words))
    if options.tune and (options.quick or options.tuned or options.scenarios):
        line.error("argument --tune: takes neither --quick, --tuned nor --scenarios")
    for row in options.scenarios or ():
        if not any(row in ROWS_OF[network] for network in options.networks):
            named = ", ".join(options.networks)
            line.error(f"argument --scenarios: {row} is not run with {named}: add gpt to them")
    untuned = [arm for arm in options.arms or () if arm not in GRIDS]
    if options.tune and untuned:
        line.error(f"argument --arms: --tune has no grid for {untuned[0]}; name {', '.join(GRIDS)}")
    return options
