"""A model with everything that per-sample squares get wrong, and the slow, obvious Fisher."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

VOCAB, LENGTH, WIDTH, HEADS = 11, 6, 8, 2
WAYS = {
    "loop": {"method": "loop"},
    "vmap": {"method": "vmap", "chunk_size": 5},
    "hooks": {"method": "hooks"},
    "hooks-chunks": {"method": "hooks", "chunk_size": 5},
}


class TiedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, t, 3, HEADS, d // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, hd)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.norm2(x))


class TiedGPT(nn.Module):
    """Tied embedding and head, a position embedding that is broadcast over the batch, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.wpe = nn.Embedding(LENGTH, WIDTH)
        self.drop = nn.Dropout(0.5)
        self.blocks = nn.ModuleList(TiedBlock() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.drop(self.wte(tokens) + self.wpe(positions))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


@pytest.fixture(params=WAYS.values(), ids=WAYS.keys())
def way(request: pytest.FixtureRequest) -> dict[str, object]:
    """How to differentiate: every method must give the same."""
    return request.param


@pytest.fixture(scope="session")
def tied_gpt() -> Callable[..., TiedGPT]:
    def build(dtype: torch.dtype = torch.float32) -> TiedGPT:
        torch.manual_seed(0)
        model = TiedGPT()
        for p in model.parameters():
            nn.init.normal_(p, std=0.5)
        return model.to(dtype)

    return build


@pytest.fixture(scope="session")
def tokens() -> Callable[..., tuple[Tensor, Tensor]]:
    """Inputs and targets (N, T); a fifth of the targets masked, all of one sample's."""

    def build(n: int, masked: bool = True) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randint(VOCAB, (n, LENGTH), generator=generator)
        targets = torch.randint(VOCAB, (n, LENGTH), generator=generator)
        if masked:
            targets[torch.rand(n, LENGTH, generator=generator) < 0.2] = -100
            targets[n // 2] = -100
        return inputs, targets

    return build


def relative_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest deviation of any tensor, relative to that tensor's largest entry."""
    assert list(actual) == list(expected)
    return max(
        ((actual[n].double() - e.double()).abs().max() / e.double().abs().max()).item()
        for n, e in expected.items()
    )


@pytest.fixture(name="relative_error")
def _relative_error() -> Callable[[dict[str, Tensor], dict[str, Tensor]], float]:
    return relative_error
