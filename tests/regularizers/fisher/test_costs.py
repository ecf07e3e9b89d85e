"""Which way "auto" takes, by counts that are the same everywhere, and what is counted."""

import warnings

import pytest
import torch
from fisher_models import randomised
from torch import nn
from torch.nn import functional

from ars.models import GPT, GPTConfig
from ars.regularizers import DiagonalFisher
from ars.regularizers.fisher import per_sample
from ars.regularizers.fisher.estimators import Samples
from ars.regularizers.fisher.per_sample import Cost, cost_of, loop_is_cheap

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def gpt(width, length, tied=False):
    config = GPTConfig(
        vocab_size=512, sequence_len=length, n_layer=2, n_head=width // 32, n_embd=width
    )
    model = GPT(config)
    if tied:
        model.lm_head.weight = model.wte.weight
    ids = torch.randint(512, (2, length))
    return model, (ids, ids)


class Tagger(nn.Module):
    """No rule knows it."""

    def __init__(self, width):
        super().__init__()
        self.rnn, self.head = nn.GRU(width, width, batch_first=True), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def tagger(width, length):
    return Tagger(width), (torch.randn(2, length, width), torch.randint(3, (2, length)))


class Transformer(nn.Module):
    """Attention that reads a projection's weight by itself: no rule knows it."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.layer(x))


def transformer(width, length):
    return Transformer(width), (torch.randn(2, length, width), torch.randint(3, (2, length)))


def classifier(width):
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    return model, (torch.randn(2, width), torch.arange(2))


def depthwise(size):
    model = nn.Sequential(
        nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.BatchNorm2d(64), nn.ReLU6(),
        nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    return model, (torch.randn(2, 64, size, size), torch.arange(2))


# As measured (docs/decisions.md): one sequence of 256 channels and 128 positions fills a core.
FAMILIES = {
    "small gpt": (lambda: gpt(64, 32), "hooks"),
    "gpt": (lambda: gpt(256, 128), "loop"),
    "tied gpt": (lambda: gpt(256, 128, tied=True), "loop"),
    "small classifier": (lambda: classifier(64), "hooks"),
    "wide classifier": (lambda: classifier(2048), "hooks"),  # a sample reads 16 MB of weights
    "small images": (lambda: depthwise(8), "hooks"),
    "images": (lambda: depthwise(64), "loop"),
    "small transformer": (lambda: transformer(32, 16), "vmap"),
    "transformer": (lambda: transformer(256, 128), "loop"),
    "small tagger": (lambda: tagger(8, 4), "loop"),  # torch's GRU has no rule for vmap on a CPU
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_goes_the_way_that_was_measured_to_be_the_fastest(family, monkeypatch):
    build, expected = FAMILIES[family]
    model, batch = build()
    model, seen = randomised(model, torch.float32), []

    class Watched(per_sample.Differentiator):
        def add_squares(self, *args):
            super().add_squares(*args)
            seen.append(self._current_method)

    monkeypatch.setattr("ars.regularizers.fisher.diagonal.Differentiator", Watched)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore" if "transformer" in family or "tagger" in family else "error"
        )
        DiagonalFisher(model, "empirical").fit([batch, batch])
    assert seen == [expected] * 2


def test_the_loop_that_is_chosen_is_the_loop():
    model, batch = gpt(256, 128)
    auto, loop = (
        DiagonalFisher(model, "empirical", method=method).fit([batch]).importance
        for method in ("auto", "loop")
    )
    assert all(torch.equal(auto[name], loop[name]) for name in loop)


def test_what_is_counted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4, bias=False)

        def forward(self, x):
            return functional.relu(self.layer(x.flatten(1))).view(-1, 2, 2)

    cost = cost_of(Net(), Samples.of_inputs(torch.randn(1, 2, 4)))
    # Views move nothing: a product of 1 x 8 by 8 x 4, and a relu; 4 numbers each.
    assert cost == Cost(operators=2, operations=2 * 8 * 4, written=2 * 4 * 4)


@pytest.mark.parametrize(
    ("cost", "parameters", "device", "expected"),
    [
        (Cost(10, 2 * 10**7, 0), 0, CPU, True),  # 10 calls are 1e7 of 6e7
        (Cost(10, 10**7, 0), 0, CPU, False),
        (Cost(0, 2 * 10**7, 0), 10**5, CPU, True),  # six passes over 4e5 bytes: 1.2e7
        (Cost(0, 2 * 10**7, 0), 2 * 10**5, CPU, False),
        (Cost(10, 0, 4 * 10**6), 0, CPU, True),  # nothing but memory: 6e7
        (Cost(10, 2 * 10**7, 0), 0, GPU, False),  # whose calls cost a thousand times as much work
        (Cost(10, 2 * 10**10, 0), 0, GPU, True),
    ],
)
def test_the_rule(cost, parameters, device, expected):
    assert loop_is_cheap(cost, [torch.empty(parameters)], device) is expected


def test_a_model_that_cannot_be_counted_is_taken_as_before(monkeypatch):
    def fails(*_):
        raise RuntimeError("no")

    model, batch = gpt(256, 128)
    monkeypatch.setattr(per_sample, "cost_of", fails)
    way = per_sample.Differentiator(model, dict(model.named_parameters()), "auto", None)
    monkeypatch.setattr(way, "_by_taps", lambda *_: None)
    way.add_squares({}, "empirical", _chunk(batch))
    assert way._current_method == "hooks"


def _chunk(batch):
    inputs, targets = batch
    return per_sample.Chunk(Samples.of_inputs(inputs), targets, torch.empty(2, 1, 0), None, 1)


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_grouped_convolutions_are_those_of_the_loop(groups, mode, dtype, relative_error):
    """With channels that the groups multiply, strides and dilations, frames beside samples."""

    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            options = {"padding": (2, 1), "stride": (1, 2), "dilation": (2, 1)}
            self.conv = nn.Conv2d(4, 8, (3, 2), groups=groups, padding_mode=mode, **options)
            self.line = nn.Conv1d(8, 8, 3, groups=groups, padding="same")
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            x = torch.stack((x, 2 * x.flip(-1)), 1).flatten(0, 1)
            x = self.line(self.conv(x).tanh().flatten(2)).tanh().mean(2)
            return self.head(x.view(-1, 2, 8).mean(1))

    model = randomised(Frames(), dtype)
    batch = torch.randn(5, 4, 6, 7, dtype=dtype), torch.arange(5) % 3
    hooks, loop = (
        DiagonalFisher(model, "empirical", method=method).fit([batch]).importance
        for method in ("hooks", "loop")
    )
    assert relative_error(hooks, loop) < (1e-11 if dtype is torch.float64 else 0.1)
