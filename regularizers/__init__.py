"""Penalties that keep a model near what it has learned, and the Fisher that weights them.

What to measure on the old task, and which penalty takes it:

* :class:`KroneckerPenalty` of an :class:`ActivationCovariance` or a :class:`KroneckerFisher`
  forgets least: it holds the directions that a layer's inputs use. d^2 (and p^2) numbers a layer.
* :class:`EWC` of a :class:`DiagonalFisher`: all parameters, 3 to 8 bytes each; forgets more.
* :class:`SubspacePenalty`: chosen directions alone, at low rank; or, after growth, new coordinates.
* :class:`ProgressiveInheritance`: an EWC and a subspace penalty in one.
* :class:`Distillation`: what the old model says instead of its weights; a second forward pass.

A penalty goes to ``ars.ARSAdamW(..., penalty=...)`` or, by :class:`CombinedLoss` or ``value()``,
into the loss of any optimizer. :class:`LossBudget` chooses its strength from what may be lost,
:class:`AdaptiveStrength` and :func:`trace_strengths` by other rules; :func:`save_penalty` and
:func:`load_penalty` keep files; :func:`quantize` packs an importance into a byte a parameter.
``docs/regularizers.md`` has formulas, costs and traps.
"""

import sys

from ars.regularizers.files import load_penalty, save_penalty
from ars.regularizers.fisher import (
    ActivationCovariance,
    DiagonalFisher,
    KroneckerFactors,
    KroneckerFisher,
)
from ars.regularizers.penalties import (
    EWC,
    AdaptiveStrength,
    CombinedLoss,
    Distillation,
    KroneckerPenalty,
    LossBudget,
    PenaltyMonitor,
    ProgressiveInheritance,
    SubspacePenalty,
    distillation_loss,
    trace_strengths,
)
from ars.regularizers.storage import Quantized, dequantize, quantize

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
    "LossBudget",
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

# A pickle names the modules of its classes: where those of version 0.1.0 are now.
_MOVED = {
    "combined": "penalties.combined",
    "covariance": "fisher.covariance",
    "distillation": "penalties.distillation",
    "ewc": "penalties.ewc",
    "factors": "fisher.kronecker",
    "kronecker": "fisher.kronecker",
    "kronecker_penalty": "penalties.kronecker_penalty",
    "matrix_pull": "penalties.kronecker_penalty",
    "progressive": "penalties.combined",
    "quadratic": "penalties.quadratic",
    "restraint": "penalties.subspace",
    "strength": "penalties.strength",
    "subspace": "penalties.subspace",
}
for _old, _new in _MOVED.items():
    sys.modules[f"{__name__}.{_old}"] = sys.modules[f"{__name__}.{_new}"]
