"""The methods that are compared: what each keeps of the tasks it has learned, mostly as a penalty.

A memory is made from a strength. It is called with the model and its training batches once a task
has been learned, and returns the penalty to learn the next one under.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ars.regularizers import (
    EWC,
    ActivationCovariance,
    DiagonalFisher,
    KroneckerFisher,
    KroneckerPenalty,
    SubspacePenalty,
)

__all__ = ["JOINT", "METHODS", "REPLAY", "Memory", "Method"]

JOINT, REPLAY = "joint", "replay"

Batches: TypeAlias = list[tuple[Tensor, Tensor]]
Memory: TypeAlias = Callable[[nn.Module, Batches], Any]

_ENERGY = 0.99  # of the activations' second moment, inside the subspace
_WEIGHT_ENERGY = 0.9  # of a weight's squared singular values


def _ewc(
    strength: float,
    *,
    mode: Literal["coupled", "proximal"] = "coupled",
    storage: Literal["full", "compact"] = "full",
    online: bool = False,
) -> Memory:
    penalty: EWC | None = None

    def learned(model: nn.Module, batches: Batches) -> EWC:
        nonlocal penalty
        fisher = DiagonalFisher(model, "exact").fit(batches)
        if penalty is None:
            penalty = EWC(model, fisher, strength, mode, storage=storage)
        elif online:
            penalty.consolidate(fisher)
        else:
            penalty.add_task(fisher)
        return penalty

    return learned


def _kronecker(strength: float, *, labels: bool) -> Memory:
    penalty: KroneckerPenalty | None = None

    def learned(model: nn.Module, batches: Batches) -> KroneckerPenalty:
        nonlocal penalty
        factors: KroneckerFisher | ActivationCovariance
        if labels:
            factors = KroneckerFisher(model, "exact").fit(batches)
        else:
            factors = ActivationCovariance(model).fit(batches)
        if penalty is None:
            penalty = KroneckerPenalty(model, factors, strength)
        else:
            penalty.consolidate(factors)
        return penalty

    return learned


def _input_subspace(strength: float, *, protect: Literal["inside", "outside"]) -> Memory:
    total: dict[str, Tensor] = {}

    def learned(model: nn.Module, batches: Batches) -> SubspacePenalty:
        for name, moment in ActivationCovariance(model).fit(batches).covariance.items():
            total[name] = total.get(name, torch.zeros_like(moment)) + moment
        alive = {name: moment for name, moment in total.items() if _spans_a_subspace(moment)}
        return SubspacePenalty.from_activations(
            model, alive, strength, energy=_ENERGY, protect=protect
        )

    return learned


def _spans_a_subspace(moment: Tensor) -> bool:
    """Whether a too strong penalty has neither silenced nor exploded what the moment is of."""
    if not moment.isfinite().all():
        return False
    return 0 < float(torch.linalg.eigvalsh(moment).clamp(min=0).sum()) < math.inf


def _output_subspace(strength: float) -> Memory:
    def learned(model: nn.Module, batches: Batches) -> SubspacePenalty:
        return SubspacePenalty.from_weights(
            model, strength, energy=_WEIGHT_ENERGY, side="output", protect="inside"
        )

    return learned


@dataclass(frozen=True)
class Method:
    """One way not to forget.

    Args:
        label: what the figures call it.
        memory: makes its memory from the strength of the penalty; ``None`` for no penalty.
        strength: of the penalty; of replay the images of each task that are kept; 0 where there is
            neither.
        grid: strengths that ``--sweep`` tries; empty where there is no penalty, and where the
            strength is that of another method on purpose.
    """

    label: str
    memory: Callable[[float], Memory] | None = None
    strength: float = 0.0
    grid: tuple[float, ...] = ()


METHODS = {
    "none": Method("nothing"),
    "ewc": Method("EWC", _ewc, 100.0, (10.0, 30.0, 100.0, 300.0, 1000.0)),
    "ewc-proximal": Method("EWC, proximal", partial(_ewc, mode="proximal"), 100.0),
    "ewc-online": Method("EWC, online", partial(_ewc, online=True), 100.0),
    "ewc-compact": Method("EWC, 3.06 bytes a parameter", partial(_ewc, storage="compact"), 100.0),
    "kfac": Method("KFAC", partial(_kronecker, labels=True), 30.0, (3.0, 10.0, 30.0, 100.0)),
    "activations": Method(
        "activation covariance", partial(_kronecker, labels=False), 0.3, (0.1, 0.3, 1.0)
    ),
    "subspace": Method(
        "inside the input subspace",
        partial(_input_subspace, protect="inside"),
        5.0,
        (0.5, 1.5, 5.0),
    ),
    "subspace-outside": Method(
        "outside the input subspace", partial(_input_subspace, protect="outside"), 0.05
    ),
    "subspace-output": Method("inside the output subspace", _output_subspace, 0.05),
    REPLAY: Method("replay of 50 images a task", strength=50.0),
    JOINT: Method("all tasks at once"),
}
