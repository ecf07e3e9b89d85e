r"""A series before it is trained: sizes, tokens and operations of its models, hours and money.

    params         P = 12 L D^2 + 2 V D             scaling params  P_s = 12 L D^2 + V D
    tokens         T = ratio x P
    operations     C = T (6 P_s + 12 L D S)         V vocabulary, S sequence length

These are the trainer's own models. The doubling series is given by its parameters alone, so its
operations are C = 6 P T.

Reference:
    Karpathy, "nanochat", github.com/karpathy/nanochat: the first miniseries is d10 ... d20 with 8
    tokens for each of all parameters, V = 32768 and S = 2048.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.series_account import formula_saving
from common.tables import aligned
from corpus.tokenizer import vocabulary_of
from trainer.arguments import PlanArguments
from trainer.arms import Arm
from trainer.series_plan import ModelPlan, checked_plans, shape_of
from trainer.series_report import models_table, settings_table

__all__ = [
    "PlannedModel", "chain_saving", "describe_plan", "plan_cost", "plan_depths", "plan_doubling",
]  # fmt: skip

_WIDTH_PER_DEPTH = 64
_VOCABULARY = 32768
_SEQUENCE_LEN = 2048
_DEPTHS_RATIO = 8  # tokens a parameter
_DOUBLING_RATIO = 20


@dataclass(frozen=True)
class PlannedModel:
    """One model of a plan.

    Args:
        name: such as "d10" or "7.0M".
        params: number of all parameters.
        scaling_params: in matrix products, all but the embedding table.
        tokens: to train on.
        flops: to train with.
    """

    name: str
    params: int
    scaling_params: int
    tokens: int
    flops: int


def plan_depths(depths: Iterable[int] = range(10, 21)) -> tuple[PlannedModel, ...]:
    """Models of width 64 depth as nanochat's first miniseries has them.

    Args:
        depths: L of each model, >= 1.

    Example:
        >>> d10 = plan_depths([10])[0]
        >>> d10.params, f"{d10.flops:.2e}"
        (91095040, '4.21e+17')
    """
    plan = []
    for depth in depths:
        width = _WIDTH_PER_DEPTH * depth
        scaling = 12 * depth * width**2 + _VOCABULARY * width
        params = scaling + _VOCABULARY * width
        tokens = _DEPTHS_RATIO * params
        flops = tokens * (6 * scaling + 12 * depth * width * _SEQUENCE_LEN)
        plan.append(PlannedModel(f"d{depth}", params, scaling, tokens, flops))
    return tuple(plan)


def plan_doubling() -> tuple[PlannedModel, ...]:
    """Eleven models whose parameters double.

    Example:
        >>> [model.name for model in plan_doubling()][::5]
        ['7.0M', '224.0M', '7.2B']
    """
    plan = []
    for k in range(11):
        params = 7_000_000 * 2**k
        tokens = _DOUBLING_RATIO * params
        name = f"{params / 1e9:.1f}B" if params >= 1e9 else f"{params / 1e6:.1f}M"
        plan.append(PlannedModel(name, params, params, tokens, 6 * params * tokens))
    return tuple(plan)


def plan_cost(
    plan: Sequence[PlannedModel],
    *,
    peak_flops: float = 989e12,
    devices: int = 8,
    mfu: float = 0.4,
    price_per_hour: float = 3.0,
) -> dict[str, Any]:
    """Hours and price of a plan at an assumed utilisation, each model and cumulative.

    Args:
        plan: the models, in order.
        peak_flops: operations a second of one device; the default is an H100's.
        devices: working at once.
        mfu: share of the peak that is reached, in (0, 1].
        price_per_hour: of one device.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> cost = plan_cost(plan_depths())
        >>> f"{cost['flops']:.3g} FLOPs, {cost['hours']:.2f} h"
        '4.64e+19 FLOPs, 4.07 h'
    """
    for name, value in (("peak_flops", peak_flops), ("devices", devices), ("mfu", mfu)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    if mfu > 1:
        raise ValueError(f"mfu must be at most 1, got {mfu}")
    rows: list[dict[str, Any]] = []
    total = 0
    for model in plan:
        total += model.flops
        hours, so_far = (f / (peak_flops * devices * mfu) / 3600 for f in (model.flops, total))
        rows.append({
            "name": model.name,
            "params": model.params,
            "tokens": model.tokens,
            "flops": model.flops,
            "hours": hours,
            "price": hours * devices * price_per_hour,
            "cumulative_flops": total,
            "cumulative_hours": so_far,
            "cumulative_price": so_far * devices * price_per_hour,
        })  # fmt: skip
    return {
        "assumed": {
            "peak_flops": peak_flops,
            "devices": devices,
            "mfu": mfu,
            "price_per_hour": price_per_hour,
        },
        "models": rows,
        "flops": total,
        "hours": rows[-1]["cumulative_hours"] if rows else 0.0,
        "price": rows[-1]["cumulative_price"] if rows else 0.0,
    }


def chain_saving(
    efficiency: float, plan: Sequence[PlannedModel] | None = None, *, cooldown: float = 0.1
) -> float:
    """Share of the operations that a chain on paper saves, by `formula_saving`.

    The growth factor is the geometric mean of the plan's, of tokens: these are what is inherited.

    Args:
        efficiency: e, tokens of a child that one of its parent's trunk is worth, in [0, 1].
        plan: the models, in order; ``None`` for the d10 ... d20 of `plan_depths`.
        cooldown: share of a model's tokens, in [0, 1).

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> [f"{chain_saving(e):.0%}" for e in (0, 0.25, 0.5, 0.75, 1)]
        ['0%', '19%', '38%', '57%', '75%']
    """
    if not 0 <= efficiency <= 1:
        raise ValueError(f"efficiency must lie between 0 and 1, got {efficiency}")
    models = plan_depths() if plan is None else plan
    steps = len(models) - 1
    growth = (models[-1].tokens / models[0].tokens) ** (1 / steps) if steps else 1.0
    return formula_saving(efficiency, growth, cooldown, len(models))


_PAPER: dict[str, tuple[Callable[[], tuple[PlannedModel, ...]], str]] = {
    "nanochat": (
        plan_depths,
        "nanochat's first miniseries: 32768 tokens, sequences of 2048, 8 tokens a parameter, every "
        "model from scratch.",
    ),
    "doubling": (
        plan_doubling,
        "Parameters that double: 20 tokens a parameter, C = 6 N D, every model from scratch.",
    ),
}


def describe_plan(asked: PlanArguments) -> str:
    """The plan in words and tables.

    Args:
        asked: what is planned, and what it would be trained on.

    Raises:
        UsageError: the settings make no series.
    """
    if asked.series in _PAPER:
        plan, words = _PAPER[asked.series]
        return f"{words}\n\n{_paper_table(plan(), asked)}{_total(plan(), asked)}"
    config = asked.arguments.config
    vocab_size = vocabulary_of(asked.arguments.tokenizer)
    length = config.sequence_len
    plans = checked_plans(config, asked.arguments.machine, vocab_size)
    models = [_as_planned(plan, length) for plan in plans]
    branches = [branch for plan in plans for branch in plan.branch_plans]
    measured = sum(branch.cooldown * branch.flops_per_step for branch in branches)
    return (
        f"{vocab_size} tokens, sequences of {length}, {config.precision}.\n\n"
        f"{settings_table(plans, length)}\n"
        f"{models_table(plans, length, *_cost_cells(models, asked))}"
        f"{_whole_series(plans)}{_total(models, asked, measured)}"
    )


def _own_flops(plan: ModelPlan) -> int:
    return plan.flops + plan.fisher_flops + plan.growth_flops


def _whole_series(plans: Sequence[ModelPlan]) -> str:
    """What each series that is grown costs, its first model included, beside its twins."""
    found = {(plan.size, plan.arm.name): plan for plan in plans}
    text = ""
    for arm in dict.fromkeys(plan.arm for plan in plans if plan.arm.grown):
        sizes = dict.fromkeys(plan.size for plan in plans)
        twins = [found.get((size, arm.root.name)) for size in sizes]
        chain = sum(map(_own_flops, _members(arm, plans)))
        text += f"\n{arm.name}: {chain:.2e} FLOPs for the whole series"
        if None not in twins:
            scratch = sum(_own_flops(twin) for twin in twins if twin is not None)
            text += f", {chain / scratch:.2f} of its twins', {arm.root.name}"
    return f"{text}\n" if text else ""


def _members(arm: Arm, plans: Sequence[ModelPlan]) -> list[ModelPlan]:
    """The models of an arm, and their ancestors of other arms."""
    names = {plan.name for plan in plans if plan.arm == arm}
    for plan in reversed(plans):  # children come after their parents
        if plan.name in names and plan.parent is not None:
            names.add(plan.parent)
    return [plan for plan in plans if plan.name in names]


def _as_planned(plan: ModelPlan, sequence_len: int) -> PlannedModel:
    shape = shape_of(plan.model)
    tokens = plan.steps * plan.settings.batch_size * sequence_len
    return PlannedModel(plan.name, shape.params, shape.scaling_params, tokens, _own_flops(plan))


def _costs(models: Sequence[PlannedModel], asked: PlanArguments) -> dict[str, Any] | None:
    peak = asked.arguments.machine.peak_flops
    if peak is None:
        return None
    return plan_cost(
        models,
        peak_flops=peak,
        devices=asked.devices,
        mfu=asked.mfu,
        price_per_hour=asked.price or 0.0,
    )


def _cost_cells(
    models: Sequence[PlannedModel], asked: PlanArguments
) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the columns that depend on the devices."""
    costs = _costs(models, asked)
    if costs is None:
        return [], [[] for _ in models]
    header, keys = ["hours", "cumulative"], ["hours", "cumulative_hours"]
    if asked.price is not None:
        header, keys = [*header, "price"], [*keys, "price"]
    return header, [[_plain(row[key]) for key in keys] for row in costs["models"]]


