"""Penalties that keep a model near what it has learned."""

from ars.regularizers.penalties.budget import LossBudget
from ars.regularizers.penalties.combined import (
    CombinedLoss,
    PenaltyMonitor,
    ProgressiveInheritance,
)
from ars.regularizers.penalties.distillation import Distillation, distillation_loss
from ars.regularizers.penalties.ewc import EWC
from ars.regularizers.penalties.kronecker_penalty import KroneckerPenalty
from ars.regularizers.penalties.strength import AdaptiveStrength, trace_strengths
from ars.regularizers.penalties.subspace import SubspacePenalty

__all__ = [
    "EWC",
    "AdaptiveStrength",
    "CombinedLoss",
    "Distillation",
    "KroneckerPenalty",
    "LossBudget",
    "PenaltyMonitor",
    "ProgressiveInheritance",
    "SubspacePenalty",
    "distillation_loss",
    "trace_strengths",
]
