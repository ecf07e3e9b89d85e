"""The Fisher of small models by us and by others: equal results first, then time and memory."""

import copy

import pytest
import torch
from contest import PLAYED_BACK, Candidate, Contest
from fisher_peers import PEERS, PLAIN, forward_backward
from step_peers import missing, quiet
from torch import nn
from torch.nn import functional

pytestmark = PLAYED_BACK

BASELINE = "forward + backward"
VOCABULARY = 512
# Deviation from plain autograd, relative to each tensor's largest entry, beyond which a candidate
# has computed something else, and its time says nothing.
TOLERANCE = 1e-3
OURS = 1e-5
ROUNDS = 5


class Block(nn.Module):
    """Attention and an MLP. The norms are parameter-free, as not every library knows others."""

    def __init__(self, width: int) -> None:
        """Make the layers."""
        super().__init__()
        self.heads = width // 32
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, T, D) to itself."""
        batch, length, width = x.shape
        heads = self.qkv(functional.layer_norm(x, (width,))).view(batch, length, self.heads, 96)
        q, k, v = heads.transpose(1, 2).chunk(3, -1)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.out(functional.gelu(self.fc(functional.layer_norm(x, (width,)))))


class SmallGPT(nn.Module):
    """A GPT as most are: the head is the token embedding, positions are broadcast; or neither."""

    def __init__(self, width: int, depth: int, length: int, *, tied: bool) -> None:
        """Make the layers."""
        super().__init__()
        self.tied = tied
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map (B, T) to (B, T, V)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        if not self.tied:
            positions = positions.expand(tokens.shape)
        x = self.blocks(self.wte(tokens) + self.wpe(positions))
        return self.lm_head(functional.layer_norm(x, (x.shape[-1],)))


def gpt(width: int, depth: int, length: int, batch: int, *, tied: bool):
    """Return a GPT and four batches."""
    model = SmallGPT(width, depth, length, tied=tied)
    tokens = torch.randint(VOCABULARY, (4, batch, length + 1))
    return model, [(part[:, :-1], part[:, 1:]) for part in tokens]


def mlp():
    """Return a classifier and four batches."""
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    return model, [(torch.randn(64, 64), torch.randint(10, (64,))) for _ in range(4)]


CASES = {
    "tied gpt 256 x 3": lambda: gpt(256, 3, 128, 8, tied=True),
    "untied gpt 128 x 2": lambda: gpt(128, 2, 64, 16, tied=False),
    "mlp": mlp,
}


def largest_error(result: dict, expected: dict) -> float:
    """Return the largest deviation of any tensor, relative to that tensor's largest entry."""
    return max(
        float((result[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-30))
        for name, tensor in expected.items()
        if not name.endswith("qkv.bias")  # a key's bias has no gradient but for rounding
    )


@pytest.fixture(scope="module", params=CASES)
def fisher(request, device, contest) -> Contest:
    """The empirical Fisher; the baseline is one forward and backward pass of the same batches."""
    made: Contest = contest(f"fisher {request.param}", BASELINE, rounds=ROUNDS)
    torch.manual_seed(0)
    model, batches = CASES[request.param]()
    model = model.to(device).eval()
    batches = [(x.to(device), y.to(device)) for x, y in batches]
    made.candidates[BASELINE] = Candidate(lambda: forward_backward(model, batches))
    expected = PLAIN["one by one"](model, batches)
    for name, run in (PLAIN | PEERS).items():
        own = copy.deepcopy(model)  # some leave their hooks

        def once(run=run, own=own) -> dict[str, torch.Tensor]:
            return quiet(lambda: run(own, batches))

        def check(once=once) -> dict[str, float]:
            error = largest_error(once(), expected)
            assert error < OURS, f"the largest error is {error:.1e}, the bound {OURS:.0e}"
            return {"largest error": error, "bound": OURS}

        if name in PLAIN:
            made.candidates[name] = Candidate(once, check=check)
        elif reason := missing(name) or objection(once, expected):
            made.left_out[name] = reason
        else:
            made.candidates[name] = Candidate(once)
            made.notes[name] = {"bound": TOLERANCE}
    return made


def objection(once, expected: dict[str, torch.Tensor]) -> str | None:
    """Return why a library's result cannot be held against ours; that is its own business."""
    try:
        error = largest_error(once(), expected)
    except Exception as raised:
        return f"it raises {type(raised).__name__}: {str(raised).splitlines()[0][:80]}"
    return None if error < TOLERANCE else f"another quantity: the largest error is {error:.1e}"


@pytest.mark.parametrize("name", [BASELINE, *PLAIN, *PEERS])
def test_fisher(name, fisher, benchmark):
    fisher.play(name, benchmark)
