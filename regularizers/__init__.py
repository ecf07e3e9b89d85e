"""Penalties that keep a model near what it has learned, and the Fisher that weights them."""

from ars.regularizers.combined import CombinedLoss, PenaltyMonitor
from ars.regularizers.covariance import ActivationCovariance
from ars.regularizers.distillation import Distillation, distillation_loss
from ars.regularizers.ewc import EWC
from ars.regularizers.factors import KroneckerFactors
from ars.regularizers.files import load_penalty, save_penalty
from ars.regularizers.fisher import DiagonalFisher
from ars.regularizers.kronecker import KroneckerFisher
from ars.regularizers.kronecker_penalty import KroneckerPenalty
from ars.regularizers.progressive import ProgressiveInheritance
from ars.regularizers.storage import Quantized, dequantize, quantize
from ars.regularizers.strength import AdaptiveStrength, trace_strengths
from ars.regularizers.subspace import SubspacePenalty

__all__ = [
    "EWC",
    "ActivationCovariance",
    "AdaptiveStrength",
    "CombinedLoss",
    "DiagonalFisher",
    "Distillation",
    "KroneckerFactors",
    "KroneckerFisher",
    "KroneckerPenalty",
    "PenaltyMonitor",
    "ProgressiveInheritance",
    "Quantized",
    "SubspacePenalty",
    "dequantize",
    "distillation_loss",
    "load_penalty",
    "quantize",
    "save_penalty",
    "trace_strengths",
]
