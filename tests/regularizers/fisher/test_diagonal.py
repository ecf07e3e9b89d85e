"""DiagonalFisher against slow, obvious oracles."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from ars.regularizers import DiagonalFisher


def nll(logits, targets):
    return functional.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=-100, reduction="sum"
    )


def dense_cotangents(estimator, logits, y, generator):
    """All logits cotangents of one sample, built from their definitions with full matrices."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp().detach()
    t, c = p.shape
    valid = y != -100
    if estimator == "sketch":
        z = torch.randint(0, 2, (t, c), generator=generator, dtype=torch.int8) * 2 - 1
        root = [(row.diag() - torch.outer(row, row)) @ row.rsqrt().diag() for row in p]
        yield torch.stack([r @ s.to(p) for r, s in zip(root, z, strict=True)]) * valid[:, None]
    elif estimator == "mc":
        u = torch.rand(t, generator=generator, dtype=torch.float64)
        loss = logits.new_zeros(())
        for i in range(t):
            edges = p[i].double().cumsum(0)
            label = next(j for j in range(c) if u[i] * edges[-1] < edges[j])
            loss = loss - valid[i] * log_p[i, label]
        yield torch.autograd.grad(loss, logits, retain_graph=True)[0]
    elif estimator == "exact":
        for i in range(t):
            for j in range(c):
                score = torch.autograd.grad(log_p[i, j], logits, retain_graph=True)[0]
                yield p[i, j].sqrt() * score * valid[i]
    else:
        yield torch.autograd.grad(nll(logits, y), logits, retain_graph=True)[0]


def dense_fisher(model, estimator, x, y, generator=None):
    """Mean over samples of squared gradients, one sample and one backward pass at a time."""
    model = copy.deepcopy(model).eval()
    squares = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for xi, yi in zip(x, y, strict=True):
        logits = model(xi[None])[0]
        for cotangent in list(dense_cotangents(estimator, logits, yi, generator)):
            model.zero_grad()
            logits.backward(cotangent, retain_graph=True)
            for n, p in model.named_parameters():
                squares[n] += p.grad**2
    return {n: s / len(x) for n, s in squares.items()}


TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(scope="module", params=TOLERANCES, ids=["fp32", "fp64"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module", params=["sketch", "mc", "exact", "empirical"])
def dense(request, tied_gpt, tokens, dtype):
    """An estimator and its Fisher, which takes seconds and is the same for every way."""
    generator = torch.Generator().manual_seed(2)
    return request.param, dense_fisher(tied_gpt(dtype), request.param, *tokens(16), generator)


def test_matches_dense_loop(dense, tied_gpt, tokens, relative_error, way, dtype):
    estimator, expected = dense
    fisher = DiagonalFisher(
        tied_gpt(dtype), estimator, generator=torch.Generator().manual_seed(2), **way
    ).fit([tokens(16)])
    assert relative_error(fisher.importance, expected) < TOLERANCES[dtype]
    assert {t.dtype for t in fisher.importance.values()} == {dtype}
    assert fisher.n_samples == 16


@pytest.mark.parametrize("estimator", ["empirical", "sketch"])
def test_does_not_depend_on_batch_size(tied_gpt, tokens, relative_error, estimator, way):
    x, y = tokens(22)
    model = tied_gpt()
    results = [
        DiagonalFisher(model, estimator, generator=torch.Generator().manual_seed(3), **way)
        .fit(zip(x.split(b), y.split(b), strict=True))
        .importance
        for b in (1, 7, 22)
    ]
    assert relative_error(results[1], results[0]) < 1e-6
    assert relative_error(results[2], results[0]) < 1e-6


def test_tied_weight_appears_once_and_holds_both_uses(tied_gpt, tokens):
    x, y = tokens(16)
    tied = tied_gpt(torch.float64)
    untied = copy.deepcopy(tied)
    untied.lm_head.weight = nn.Parameter(untied.wte.weight.detach().clone())
    both = DiagonalFisher(tied, "empirical").fit([(x, y)]).importance
    apart = DiagonalFisher(untied, "empirical").fit([(x, y)]).importance
    assert "lm_head.weight" not in both
    separately = apart["wte.weight"] + apart["lm_head.weight"]
    assert (both["wte.weight"] - separately).norm() > 0.05 * separately.norm()


def test_masked_sample_counts_with_zero_gradient(tied_gpt, tokens, relative_error):
    x, y = tokens(4, masked=False)
    masked = torch.full_like(y, -100)
    model = tied_gpt(torch.float64)
    alone = DiagonalFisher(model, "empirical").fit([(x, y)])
    padded = DiagonalFisher(model, "empirical").fit([(x, y), (x, masked)])
    assert padded.n_samples == 8
    halved = {n: t / 2 for n, t in alone.importance.items()}
    assert relative_error(padded.importance, halved) < 1e-12


def test_small_half_precision_gradients_are_squared_in_float32():
    model = nn.Linear(1, 2).half()
    x, y = torch.full((1, 1), 1e-4).half(), torch.tensor([0])
    importance = DiagonalFisher(model, "empirical").fit([(x, y)]).importance["weight"]
    assert (importance > 0).all()  # (1e-4 / 2)^2 is 0 in float16