def _paper_table(models: Sequence[PlannedModel], asked: PlanArguments) -> str:
    header, cells = _cost_cells(models, asked)
    rows = [["model", "parameters", "in products", "tokens", "FLOPs", *header]]
    for model, extra in zip(models, cells, strict=True):
        numbers = (model.params, model.scaling_params, model.tokens)
        rows.append([model.name, *(f"{n:,}" for n in numbers), f"{model.flops:.2e}", *extra])
    return aligned(rows)


def _total(models: Sequence[PlannedModel], asked: PlanArguments, measured: int = 0) -> str:
    """All that is trained; ``measured`` are the operations of branches that are no models."""
    everything = [*models, PlannedModel("branches", 0, 0, 0, measured)]
    line = f"\nAll of it: {sum(model.flops for model in everything):.2e} FLOPs"
    if measured:
        line += f", {measured:.2e} of them for cooled branches that are only measured"
    costs = _costs(everything, asked)
    if costs is None:
        return f"{line}; with --peak-flops, hours too.\n"
    peak = asked.arguments.machine.peak_flops
    line += f", {_plain(costs['hours'])} h on {asked.devices} x {peak:.3g} FLOP/s"
    line += f" at {asked.mfu:.0%} MFU"
    if asked.price is not None:
        line += f", {_plain(costs['price'])} at {asked.price:g} a device hour"
    return f"{line}.\n"


def _plain(value: float) -> str:
    """Three digits, without an exponent where one can read it.

    Example:
        >>> _plain(4.0712), _plain(12345.6), _plain(0.00012)
        ('4.07', '12,346', '0.00012')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
