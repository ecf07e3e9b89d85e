"""The runs of the experiment on what growing saves: which, with what settings, and in which order.

A run is small, so that what is stopped loses little: each twin is one of its own, each chain is
one. Twins and chains of a seed begin with the same weights and read the same text in one order.

The miniature of d10 ... d20 has eleven members whose sizes have the ratios of the real series: 1 to
8 in parameters, by 1.23 on average from one to the next, depth and width grown in turn. Everything
is in fp32: on CPUs without matrix units bfloat16 is slower at these sizes. Models are compiled,
which makes a step 1.1 to 1.5 times as fast (by hand).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from trainer.series_plan import plans_of
from trainer.settings import Machine, SeriesConfig, Size

__all__ = [
    "DESIGNS", "PREDICTION", "SEEDS_TO_REPORT", "STAGES", "Design", "Job", "Stage", "brackets_of",
    "jobs_of",
]  # fmt: skip

Stage = Literal["first-twin", "uniform", "twin", "search", "miniature", "muon", "factor", "point"]
STAGES: tuple[Stage, ...] = get_args(Stage)

SEEDS_TO_REPORT = 3

# Each made before the first run that is reported with it: of the first recipe by the formula in
# `analysis.series_account` and the published fits of L(N, D), of the second by the search
# (docs/series.md).
PREDICTION = {
    "first recipe": {
        "miniature": {"members": 11, "growth_factor": 1.23, "e": 0.885, "saving": 0.68},
        "half": {"members": 6, "growth_factor": 1.27, "e": 0.865, "saving": 0.62},
        "every second of half": {"members": 3, "growth_factor": 1.66, "e": 0.76, "saving": 0.40},
        "one jump of half": {"members": 2, "growth_factor": 3.27, "e": 0.58, "saving": 0.15},
    },
    "second recipe": {
        "miniature": {"members": 11, "saving": 0.65, "largest_deficit": 0.0},
        "half": {"members": 6, "saving": 0.56, "largest_deficit": -0.02},
    },
    "second recipe with Muon": {
        "half": {"members": 6, "saving": 0.56, "largest_deficit": 0.0},
    },
    # After one rate for all members had failed on seeds 2 and 3.
    "second recipe with Muon, falling rates": {
        "half": {"members": 6, "saving": 0.54, "largest_deficit": 0.0},
    },
    # After a look ahead, seed 2, had the eleventh member at its edge with a lineage of 1.5.
    "second recipe, longer lineage": {
        "miniature": {"members": 11, "saving": 0.62, "largest_deficit": 0.0},
    },
    "second recipe, 20 tokens a parameter": {
        "half": {"members": 6, "saving": 0.56, "largest_deficit": 0.0},
    },
    "second recipe, another text": {
        "half": {"members": 6, "saving": 0.56, "largest_deficit": 0.0},
    },
}

_BYTES = 256
_TUNING_SEED = 100
_SEARCH_SEED = 200
# The first recipe: settings by habit, and one share for all members.
_FIRST_SETTINGS: dict[str, Any] = {"batch_size": 4, "lr": 3e-3, "warmup_steps": 20}
_FIRST_COOLDOWN = 0.05  # of its chain; half of the twin's
_FIRST_BRACKETS = {
    "lr": (1.5e-3, 3e-3, 6e-3),
    "batch_size": (2, 4, 8, 16),
    "cooldown": (0.05, 0.1, 0.2),
    "warmup_steps": (5, 20, 100),
    "weight_decay": (0.0, 0.05, 0.2),
}
# Muon's matrix products cost as much for one sequence as for four.
_MUON_SETTINGS: dict[str, Any] = {"batch_size": 4, "muon_lr": 0.01, "muon_adamw_lr": 0.006}
# Of the exponent by which rates fall with a member's parameters, in a chain and between its twins.
_MUON_CHAIN, _MUON_TWINS = 1.0, 0.6
_LOW_MUON_RATES: dict[str, Any] = {"muon_lr": 0.005, "muon_adamw_lr": 0.003}
_UNIFORM_SHARES = (0.29, 0.34, 0.39)
_UNIFORM_SCRATCH_SHARES = (0.39, 0.7, 1.0)
_UNIFORM_SEEDS = (0, 1)
_FEW = 3  # seeds of what is not the main comparison
_LONGER_SHARES = (0.3, 0.5, 0.7, 0.9)  # of chains that grow by more at a time


@dataclass(frozen=True)
class Job:
    """One run of the trainer.

    Args:
        name: of its results, such as ``miniature/seed-0-chain``.
        config: the settings.
        machine: what it is trained with.
    """

    name: str
    config: SeriesConfig
    machine: Machine

    @property
    def title(self) -> str:
        """What the progress bar and messages call it."""
        return self.name


@dataclass(frozen=True)
class Design:
    """A series and what is varied about it.

    Args:
        base: settings of all runs; its depths are the members.
        lineage: of the chains that are reported, as in the settings.
        seeds: of twins and chains with AdamW, which are reported.
        muon_lineage: of the same chains with Muon.
        muon_seeds: of twins and chains with Muon.
        bracket_sizes: at which the twin's settings are bracketed.
        brackets: setting -> values tried, one setting at a time, the others as in ``base``.
        subsets: name -> members of chains with larger steps.
        search: name -> settings of chains that are tried on a seed that is not reported.
        muon_search: the same with Muon; beside them the largest member's twin, at the rates named.
        first_members: how many members these and the uniform chains have.
        first_lineage: of these chains.
    """

    base: SeriesConfig
    lineage: tuple[float, ...]
    seeds: tuple[int, ...]
    muon_lineage: tuple[float, ...]
    muon_seeds: tuple[int, ...]
    bracket_sizes: tuple[Size, ...]
    brackets: dict[str, tuple[float, ...]]
    subsets: dict[str, tuple[Size, ...]]
    search: dict[str, dict[str, Any]]
    muon_search: dict[str, dict[str, Any]]
    first_members: int
    first_lineage: tuple[float, ...]


_MINIATURE: tuple[Size, ...] = (
    "3x48", "4x48", "4x56", "5x56", "5x64", "6x64", "6x72", "7x72", "7x80", "8x80", "8x88",
)  # fmt: skip

_BASE = SeriesConfig(
    arms=("scratch",),
    depths=_MINIATURE,
    head_dim=8,
    ratio=8.0,
    batch_size=1,
    sequence_len=128,
    lr=1.5e-3,
    weight_decay=0.05,
    warmup_steps=100,
    cooldown=0.1,
    scratch_shares=(0.3, 1.0),
    eval_windows=512,
    curve_windows=32,
    curve_points=5,
)

_WHOLE = Design(
    base=_BASE,
    lineage=(1.6, 1.7),
    seeds=(3, 4, 5, 6, 7),
    muon_lineage=(1.6, 1.7),
    muon_seeds=(4, 5, 6),
    bracket_sizes=("3x48", "5x64", "8x88"),
    brackets={
        "lr": (7.5e-4, 1.5e-3, 3e-3),
        "batch_size": (1, 2, 4),
        "cooldown": (0.05, 0.1, 0.2),
        "warmup_steps": (20, 100, 400),
        "weight_decay": (0.0, 0.05, 0.2),
    },
    subsets={
        "every-second": _MINIATURE[::2],
        "every-fifth": _MINIATURE[::5],
        "one-jump": _MINIATURE[::10],
    },
    search={
        "as-reported": {},
        "lineage-1.3": {"lineage": (1.2, 1.3)},
        "lineage-1.7": {"lineage": (1.6, 1.7)},
        "short-cooldown": {"cooldown": 0.05},
        "long-cooldown": {"cooldown": 0.15},
        "linear": {"cooldown_shape": "linear"},
        "inserted": {"blocks": "inserted"},
        "at-half": {"grow_at": 0.5},
        "lr-low": {"lr": 7.5e-4},
        "lr-high": {"lr": 3e-3},
        "batch-2": {"batch_size": 2},
        "no-decay": {"weight_decay": 0.0},
        "exponent-0.3": {"rate_exponent": 0.3},
        "exponent-0.6": {"rate_exponent": 0.6},
    },
    muon_search={
        "as-reported": {},
        "lr-low": _LOW_MUON_RATES,
        "exponent-0.6": {"rate_exponent": 0.6},
        "exponent-1": {"rate_exponent": 1.0},
    },
    first_members=6,
    first_lineage=(1.4, 1.5),
)

_HALF = replace(
    _WHOLE,
    base=replace(_BASE, depths=_MINIATURE[:6]),
    lineage=(1.4, 1.5),
    seeds=(2, 3, 4, 5, 6),
    muon_lineage=(1.5, 1.7),
    bracket_sizes=("3x48", "4x56", "6x64"),
    subsets={"every-second": _MINIATURE[:6:2], "one-jump": _MINIATURE[:6:5]},
)

DESIGNS = {
    "miniature": _WHOLE,
    "half": _HALF,  # an eighth of the operations
    # Its rate was tuned at 8 tokens a parameter.
    "half-at-20-tokens": replace(
        _HALF, base=replace(_HALF.base, ratio=20.0), seeds=(3, 4, 5), muon_seeds=()
    ),
    "quick": Design(
        base=replace(
            _BASE,
            depths=("1x16", "2x16", "2x24"),
            ratio=4.0,
            sequence_len=32,
            eval_windows=16,
            curve_windows=8,
        ),
        lineage=(1.3, 1.5),
        seeds=(2,),
        muon_lineage=(1.3, 1.5),
        muon_seeds=(2,),
        bracket_sizes=("1x16",),
        brackets={"lr": (7.5e-4, 1.5e-3)},
        subsets={"one-jump": ("1x16", "2x24")},
        search={"inserted": {"blocks": "inserted"}},
        muon_search={"lr-low": _LOW_MUON_RATES},
        first_members=2,
        first_lineage=(1.3, 1.5),
    ),
}  # fmt: skip


def brackets_of(stage: Stage, design: Design) -> dict[str, tuple[float, ...]]:
    """The values of each setting that are tried on a model from scratch.

    Args:
        stage: twin or first-twin.
        design: of the experiment.
    """
    return _FIRST_BRACKETS if stage == "first-twin" else design.brackets


def jobs_of(stage: Stage, design: Design) -> tuple[Job, ...]:
    """The runs of a stage, in the order they begin.

    Args:
        stage: twin: each setting of a model from scratch around the others, at the smallest, a
            middle and the largest size, on a seed that is not reported. first-twin, uniform: the
            same, and chains, of the first recipe. search: changes to the chain, on a seed that is
            not reported. miniature: all twins and the chain, with AdamW. muon: the same with Muon.
            factor: chains of fewer members, which grow by more, out of a first one that is its own
            twin. point: growing at a half of the parent's trunk.
        design: of the experiment.

    Example:
        >>> [job.name for job in jobs_of("factor", DESIGNS["quick"])]
        ['factor/one-jump-of-3-seed-2']
    """
    base, of, jobs = design.base, f"of-{len(design.base.depths)}", []
    if stage in ("first-twin", "uniform"):
        base = replace(base, **_FIRST_SETTINGS)
    elif stage == "muon":
        base = replace(base, **_MUON_SETTINGS)
    first = base.depths[: design.first_members]

    def add(name: str, **changes: Any) -> None:
        jobs.append(
            Job(f"{stage}/{name}", replace(base, **changes), Machine(threads=1, compile=True))
        )

    def add_grown(name: str, seed: int, **changes: Any) -> None:
        chain = {"arms": ("grown",), "scratch_shares": (1.0,), "seed": seed}
        add(f"{name}-seed-{seed}", **{**chain, **changes})

    def add_twins(seed: int, sizes: Sequence[Size], **changes: Any) -> None:
        for size in reversed(sizes):  # the longest first, for two at a time
            add(f"twin-{size}-seed-{seed}", **{"depths": (size,), "seed": seed, **changes})

    if stage in ("first-twin", "twin"):
        for size in design.bracket_sizes:
            alone = {"depths": (size,), "seed": _TUNING_SEED, "scratch_shares": (1.0,)}
            add(f"{size}-as-reported", **alone)
            for setting, values in brackets_of(stage, design).items():
                for value in values:
                    if value != getattr(base, setting):
                        add(f"{size}-{setting}-{value:g}", **{**alone, setting: value})
    elif stage == "uniform":
        for seed in _UNIFORM_SEEDS:  # the chain's first member is its own twin
            shares = {"scratch_shares": _UNIFORM_SCRATCH_SHARES}
            add_grown("chain", seed, depths=first, cooldown=_FIRST_COOLDOWN,
                      lineage=None, shares=_UNIFORM_SHARES, **shares)  # fmt: skip
            add_twins(seed, first[1:], **shares)
    elif stage == "miniature":
        for seed in design.seeds:
            add_grown(f"chain-{of}", seed, lineage=design.lineage)
            add_twins(seed, base.depths)
    elif stage == "muon":
        scratch: dict[str, Any] = {"arms": ("scratch+muon",)}
        found = _rates_of(replace(base, rate_exponent=_MUON_TWINS, **scratch))
        for seed in design.muon_seeds:
            add_grown(f"chain-{of}", seed, arms=("grown+muon",), lineage=design.muon_lineage,
                      rate_exponent=_MUON_CHAIN)  # fmt: skip
            for size in reversed(base.depths):
                add_twins(seed, (size,), **scratch, **found[size])
    elif stage == "factor":
        for seed in design.seeds[:_FEW]:
            for name, members in design.subsets.items():
                add_grown(f"{name}-{of}", seed, depths=members, lineage=None, shares=_LONGER_SHARES)
    elif stage == "point":
        for seed in design.seeds[:_FEW]:
            add_grown(f"at-half-{of}", seed, lineage=design.lineage, grow_at=0.5)
    else:
        add_twins(_SEARCH_SEED, first, scratch_shares=(1.0,))
        for name, changes in design.search.items():
            chain = {"lineage": design.first_lineage, "depths": first, **changes}
            add_grown(f"chain-{name}", _SEARCH_SEED, **chain)
        for name, changes in design.muon_search.items():
            chain = {"lineage": design.first_lineage, "depths": first, **_MUON_SETTINGS, **changes}
            add_grown(f"muon-chain-{name}", _SEARCH_SEED, arms=("grown+muon",), **chain)
        alone = {"depths": first[-1:], "seed": _SEARCH_SEED, "scratch_shares": (1.0,)}
        for suffix, rates in (("", {}), ("-low", _LOW_MUON_RATES)):
            twin = {**alone, "arms": ("scratch+muon",), **_MUON_SETTINGS, **rates}
            add(f"muon-twin-{first[-1]}{suffix}-seed-{_SEARCH_SEED}", **twin)
    return tuple(jobs)


def _rates_of(config: SeriesConfig) -> dict[Size, dict[str, Any]]:
    """What Muon and the AdamW beside it are set to at each size, by the trainer's own rule."""
    found = [plan.settings for plan in plans_of(config, _BYTES)]
    names = ("muon_lr", "muon_adamw_lr")
    rates = [{name: float(f"{getattr(each, name):.3g}") for name in names} for each in found]
    return dict(zip(config.depths, rates, strict=True))
