"""What a series would cost: operations of every model, and hours and money on given devices."""

from collections.abc import Callable, Sequence
from typing import Any

from analysis.paper import PlannedModel, plan_cost, plan_depths, plan_doubling
from trainer.cli import PlanArguments
from trainer.plan import ModelPlan
from trainer.planning import (
    aligned,
    checked_plans,
    models_table,
    settings_table,
    vocabulary_of,
)  # fmt: skip
from trainer.state import shape_of

__all__ = ["describe_plan"]

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
    models = [_as_planned(plan, vocab_size, length) for plan in plans]
    return (
        f"{vocab_size} tokens, sequences of {length}, {config.precision}.\n\n"
        f"{settings_table(plans, vocab_size, length)}\n"
        f"{models_table(plans, length, *_cost_cells(models, asked))}{_total(models, asked)}"
    )


def _as_planned(plan: ModelPlan, vocab_size: int, sequence_len: int) -> PlannedModel:
    shape = shape_of(plan.depth, vocab_size, sequence_len)
    tokens = plan.steps * plan.settings.batch_size * sequence_len
    own = plan.flops + plan.fisher_flops + plan.growth_flops
    return PlannedModel(plan.name, shape.params, shape.scaling_params, tokens, own)


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


def _total(models: Sequence[PlannedModel], asked: PlanArguments) -> str:
    line = f"\nAll of it: {sum(model.flops for model in models):.2e} FLOPs"
    costs = _costs(models, asked)
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
