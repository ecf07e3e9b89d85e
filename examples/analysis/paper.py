r"""Series on paper: sizes, tokens and operations of models before they are trained.

    params         P = 12 L D^2 + 2 V D             scaling params  P_s = 12 L D^2 + V D
    tokens         T = ratio x P or ratio x P_s
    operations     C = T (6 P_s + 12 L D S)         V vocabulary, S sequence length

The doubling series is given by its parameters alone, so its operations are C = 6 P T.

Reference:
    Karpathy, "nanochat", github.com/karpathy/nanochat: the first miniseries is d10 ... d20 with 8
    tokens for each of all parameters, V = 32768 and S = 2048.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

__all__ = ["PlannedModel", "chain_saving", "plan_cost", "plan_depths", "plan_doubling"]

_WIDTH_PER_DEPTH = 64


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


def plan_depths(
    depths: Iterable[int] = range(10, 21),
    *,
    ratio: float = 8.0,
    count: Literal["all", "scaling"] = "all",
    vocab_size: int = 32768,
    sequence_len: int = 2048,
) -> tuple[PlannedModel, ...]:
    """Plan models of width 64 depth; the defaults are nanochat's first miniseries.

    Args:
        depths: L of each model, >= 1.
        ratio: tokens a parameter, > 0.
        count: which parameters the ratio counts.
        vocab_size: V.
        sequence_len: S.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> d10 = plan_depths([10])[0]
        >>> d10.params, f"{d10.flops:.2e}"
        (91095040, '4.21e+17')
    """
    if count not in ("all", "scaling"):
        raise ValueError(f"count must be 'all' or 'scaling', got {count!r}")
    _check_positive(ratio=ratio, vocab_size=vocab_size, sequence_len=sequence_len)
    plan = []
    for depth in depths:
        _check_positive(depth=depth)
        width = _WIDTH_PER_DEPTH * depth
        scaling = 12 * depth * width**2 + vocab_size * width
        params = scaling + vocab_size * width
        tokens = round(ratio * (params if count == "all" else scaling))
        flops = tokens * (6 * scaling + 12 * depth * width * sequence_len)
        plan.append(PlannedModel(f"d{depth}", params, scaling, tokens, flops))
    return tuple(plan)


def plan_doubling(
    first: int = 7_000_000, models: int = 11, *, ratio: float = 20.0
) -> tuple[PlannedModel, ...]:
    """Plan models whose parameters double; the defaults go from 7M to 7.2B.

    Args:
        first: parameters of the smallest model, >= 1.
        models: how many, >= 1.
        ratio: tokens a parameter, > 0.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> [model.name for model in plan_doubling()][::5]
        ['7.0M', '224.0M', '7.2B']
    """
    _check_positive(first=first, models=models, ratio=ratio)
    plan = []
    for k in range(models):
        params = first * 2**k
        tokens = round(ratio * params)
        unit, letter = (1e9, "B") if params >= 1e9 else (1e6, "M")
        name = f"{params / unit:.1f}{letter}"
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
    _check_positive(peak_flops=peak_flops, devices=devices, mfu=mfu)
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


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def chain_saving(
    efficiency: float, plan: Sequence[PlannedModel] | None = None, *, cooldown: float = 0.2
) -> float:
    """Share of the operations that a chain on paper saves, grown from trunk to trunk.

    Every model needs its planned tokens, the last ``cooldown`` share of them in a cooled branch of
    its own. A token that the parent's trunk was planned with replaces ``efficiency`` fresh ones.
    Of a parent that was grown itself not all of these are trained, while `analysis.savings` counts
    the tokens that were, those of all ancestors: the two agree for a model with one ancestor.

    Args:
        efficiency: e, fresh tokens that one of the parent's is worth, in [0, 1].
        plan: the models, in order; ``None`` for the d10 ... d20 of `plan_depths`.
        cooldown: share of a model's tokens, in [0, 1).

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> [f"{chain_saving(e):.0%}" for e in (0, 0.25, 0.5, 0.75, 1)]
        ['0%', '17%', '34%', '51%', '68%']
    """
    for name, value in (("efficiency", efficiency), ("cooldown", cooldown)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {value}")
    models = plan_depths() if plan is None else plan
    saved = sum(
        model.flops * (1 - cooldown) * efficiency * parent.tokens / model.tokens
        for parent, model in pairwise(models)
    )
    return saved / sum(model.flops for model in models)
