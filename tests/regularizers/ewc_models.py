"""A small model with importances, moved away from where it was: what the EWC tests work on."""

import torch
from torch import nn


def small_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def random_importance(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.rand(p.shape, generator=generator, dtype=torch.float64)
        for n, p in model.named_parameters()
    }


def move(model, scale=0.3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p += (scale * noise).to(p.dtype)
