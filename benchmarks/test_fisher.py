"""The Fisher of small models by us and by others: equal results first, then time and memory."""

import copy

import pytest
import torch
from fisher_peers import forward_backward, installed, quiet
from interleaved import time_all
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

VOCABULARY = 512
# Deviation from plain autograd, relative to each tensor's largest entry, beyond which a candidate
# has computed something else, and its time says nothing.
TOLERANCE = 1e-3
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


def peak_memory(run, device: str) -> float:
    """Return the most bytes held at once beyond those held at the start."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("build", CASES.values(), ids=CASES)
def test_fisher(build, device, report, request):
    """The empirical Fisher; the baseline is one forward and backward pass of the same batches."""
    torch.manual_seed(0)
    model, batches = build()
    model = model.to(device).eval()
    batches = [(x.to(device), y.to(device)) for x, y in batches]
    candidates = installed()
    expected = candidates["one by one"](model, batches)
    models = {name: copy.deepcopy(model) for name in candidates}  # some leave their hooks
    failures, errors = {}, {}
    for name, run in candidates.items():
        try:
            result = quiet(lambda name=name, run=run: run(models[name], batches))
            errors[name] = largest_error(result, expected)
        except Exception as error:  # of any library, and its own business
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    assert errors["DiagonalFisher"] < 1e-5
    assert errors["vmap(grad)"] < 1e-5
    right = [name for name, error in errors.items() if error < TOLERANCE]
    timed = {"forward + backward": lambda: forward_backward(model, batches)} | {
        name: (lambda name=name: candidates[name](models[name], batches)) for name in right
    }
    seconds = quiet(lambda: time_all(timed, device, rounds=ROUNDS))
    rows = []
    for name in ["forward + backward", *candidates]:
        row = {"candidate": name}
        if name in timed:
            row["ms"] = round(seconds[name] * 1e3, 2)
            row["time / baseline"] = round(seconds[name] / seconds["forward + backward"], 2)
            memory = quiet(lambda name=name: peak_memory(timed[name], device))
            row["peak MiB"] = round(memory / 2**20, 1)
        if name in errors:
            row["largest error"] = f"{errors[name]:.1e}"
        if name in failures:
            row["fails"] = failures[name]
        elif name in errors and name not in right:
            row["fails"] = "another quantity"
        rows.append(row)
    report(f"fisher {request.node.callspec.id}".replace(" ", "-"), rows)
