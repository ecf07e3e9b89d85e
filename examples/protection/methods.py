"""The methods that are compared: how each trains on the second text without losing the first.

Each has one number, its strength, and a grid of it that draws its curve: what is kept against what
is learned.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from ars.regularizers import (
    EWC,
    ActivationCovariance,
    DiagonalFisher,
    KroneckerFisher,
    KroneckerPenalty,
    ProgressiveInheritance,
    SubspacePenalty,
)

__all__ = ["METHODS", "PLAIN", "SAMPLES", "Method", "fisher_of", "merged"]

PLAIN = "plain"

Batches: TypeAlias = list[tuple[Tensor, Tensor]]
Weights: TypeAlias = dict[str, Tensor]
Kind: TypeAlias = Literal["train", "replay", "own samples", "rank", "merge"]

_DAMPING = 0.3  # of the mean importance, added to each
_ENERGY = 0.99  # of the activations' second moment, inside the subspace
_ESTIMATOR: Any = "sketch"  # the expectation over the model's own predictions, unbiased
_FISHER_SEED = 0
_EMBEDDING = "wte.weight"


@dataclass(frozen=True)
class Method:
    """One way to train on the second text.

    Args:
        label: what figures call it.
        needs: what it needs of the first text, in words.
        grid: of its strength, a point of its curve each; ``(0,)`` where there is none.
        kind: what the strength is. train: of the penalty, or a factor of the learning rate; replay:
            the share of the first text's sequences in each batch; own samples: the same, of samples
            that the model drew before; rank: of low-rank additions, which alone are trained; merge:
            the weight of the second model, both being trained.
        penalty: builds the penalty from the model, sequences of the first text and the strength.
        scales_rate: whether the strength is a factor of the learning rate.
        replay: the share of the first text's sequences beside a penalty.
        is_budget: whether the strength is what the first text's loss may rise by, in bits per byte,
            and the penalty's own strength is chosen by `ars.regularizers.LossBudget`.
        rank: of the low-rank additions that alone are trained, under `merged_ewc`; 0 for none.
        samples: sequences of the first text that the penalty is fitted on; ``None`` for those of
            the settings.
    """

    label: str
    needs: str
    grid: tuple[float, ...]
    kind: Kind = "train"
    penalty: Callable[[nn.Module, Batches, float], Any] | None = None
    scales_rate: bool = False
    replay: float = 0.0
    is_budget: bool = False
    rank: int = 0
    samples: int | None = None


def fisher_of(model: nn.Module, batches: Batches) -> DiagonalFisher:
    """The diagonal Fisher information of whole sequences.

    Args:
        model: in evaluation mode or not.
        batches: of the text that it is taken on.
    """
    generator = torch.Generator().manual_seed(_FISHER_SEED)
    return DiagonalFisher(model, _ESTIMATOR, generator=generator).fit(batches)


def _distance(model: nn.Module, batches: Batches, strength: float) -> EWC:
    """Of all weights alike, by the mean importance: strengths then mean the same as EWC's."""
    importance = fisher_of(model, batches).importance
    mean = _mean_of(importance)
    return EWC(model, {n: torch.full_like(each, mean) for n, each in importance.items()}, strength)


def _ewc(model: nn.Module, batches: Batches, strength: float) -> EWC:
    return EWC(model, fisher_of(model, batches), strength)


def _damped(model: nn.Module, batches: Batches, strength: float) -> EWC:
    importance = fisher_of(model, batches).importance
    mean = _mean_of(importance)
    return EWC(model, {n: each + _DAMPING * mean for n, each in importance.items()}, strength)


def _mean_of(importance: Weights) -> float:
    total = sum(float(each.sum(dtype=torch.float64)) for each in importance.values())
    return total / sum(each.numel() for each in importance.values())


def _proximal(model: nn.Module, batches: Batches, strength: float) -> EWC:
    return EWC(model, fisher_of(model, batches), strength, "proximal")


def _kronecker(model: nn.Module, batches: Batches, strength: float) -> ProgressiveInheritance:
    generator = torch.Generator().manual_seed(_FISHER_SEED)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nothing is known of wte")
        factors = KroneckerFisher(model, _ESTIMATOR, generator=generator).fit(batches)
    other = _of_embedding(model, batches, strength)
    return ProgressiveInheritance(other, KroneckerPenalty(model, factors, strength))


