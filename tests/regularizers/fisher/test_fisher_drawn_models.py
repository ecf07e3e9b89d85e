"""Models drawn at random, of shared, repeated, masked and routed layers, against the loop."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from ars.regularizers import DiagonalFisher

WIDTH, CLASSES = 4, 3
# In float64, relative to each tensor's largest entry; layers of a scale of 1e-6 are summed with
# others 1e6 times larger, whose rounding theirs is.
TOLERANCE = 1e-8


class Plain(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).tanh()


class Elsewhere(Plain):
    """The weight again, without its layer."""

    def forward(self, x):
        return self.layer(x).tanh() + functional.linear(x, self.layer.weight)


class Sometimes(Plain):
    """The weight again, in the samples that begin with more than 1."""

    def forward(self, x):
        return super().forward(x) + functional.linear(x, self.layer.weight) * (x[:, :1, :1] > 1)


class Unpadded(Plain):
    def forward(self, x):
        y, valid = torch.zeros_like(x), x[..., 0].abs() > 0.3
        y[valid] = super().forward(x[valid])
        return y


class Routed(nn.Module):
    """Each position by one of two experts, which may be one layer, or shared with others."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        where = x[..., 0] > 0
        y = torch.zeros_like(x)
        y[where], y[~where] = self.first(x[where]).tanh(), self.second(x[~where]).tanh()
        return y


class Sorted(Plain):
    """The samples by their first value."""

    def forward(self, x):
        order = x[:, 0, 0].argsort()
        return super().forward(x[order])[order.argsort()]


class PositionsFirst(Plain):
    """From a length, or a batch size, on."""

    def __init__(self, layer, batch, length, folded):
        super().__init__(layer)
        self.batch, self.length, self.folded = batch, length, folded

    def forward(self, x):
        batch, length, width = x.shape
        if batch < self.batch or length < self.length:
            return super().forward(x)
        x = x.transpose(0, 1)
        if self.folded:
            x = x.flatten(0, 1)
        return super().forward(x).view(length, batch, width).transpose(0, 1)


class Drawn(nn.Module):
    """An embedding or a projection, residual branches of any scale, and a head."""

    def __init__(self, draw):
        super().__init__()
        self.embedding = nn.Embedding(7, WIDTH) if draw(2) else None
        layers = [nn.Linear(WIDTH, WIDTH) for _ in range(3)]

        def branch():
            layer = layers[draw(3)]
            plain = [Plain(layer), Plain(nn.LayerNorm(WIDTH)), Plain(layer)]
            others = [
                Elsewhere(layer), Sometimes(layer), Unpadded(layer), Sorted(layer),
                Routed(layer, layers[draw(3)]),
                PositionsFirst(layer, draw(4), 3 * draw(3), bool(draw(2))),
            ]  # fmt: skip
            return others[draw(len(others))] if draw(4) == 0 else plain[draw(len(plain))]

        self.branches = nn.ModuleList(branch() for _ in range(1 + draw(4)))
        self.scales = [(1.0, 1e-6)[draw(4) == 0] for _ in self.branches]
        self.head = nn.Linear(WIDTH, CLASSES)
        self.tied = nn.Linear(WIDTH, 7, bias=False) if self.embedding and draw(2) else None
        if self.tied:
            self.tied.weight = self.embedding.weight
        self.certain = draw(3) == 0

    def forward(self, x):
        if self.embedding:
            x = self.embedding(x)
        for scale, branch in zip(self.scales, self.branches, strict=True):
            x = x + scale * branch(x)
        logits = self.tied(x)[..., :CLASSES] if self.tied else self.head(x)
        if self.certain:  # in the samples whose first value is below 0
            first = torch.eye(CLASSES, dtype=x.dtype)[0]
            logits = logits + 60 * first * (x[:, :1, :1].detach() < 0)
        return logits


def drawn(seed):
    """Return a model and its batches: blank samples first, longer and larger batches later."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return int(torch.randint(n, (), generator=generator))

    model = Drawn(draw).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5, generator=generator)
    batches = []
    for index in range(3):
        size = 1 + draw(5), 1 + draw(4) + 3 * (index == 2)
        x = torch.randint(7, size, generator=generator)
        if not model.embedding:
            x = torch.randn(*size, WIDTH, generator=generator, dtype=torch.float64)
        if index == 0:
            x[: 1 + draw(3)] = 0
        batches.append((x, torch.randint(CLASSES, size, generator=generator)))
    return model, batches


def difference(actual, expected):
    """Relative to each tensor's own largest entry."""
    return max(
        float((actual[n] - e).abs().max() / e.abs().max()) if e.any() else float(actual[n].any())
        for n, e in expected.items()
    )


@pytest.mark.parametrize(
    ("estimator", "draws"), [("empirical", 120), ("sketch", 60), ("exact", 40)]
)
def test_every_model_is_right(estimator, draws):
    at_once = 0
    for seed in range(draws):
        results = []
        for method in ("loop", "auto"):
            model, batches = drawn(seed)
            fisher = DiagonalFisher(
                model, estimator, method=method, generator=torch.Generator().manual_seed(1)
            )
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                results.append(fisher.fit(batches).importance)
        loop, auto = results
        assert difference(auto, loop) < TOLERANCE, (seed, model, [str(w.message) for w in caught])
        at_once += not caught
    # A third and more have something that cannot be taken at once; the others must be.
    assert 0.3 * draws < at_once < 0.8 * draws
