"""Which way "auto" takes, by counts that are the same everywhere, and what is counted."""

import copy
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
from ars.regularizers.fisher.per_sample import Cost, cost_of, fastest_on_cpu


@pytest.fixture(autouse=True)
def hooks_first():
    """Here the prediction is in force."""


def gpt(width, length, tied=False, samples=8):
    config = GPTConfig(
        vocab_size=512, sequence_len=length, n_layer=2, n_head=width // 32, n_embd=width
    )
    model = GPT(config)
    if tied:
        model.lm_head.weight = model.wte.weight
    ids = torch.randint(512, (samples, length))
    return model, (ids, ids)


class Tagger(nn.Module):
    """No rule knows it."""

    def __init__(self, width):
        super().__init__()
        self.rnn, self.head = nn.GRU(width, width, batch_first=True), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def tagger(width, length):
    return Tagger(width), (torch.randn(8, length, width), torch.randint(3, (8, length)))


class Transformer(nn.Module):
    """Attention that reads a projection's weight by itself: no rule knows it."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.layer(x))


def transformer(width, length):
    return Transformer(width), (torch.randn(8, length, width), torch.randint(3, (8, length)))


def classifier(width, samples=8):
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    return model, (torch.randn(samples, width), torch.arange(samples) % 10)


def depthwise(size):
    model = nn.Sequential(
        nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.BatchNorm2d(64), nn.ReLU6(),
        nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    return model, (torch.randn(8, 64, size, size), torch.arange(8))


class ReadsValues(nn.Module):
    """It branches on a sum, which vmap refuses."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.layer(x)
        return self.head(x if x.isfinite().all() else torch.zeros_like(x))


# As measured (docs/decisions.md).
FAMILIES = {
    "small gpt": (lambda: gpt(64, 32), "vmap"),
    "gpt": (lambda: gpt(256, 128), "vmap"),
    "one sequence": (lambda: gpt(256, 128, samples=1), "loop"),
    "tied gpt": (lambda: gpt(64, 32, tied=True), "vmap"),
    "small classifier": (lambda: classifier(64), "vmap"),
    "many samples of it": (lambda: classifier(64, 64), "hooks"),
    "wide classifier": (lambda: classifier(2048), "hooks"),  # a sample's gradient has 16 MB
    "two samples of it": (lambda: classifier(2048, 2), "loop"),
    "small images": (lambda: depthwise(8), "vmap"),
    "images": (lambda: depthwise(64), "vmap"),
    "small transformer": (lambda: transformer(32, 16), "vmap"),
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
    model, batch = gpt(256, 128, samples=1)
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
    ("cost", "parameters", "batch", "expected"),
    [
        (Cost(0, 10**9, 0), 0, 4, "loop"),  # its fixed price is the least for each sample
        (Cost(1000, 10**9, 2**27 - 12000), 1000, 8, "vmap"),  # 2**30 bytes are held
        (Cost(1000, 10**9, 2**27 - 11999), 1000, 8, "loop"),
        (Cost(100, 10**6, 0), 0, 8, "vmap"),  # calls: 1.8e8 by the loop, 4.5e7 by vmap
        (Cost(100, 10**6, 0), 0, 32, "vmap"),  # 5.9e7 by hooks
        (Cost(100, 10**6, 0), 0, 64, "hooks"),  # 3.0e7 by hooks
        (Cost(10, 10**6, 0), 10**6, 8, "hooks"),  # the others pay for each sample's gradient
        (Cost(1, 10**6, 0), 10**5, 1, "loop"),  # there is nothing to share
    ],
)
def test_the_prediction(cost, parameters, batch, expected):
    assert fastest_on_cpu(cost, parameters, batch, min(batch, 8)) == expected


def test_a_chunk_size_is_what_is_taken_together():
    """Chunks of one sample share nothing."""
    model, batch = gpt(64, 32)
    way = per_sample.Differentiator(model, dict(model.named_parameters()), "auto", 1)
    way.add_squares(per_sample.zero_sums(way._parameters), "empirical", _chunk(batch))
    assert way._current_method == "loop"


@pytest.mark.parametrize("build", [ReadsValues, lambda: tagger(8, 4)[0]])
def test_what_vmap_cannot_run_goes_by_the_one_pass_or_the_loop(build, relative_error):
    model = randomised(build())
    x, y = torch.randn(8, 4, 8).double(), torch.randint(3, (8, 4))
    loop = DiagonalFisher(model, "empirical", method="loop").fit([(x, y)]).importance
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        auto = DiagonalFisher(model, "empirical").fit([(x, y)]).importance
    assert relative_error(auto, loop) < 1e-11


def test_vmap_that_differs_from_plain_autograd_is_not_taken(monkeypatch, relative_error):
    """The comparison on two samples is made before anything is added."""
    model, batch = gpt(64, 32)
    loop = DiagonalFisher(model, "empirical", method="loop").fit([batch]).importance
    right = per_sample.add_squares_by_vmap

    def wrong(total, *args):
        right(total, *args)
        total["lm_head.weight"] *= 1.1

    monkeypatch.setattr(per_sample, "add_squares_by_vmap", wrong)
    auto = DiagonalFisher(model, "empirical").fit([batch]).importance
    assert relative_error(auto, loop) < 1e-4


class Remembers(nn.Module):
    """It keeps what it has computed last, in attributes and in a buffer."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("peak", torch.zeros(()))
        self.last = None

    def forward(self, x):
        self.last = self.layer(x)
        self.first = self.last[:, 0]
        self.peak = self.last.detach().abs().max()
        return self.head(self.last)


@pytest.mark.parametrize("method", ["auto", "vmap"])
def test_nothing_of_vmap_stays_in_the_model(method):
    model = Remembers()
    x = torch.randn(8, 8)
    model(x)
    last, first, peak = model.last, model.first, model.peak
    del model.first
    DiagonalFisher(model, "empirical", method=method).fit([(x, torch.arange(8) % 3)])
    for found in (model.last, model.peak):
        assert not torch._C._functorch.is_functorch_wrapped_tensor(found)
    assert len(model.last) in {1, 8}  # of a single sample that was looked at, or as before
    assert torch.equal(model.last @ torch.eye(8), model.last)
    copy.deepcopy(model.state_dict())
    model(x)
    assert torch.equal(model.last, last)
    assert torch.equal(model.first, first)
    assert torch.equal(model.peak, peak)


def test_vmap_gives_what_the_loop_gives_with_a_last_batch_of_another_size(relative_error):
    model, (ids, _) = gpt(64, 32)
    model = randomised(model)
    ids = torch.randint(512, (13, 32))
    batches = [(ids[:10], ids[:10]), (ids[10:], ids[10:])]
    auto, loop = (
        DiagonalFisher(model, "empirical", method=method).fit(batches).importance
        for method in ("auto", "loop")
    )
    assert relative_error(auto, loop) < 1e-11


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
