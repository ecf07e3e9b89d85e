"""What the tests of growth share: parents, pairs of sizes and batches."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ars.models import GPT, GPTConfig, miniseries_config


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sizes(n_layer: int, n_head: int, head_dim: int = 8, **changes: float) -> GPTConfig:
    base = GPTConfig(29, 12, n_layer, n_head, n_embd=n_head * head_dim)
    return dataclasses.replace(base, **changes)


def randomized(config: GPTConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> GPT:
    """A parent as training leaves it: every weight non-zero, logits of order 1."""
    model = GPT(config, seeded(seed)).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=seeded(seed + 1), dtype=torch.float64)
            weight.add_(noise.to(dtype), alpha=0.5 / math.sqrt(weight.size(1)))
    return model


def tokens_of(config: GPTConfig, batch: int = 6) -> Tensor:
    """Random order of all token values, repeated: every row of wte that can have a gradient has."""
    count = batch * config.sequence_len
    order = torch.randperm(count, generator=seeded(3)) % config.vocab_size
    tokens = order.view(batch, config.sequence_len)
    assert len(tokens[:, :-1].unique()) == config.vocab_size
    return tokens


def loss_of(model: GPT, tokens: Tensor) -> Tensor:
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def gradients(model: GPT, tokens: Tensor) -> dict[str, Tensor]:
    names, weights = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss_of(model, tokens), weights), strict=True))


def old_block(tensor: Tensor, old: Tensor) -> Tensor:
    return tensor[: old.size(0), : old.size(1)]


def new_coordinates(tensor: Tensor, old: Tensor) -> Tensor:
    mask = torch.ones_like(tensor, dtype=torch.bool)
    old_block(mask, old).fill_(False)
    return tensor[mask]


# The widths of d10 -> d11 come with one block to keep the test short: depth is the second pair.
PAIRS = {
    "d10 to d11 widths": (sizes(1, 10, 64), sizes(1, 11, 64)),
    "depth": (sizes(2, 2), sizes(5, 2)),
    "width": (sizes(2, 2), sizes(2, 3)),
    "d2 to d4": (miniseries_config(2, sequence_len=80), miniseries_config(4, sequence_len=80)),
    "d3 to d4": (miniseries_config(3, sequence_len=80), miniseries_config(4, sequence_len=80)),
    "4 x 48 to 4 x 56": (sizes(4, 6), sizes(4, 7)),
    "4 x 56 to 5 x 64": (sizes(4, 7), sizes(5, 8)),
    "context": (sizes(2, 2), sizes(2, 3, sequence_len=40)),
    "nothing": (sizes(2, 2), sizes(2, 2)),
}
pairs = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
kinds = pytest.mark.parametrize("blocks", ["appended", "inserted"])
small_pairs = pytest.mark.parametrize(
    "pair",
    [(sizes(2, 2), sizes(3, 3)), (sizes(2, 2), sizes(3, 2)), (sizes(1, 1), sizes(2, 4))],
    ids=["both", "depth", "jump"],
)
