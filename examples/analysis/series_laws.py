"""The scaling laws of every arm of a series, or why there is none."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from analysis.isoflop import IsoFlopFit
from analysis.laws import FLOPS_PER_PARAMETER_TOKEN, ChinchillaLaw, ComputeLaw, HoldOut
from analysis.records import Record, chain
from analysis.scaling import ScalingLawValidator

__all__ = ["ArmLaws", "fit_series"]

_Result = TypeVar("_Result")

_GROWN = (
    "models of this series were grown: part of their tokens was seen by smaller ancestors, so "
    "L(N, D) does not describe them; see the law in C, the operations of the whole lineage"
)


@dataclass(frozen=True)
class ArmLaws:
    """What was fitted to one arm; a string says why something was not.

    Args:
        arm: the arm.
        models: fitted, those of all seeds, ancestors of other arms included.
        chinchilla: L(N, D).
        chinchilla_score: its prediction of the runs with the largest N D.
        compute: L(C).
        compute_score: its prediction of the runs with the largest C.
        isoflop: compute-optimal sizes.
    """

    arm: str
    models: tuple[Record, ...]
    chinchilla: ChinchillaLaw | str
    chinchilla_score: HoldOut | str
    compute: ComputeLaw | str
    compute_score: HoldOut | str
    isoflop: IsoFlopFit | str

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps: each law, with the optimum of the largest C, or ``{"refused": why}``."""
        found: dict[str, Any] = {
            "arm": self.arm,
            "models": [{"name": r.name, "seed": r.seed} for r in self.models],
        }
        for key in ("chinchilla", "chinchilla_score", "compute", "compute_score", "isoflop"):
            value = getattr(self, key)
            found[key] = {"refused": value} if isinstance(value, str) else value.to_dict()
        if isinstance(self.chinchilla, ChinchillaLaw):
            largest = max(FLOPS_PER_PARAMETER_TOKEN * r.params * r.tokens for r in self.models)
            found["chinchilla"]["optimum"] = self.chinchilla.optimum(largest)
        return found


def fit_series(records: Sequence[Record], validator: ScalingLawValidator) -> list[ArmLaws]:
    """Fit what can be fitted to each arm.

    The loss is bits per byte, N counts all parameters, D a model's own tokens and C the operations
    of its lineage.

    Args:
        records: of one or more seeds.
        validator: with the settings of the fits.
    """
    return [_fit_arm(arm, records, validator) for arm in dict.fromkeys(r.arm for r in records)]


def _fit_arm(arm: str, records: Sequence[Record], validator: ScalingLawValidator) -> ArmLaws:
    seeds = dict.fromkeys(record.seed for record in records)
    models = [record for seed in seeds for record in chain(records, arm, seed)]
    params = [float(r.params) for r in models]
    tokens = [float(r.tokens) for r in models]
    flops = [float(r.lineage_flops) for r in models]
    losses = [r.val_bpb for r in models]
    grown = any(record.parent is not None for record in models)

    def in_n_and_d(fit: Callable[[], _Result]) -> _Result | str:
        return _GROWN if grown else _or_reason(fit)

    return ArmLaws(
        arm=arm,
        models=tuple(models),
        chinchilla=in_n_and_d(lambda: validator.fit(params, tokens, losses)),
        chinchilla_score=in_n_and_d(lambda: validator.holdout(params, tokens, losses)),
        compute=_or_reason(lambda: validator.fit_compute(flops, losses)),
        compute_score=_or_reason(lambda: validator.holdout_compute(flops, losses)),
        isoflop=in_n_and_d(lambda: validator.isoflop(params, tokens, losses, flops)),
    )


def _or_reason(fit: Callable[[], _Result]) -> _Result | str:
    try:
        return fit()
    except ValueError as refusal:
        return str(refusal)
