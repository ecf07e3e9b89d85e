"""What each method keeps of the tasks it has learned, as a penalty for the optimizer.

A memory is made from a strength. It is called with the model and its training batches once a task
has been learned, and returns the penalty to learn the next one under.
"""

from collections.abc import Callable
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

__all__ = ["MEMORIES", "Memory"]

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
        return SubspacePenalty.from_activations(
            model, total, strength, energy=_ENERGY, protect=protect
        )

    return learned


def _output_subspace(strength: float) -> Memory:
    def learned(model: nn.Module, batches: Batches) -> SubspacePenalty:
        return SubspacePenalty.from_weights(
            model, strength, energy=_WEIGHT_ENERGY, side="output", protect="inside"
        )

    return learned


MEMORIES: dict[str, Callable[[float], Memory]] = {
    "ewc": _ewc,
    "ewc-proximal": partial(_ewc, mode="proximal"),
    "ewc-online": partial(_ewc, online=True),
    "ewc-compact": partial(_ewc, storage="compact"),
    "kfac": partial(_kronecker, labels=True),
    "activations": partial(_kronecker, labels=False),
    "subspace": partial(_input_subspace, protect="inside"),
    "subspace-outside": partial(_input_subspace, protect="outside"),
    "subspace-output": _output_subspace,
}
