"""What DiagonalFisher.fit promises about the model, the data, randomness and errors."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from ars.regularizers import DiagonalFisher


class Wrapped(nn.Module):
    """Batch norm, dropout, an unused and a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.linear(x))) * self.frozen)


def labelled(n=6):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(n, 3, generator=generator), torch.arange(n) % 2


@pytest.mark.parametrize("method", ["loop", "vmap"])
def test_leaves_the_model_as_it_was(method):
    torch.manual_seed(0)
    model = Wrapped()
    model.norm.running_mean.fill_(0.5)
    model.head.eval()
    model.linear.weight.grad = torch.ones_like(model.linear.weight)
    grads = {n: p.grad for n, p in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    fisher = DiagonalFisher(model, "empirical", method=method)
    with torch.no_grad():  # the caller's context does not matter
        fisher.fit([labelled()])
    assert model.training
    assert model.norm.training
    assert not model.head.training
    for name, p in model.named_parameters():
        assert p.grad is grads[name]
        assert p.requires_grad == (name != "frozen")
    assert (model.linear.weight.grad == 1).all()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert "frozen" not in fisher.importance
    assert (fisher.importance["unused"] == 0).all()
    # Evaluation mode: no dropout, the running statistics, no mixing of samples.
    x, y = labelled()
    model.eval()
    rows = [
        torch.autograd.grad(functional.cross_entropy(model(a[None]), b[None]), model.head.weight)[0]
        for a, b in zip(x, y, strict=True)
    ]
    expected = torch.stack(rows).square().mean(0)
    torch.testing.assert_close(fisher.importance["head.weight"], expected)


def test_restores_the_model_and_keeps_the_result_when_fit_fails():
    model = Wrapped()
    fisher = DiagonalFisher(model, "empirical", method="loop").fit([labelled()])
    importance = fisher.importance

    def broken():
        yield labelled()
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fisher.fit(broken())
    assert all(m.training for m in model.modules())
    assert fisher.importance is importance
    assert fisher.n_samples == 6


def test_generator_is_the_only_source_of_randomness(relative_error):
    model = nn.Linear(3, 2)
    state = torch.get_rng_state()
    results = [
        DiagonalFisher(model, "sketch", generator=torch.Generator().manual_seed(seed))
        .fit([labelled()])
        .importance
        for seed in (5, 5, 6)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert relative_error(results[1], results[0]) == 0.0
    assert relative_error(results[2], results[0]) > 0.0


class Constant(nn.Module):
    """Returns what it was given, but owns a trainable parameter."""

    def __init__(self, output):
        super().__init__()
        self.output, self.weight = output, nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.output


@pytest.mark.parametrize(
    ("batches", "error", "match"),
    [
        ([], ValueError, "batches is empty"),
        ((torch.randn(2, 3), torch.tensor([0, 1])), TypeError, r"pass a single batch as \[\("),
        ([(torch.randn(2, 3), [0, 1])], TypeError, "pair"),
        ([(torch.randn(2, 3),)], TypeError, "pair"),
        ([(torch.randn(2, 3), torch.tensor([0, 1], dtype=torch.int32))], TypeError, "int64"),
        ([(torch.randn(2, 3), torch.tensor([0.0, 1.0]))], TypeError, "int64"),
        ([(torch.randn(2, 3), torch.zeros(2, 1, 1).long())], ValueError, r"\(B,\) or \(B, T\)"),
        ([(torch.randn(2, 3), torch.tensor([0]))], ValueError, "first dimension"),
        ([(torch.randn(()), torch.tensor([0]))], ValueError, "first dimension"),
        ([(torch.randn(0, 3), torch.zeros(0).long())], ValueError, "batch 0 is empty"),
        ([(torch.randn(2, 3), torch.zeros(2, 0).long())], ValueError, "batch 0 is empty"),
        ([(torch.randn(2, 3), torch.zeros(2, 3).long())], ValueError, r"\(1, 2\) do not fit"),
        ([(torch.randn(2, 5, 3), torch.zeros(2).long())], ValueError, r"\(1, 5, 2\) do not fit"),
        ([(torch.randn(2, 3), torch.tensor([0, 2]))], ValueError, r"contain 2, outside \[0, 2\)"),
        ([(torch.randn(2, 3), torch.tensor([0, -1]))], ValueError, "contain -1.*-100 to mask"),
    ],
)
def test_refuses_wrong_batches(batches, error, match):
    with pytest.raises(error, match=match):
        DiagonalFisher(nn.Linear(3, 2)).fit(batches)


@pytest.mark.parametrize(
    ("model", "error", "match"),
    [
        (nn.ReLU(), ValueError, "no parameter with requires_grad"),
        (nn.Linear(3, 2).requires_grad_(False), ValueError, "no parameter with requires_grad"),
        (nn.Linear(3, 2, dtype=torch.complex64), TypeError, "'weight' is complex"),
        (Constant((torch.zeros(1, 2),)), TypeError, "got tuple; wrap it"),
        (Constant(torch.zeros(1, 2).long()), TypeError, "floating point"),
        (Constant(torch.zeros(1, 2)), ValueError, "do not depend on any trainable parameter"),
        (Constant(torch.tensor(0.0)), ValueError, "do not fit targets"),
        (Constant(torch.zeros(1, 2, device="meta")), ValueError, "on meta, targets on cpu"),
    ],
)
def test_refuses_wrong_models(model, error, match):
    with pytest.raises(error, match=match):
        DiagonalFisher(model).fit([labelled()])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_names_the_parameter_of_an_importance_that_is_not_finite(value):
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.bias[0] = value
    with pytest.raises(ValueError, match="importance of 'weight' is not finite"):
        DiagonalFisher(model).fit([labelled()])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"estimator": "true"}, ValueError, "'true'; choose one of .*sketch"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be a positive integer, got 0"),
        ({"chunk_size": 2.0}, ValueError, "chunk_size"),
        ({"chunk_size": True}, ValueError, "chunk_size"),
        ({"method": "fast"}, ValueError, "unknown method 'fast'"),
        ({"generator": 3}, TypeError, "manual_seed"),
        ({"model": "gpt"}, TypeError, "torch.nn.Module, got str"),
    ],
)
def test_refuses_wrong_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        DiagonalFisher(**({"model": nn.Linear(3, 2)} | arguments))


def test_exact_refuses_to_run_for_hours():
    batch = torch.randn(1, 2048, 3), torch.zeros(1, 2048, dtype=torch.int64)
    fisher = DiagonalFisher(nn.Linear(3, 3), "exact")
    with pytest.raises(ValueError, match=r"2048 \* 3 = 6144 .*estimator='sketch'"):
        fisher.fit([batch])
    # A later batch with longer sequences is refused as well.
    with pytest.raises(ValueError, match="6144"):
        fisher.fit([(batch[0][:, :2], batch[1][:, :2]), batch])
