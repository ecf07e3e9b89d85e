"""ARS optimizers: AdamW gated on the device, with inheritance penalties in the same pass.

>>> import torch
>>> from ars import ARSAdamW  # in place of torch.optim.AdamW
>>> model = torch.nn.Linear(8, 1)
>>> opt = ARSAdamW(model.parameters(), lr=3e-4)
>>> loss = model(torch.randn(4, 8)).square().mean()
>>> loss.backward()
>>> opt.step(loss=loss)
"""

import sys

from ars.adam import ARSAdam, ARSAdamW
from ars.config import ARSConfig, ChronosJitter, EntropyGuard, SurpriseGate
from ars.controller import ARSController
from ars.release import GradientRelease
from ars.surprise import prediction_entropy
from ars.wrapper import ARSOptimizer

__version__ = "0.1.0"

__all__ = [
    "ARSAdam",
    "ARSAdamW",
    "ARSConfig",
    "ARSController",
    "ARSOptimizer",
    "ChronosJitter",
    "EntropyGuard",
    "GradientRelease",
    "SurpriseGate",
    "__version__",
    "prediction_entropy",
]

# A pickle names the modules of its classes: where those of version 0.1.0 are now.
for _old, _new in {"adamw": "adam", "parts": "config", "state": "step.state"}.items():
    sys.modules[f"ars.{_old}"] = sys.modules[f"ars.{_new}"]
