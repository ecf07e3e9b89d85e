"""What takes over where a way fails, and what it leaves behind."""

import re
import warnings

import pytest
import torch
from fisher_models import randomised, sequences
from torch import nn

from ars.regularizers import DiagonalFisher

TOLERANCE = 1e-11  # plain autograd's own rounding in float64


def fitted(model, batches, estimator="empirical", **options):
    return DiagonalFisher(model, estimator, **options).fit(batches).importance


def rows(n=6, width=4):
    return torch.randn(n, width, dtype=torch.float64), torch.arange(n) % 3


class LateUse(nn.Module):
    """Uses a weight outside of its layer, below other layers, in long sequences only."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        y = self.first(x).tanh()
        if x.shape[1] > 2:
            y = y + x @ self.first.weight
        return self.head(y).mean(1)


@pytest.mark.parametrize("estimator", ["empirical", "exact"])
def test_a_use_that_comes_with_a_later_batch_leaves_nothing_behind(estimator, relative_error):
    model = randomised(LateUse())
    batches = [
        (torch.randn(5, length, 4, dtype=torch.float64), torch.arange(5) % 3) for length in (2, 3)
    ]
    with pytest.warns(UserWarning, match="uses 'first.weight' outside of the layer"):
        found = fitted(model, batches, estimator)
    assert relative_error(found, fitted(model, batches, estimator, method="loop")) < TOLERANCE


@pytest.mark.parametrize("method", ["auto", "loop", "hooks"])
@pytest.mark.parametrize("estimator", ["empirical", "batched"])
def test_sparse_embeddings_give_the_dense_value(method, estimator, relative_error):
    method = "auto" if estimator == "batched" else method
    results = []
    for sparse in (True, False):
        model = nn.Sequential(nn.Embedding(5, 4, sparse=sparse), nn.Linear(4, 3))
        x = torch.tensor([[0, 1, 1], [4, 4, 4], [2, 0, 2]])
        results.append(fitted(randomised(model), [(x, x % 3)], estimator, method=method))
    assert relative_error(*results) < TOLERANCE
    assert (results[0]["0.weight"][3] == 0).all()


def test_sparse_embeddings_are_refused_by_vmap_in_one_line():
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3))
    x = torch.tensor([[0, 1, 1], [4, 4, 4], [2, 0, 2]])
    with pytest.raises(RuntimeError, match="Use method='loop'") as caught:
        fitted(model, [(x, x % 3)], method="vmap")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500  # of which torch has 300


def test_sparse_embeddings_where_vmap_cannot_go(relative_error):
    class Tagger(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            self.table, self.rnn = nn.Embedding(5, 4, sparse=sparse), nn.RNN(4, 3, batch_first=True)

        def forward(self, x):
            return self.rnn(self.table(x))[0]

    x = torch.tensor([[0, 1, 1], [4, 4, 4], [2, 0, 2]])
    results = []
    for sparse in (True, False):
        with pytest.warns(UserWarning, match="RNN 'rnn' has no rule"):
            results.append(fitted(randomised(Tagger(sparse)), [(x, x % 3)]))
    assert relative_error(*results) < TOLERANCE


class Branching(nn.Module):
    """Looks at a value in long sequences; has attention, which no rule knows."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 1), nn.Linear(4, 3)

    def forward(self, x):
        x = self.attention(*3 * (x.transpose(0, 1),))[0].transpose(0, 1)
        if x.shape[1] > 4 and x.sum() > 0:
            x = 2 * x
        return self.head(x)


def test_vmap_that_fails_on_a_later_batch(relative_error):
    """What it has added by then stays, and is not added again."""
    model = randomised(Branching())
    batches = [sequences(n=12, length=3), sequences(n=12, length=6), sequences(n=5, length=3)]
    loop = fitted(model, batches, method="loop")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        auto = fitted(model, batches)
    says = [str(w.message) for w in caught]
    assert len(says) == 2
    assert re.search("Samples are taken by torch.func.vmap", says[0])
    assert re.search("could not differentiate Branching.*one by one from here on", says[1], re.S)
    assert relative_error(auto, loop) < TOLERANCE
    with pytest.raises(RuntimeError, match="could not differentiate Branching"):
        fitted(model, batches, method="vmap")


@pytest.mark.parametrize("error", [AssertionError, TypeError, ValueError, RuntimeError])
@pytest.mark.parametrize("known", [True, False])
def test_models_that_refuse_float32(error, known, relative_error):
    class HalfOnly(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)
            self.scale = None if known else nn.Parameter(torch.ones(4))

        def forward(self, x):
            if self.head.weight.dtype != torch.bfloat16:
                raise error("in bfloat16 only")
            return self.head(x.bfloat16() if known else x.bfloat16() * self.scale)

    model, (x, y) = randomised(HalfOnly(), torch.bfloat16), rows()
    loop = fitted(model, [(x, y)], method="loop")
    with warnings.catch_warnings():
        warnings.simplefilter("error" if known else "ignore")
        auto = fitted(model, [(x, y)])
    assert relative_error(auto, loop) < 0.03  # bfloat16's products, and their squares


@pytest.mark.parametrize("method", ["vmap", "hooks", "loop"])
def test_a_module_with_two_names_keeps_its_parameters(method):
    """torch.func.functional_call would leave plain tensors in their place."""
    layer = nn.Linear(4, 4)
    model = randomised(nn.Sequential(layer, nn.Tanh(), nn.Sequential(layer, nn.Linear(4, 3))))
    before = dict(layer._parameters)
    fitted(model, [rows()], method=method)
    assert all(layer._parameters[n] is p for n, p in before.items())
