"""Bits per byte on fixed windows."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["bits_per_byte"]

_BATCH = 32  # windows at a time: bounds the memory of the logits


@torch.no_grad()
def bits_per_byte(
    model: nn.Module, windows: Tensor, *, between: Callable[[], None] = lambda: None
) -> float:
    """Mean code length of the bytes: sum of nats / ln 2 / bytes.

    The first byte of a window is context only. Logits and losses are fp32, their sum fp64.

    Args:
        model: (B, T) int64 -> logits (B, T, 256).
        windows: (n, T + 1) int64.
        between: called before every batch; may raise to stop.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats = torch.zeros((), dtype=torch.float64, device=device)
    try:
        for part in windows.split(_BATCH):
            between()
            part = part.to(device)
            logits = model(part[:, :-1]).float()
            nats += nn.functional.cross_entropy(
                logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none"
            ).sum(dtype=torch.float64)
    finally:
        model.train(was_training)
    return nats.item() / math.log(2) / windows[:, 1:].numel()
