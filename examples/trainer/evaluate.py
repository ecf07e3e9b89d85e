"""Bits per byte on fixed windows."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["bits_per_byte"]


@torch.no_grad()
def bits_per_byte(
    model: nn.Module,
    windows: Tensor,
    token_bytes: Tensor,
    *,
    batch_size: int = 32,
    between: Callable[[], None] = lambda: None,
) -> float:
    """Mean code length of the bytes: sum of nats / ln 2 / bytes.

    The first token of a window is context only, and tokens that stand for no bytes are left out.
    Logits and losses are fp32, their sum fp64.

    Args:
        model: (B, T) int64 -> logits (B, T, V).
        windows: (n, T + 1) int64.
        token_bytes: (V,) int64, the bytes of each token.
        batch_size: windows at a time; bounds the memory.
        between: called before every batch; may raise to stop.
    """
    device = next(model.parameters()).device
    token_bytes = token_bytes.to(device)
    was_training = model.training
    model.eval()
    nats = torch.zeros((), dtype=torch.float64, device=device)
    try:
        for part in windows.split(batch_size):
            between()
            part = part.to(device)
            logits = model(part[:, :-1]).float()
            targets = part[:, 1:].flatten()
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
            nats += losses.where(token_bytes[targets] > 0, 0.0).sum(dtype=torch.float64)
    finally:
        model.train(was_training)
    return nats.item() / math.log(2) / int(token_bytes[windows[:, 1:].to(device)].sum())