def _subspace(model: nn.Module, batches: Batches, strength: float) -> SubspacePenalty:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nothing is known of wte")
        moments = ActivationCovariance(model).fit(batches).covariance
    return SubspacePenalty.from_activations(model, moments, strength, energy=_ENERGY)


def _of_embedding(model: nn.Module, batches: Batches, strength: float) -> EWC:
    """Of what has no Kronecker factors."""
    importance = fisher_of(model, batches).importance
    return EWC(model, {_EMBEDDING: importance[_EMBEDDING]}, strength)


def merged(
    first: Weights, second: Weights, share: float, fishers: tuple[Weights, Weights] | None
) -> Weights:
    r"""Weights between two models, without training.

        theta = ((1 - s) F_1 theta_1 + s F_2 theta_2) / ((1 - s) F_1 + s F_2)

    Args:
        first: theta_1, by name.
        second: theta_2.
        share: s, in [0, 1].
        fishers: F_1 and F_2; ``None`` for 1, which interpolates.

    References:
        Matena and Raffel, "Merging models with Fisher-weighted averaging", arXiv:2111.09832.
    """
    if fishers is None:
        return {name: torch.lerp(value, second[name], share) for name, value in first.items()}
    found = {}
    for name, value in first.items():
        one, two = ((1 - share) * fishers[0][name], share * fishers[1][name])
        whole = one + two
        # Where neither matters, both are as good: their mean.
        mean = torch.lerp(value, second[name], share)
        found[name] = torch.where(whole > 0, (one * value + two * second[name]) / whole, mean)
    return found


_NOTHING, _ITSELF, _SAMPLES = "nothing", "the model itself", "sequences of it, once"
_KEPT = "sequences of it, 32 of them always"
_BUDGETS = (0.05, 0.1, 0.2)
_STRENGTHS = (0.03, 0.3, 3.0, 30.0)
_RANKS = (1.0, 4.0, 16.0)
# Sequences that a penalty is fitted on: what fewer and more than the usual ones are worth.
SAMPLES = (4, 16, 64, 1024)

METHODS = {
    PLAIN: Method("plain", _NOTHING, (0.0,)),
    "rate": Method("lower rate", _NOTHING, (0.3, 0.1, 0.03), scales_rate=True),
    "l2": Method("L2 to the start", _ITSELF, _STRENGTHS, penalty=_distance),
    "ewc": Method("EWC", _SAMPLES, _STRENGTHS, penalty=_ewc),
    "ewc-damped": Method("EWC, damped", _SAMPLES, _STRENGTHS, penalty=_damped),
    "ewc-proximal": Method("EWC, proximal", _SAMPLES, _STRENGTHS, penalty=_proximal),
    "kronecker": Method("Kronecker", _SAMPLES, _STRENGTHS, penalty=_kronecker),
    "subspace": Method("subspace", _SAMPLES, (0.01, 0.1, 1.0, 10.0), penalty=_subspace),
    "replay": Method("replay", "sequences of it, always", (0.01, 0.05, 0.25), "replay"),
    "own-samples": Method("replay of own samples", _ITSELF, (0.05, 0.25), "own samples"),
    "ewc-replay": Method(
        "EWC and 1 % replay", "sequences of it, always", _STRENGTHS, penalty=_ewc, replay=0.01
    ),
    "ewc-budget": Method(
        "EWC, by budget", _KEPT, _BUDGETS, penalty=_ewc, is_budget=True
    ),
    "kronecker-budget": Method(
        "Kronecker, by budget", _KEPT, _BUDGETS, penalty=_kronecker, is_budget=True
    ),
    "low-rank": Method("low rank", _NOTHING, _RANKS, "rank"),
    "low-rank-ewc": Method("low rank, EWC", _SAMPLES, _STRENGTHS[1:], rank=int(_RANKS[-1])),
    "interpolation": Method(
        "interpolation", _ITSELF, (0.1, 0.3, 0.5, 0.7, 0.9), "merge"
    ),
    "fisher-merge": Method(
        "Fisher-weighted merge", _SAMPLES, (0.1, 0.3, 0.5, 0.7, 0.9), "merge"
    ),
} | {
    f"{name}-{count}": Method(
        f"{label}, {count} sequences", f"{count} sequences of it, once", _STRENGTHS[1:],
        penalty=penalty, samples=count,
    )
    for name, label, penalty in (("ewc", "EWC", _ewc), ("kronecker", "Kronecker", _kronecker))
    for count in SAMPLES
}  # fmt: skip
