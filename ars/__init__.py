"""ARS optimizers: AdamW gated on the device, with inheritance penalties in the same pass.

>>> import torch
>>> from ars import ARSAdamW  # in place of torch.optim.AdamW
>>> model = torch.nn.Linear(8, 1)
>>> opt = ARSAdamW(model.parameters(), lr=3e-4)
>>> loss = model(torch.randn(4, 8)).square().mean()
>>> loss.backward()
>>> opt.step(loss=loss)
"""

from ars.adam import ARSAdam
from ars.adamw import ARSAdamW
from ars.controller import ARSConfig, ARSController
from ars.release import GradientRelease

__version__ = "0.1.0"

__all__ = ["ARSAdam", "ARSAdamW", "ARSConfig", "ARSController", "GradientRelease", "__version__"]
