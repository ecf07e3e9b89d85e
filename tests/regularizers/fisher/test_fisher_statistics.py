"""The estimators against closed forms, and in expectation."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from ars.regularizers import DiagonalFisher
from ars.regularizers.fisher.estimators import sampled_labels


class Logistic(nn.Module):
    """Logistic regression as a two-class softmax with logits (0, w.x + b)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 1)

    def forward(self, x):
        score = self.linear(x)
        return torch.cat((torch.zeros_like(score), score), -1)


def test_exact_is_the_hessian_of_logistic_regression():
    torch.manual_seed(0)
    model = Logistic().double()
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.arange(20) % 2
    importance = DiagonalFisher(model, "exact").fit([(x, y)]).importance
    p = model.linear(x).sigmoid()
    weight = (p * (1 - p) * x**2).mean(0, keepdim=True)
    torch.testing.assert_close(importance["linear.weight"], weight, rtol=1e-12, atol=0.0)

    def loss(weight):
        score = functional.linear(x, weight, model.linear.bias)[:, 0]
        return functional.binary_cross_entropy_with_logits(score, y.double())

    hessian = (
        torch.autograd.functional.hessian(loss, model.linear.weight.detach()).view(5, 5).diagonal()
    )
    torch.testing.assert_close(importance["linear.weight"][0], hessian, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(
        importance["linear.bias"], (p * (1 - p)).mean(0), rtol=1e-12, atol=0.0
    )


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("shape", [(9, 3), (9, 4, 3)], ids=["classes", "sequences"])
def test_exact_is_the_closed_form_of_a_linear_softmax(shape, chunk_size):
    """Omega_cd = mean over samples of the sum over positions of p_c (1 - p_c) x_d^2."""
    torch.manual_seed(1)
    model = nn.Linear(3, 6).double()
    x = torch.randn(shape, dtype=torch.float64)
    y = torch.zeros(shape[:-1], dtype=torch.int64)
    importance = DiagonalFisher(model, "exact", chunk_size=chunk_size).fit([(x, y)]).importance
    p = model(x).softmax(-1)
    scale = (p * (1 - p)).view(9, -1, 6)
    weight = torch.einsum("ntc,ntd->cd", scale, x.view(9, -1, 3) ** 2) / 9
    torch.testing.assert_close(importance["weight"], weight, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(importance["bias"], scale.sum((0, 1)) / 9, rtol=1e-12, atol=0.0)


@pytest.fixture(scope="module")
def trained():
    """A classifier trained to a low loss, whose own labels seldom surprise it, and its data."""
    torch.manual_seed(2)
    centres = 2.0 * torch.randn(5, 8)
    y = torch.arange(60) % 5
    x = centres[y] + torch.randn(60, 8)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x, y


def error_after(model, batch, estimator, passes, exact, seed, chunk_size):
    fisher = DiagonalFisher(
        model, estimator, chunk_size=chunk_size, generator=torch.Generator().manual_seed(seed)
    ).fit([batch] * passes)
    difference = sum((fisher.importance[n] - e).square().sum() for n, e in exact.items())
    return (difference / sum(e.square().sum() for e in exact.values())).sqrt().item()


def root_mean_square(errors):
    return (sum(e * e for e in errors) / len(errors)) ** 0.5


def test_sketch_and_mc_converge_and_sketch_is_closer(trained):
    model, x, y = trained
    exact = DiagonalFisher(model, "exact", chunk_size=60).fit([(x, y)]).importance
    error = {
        (estimator, passes): root_mean_square(
            [error_after(model, (x, y), estimator, passes, exact, seed, 60) for seed in range(8)]
        )
        for estimator in ("sketch", "mc")
        for passes in (4, 64)
    }
    for estimator in ("sketch", "mc"):
        # 16 times the samples: a quarter of the error, were there no bias left over.
        assert 2.5 < error[estimator, 4] / error[estimator, 64] < 6.0
    for passes in (4, 64):
        assert error["sketch", passes] < 0.7 * error["mc", passes]


@pytest.mark.parametrize("estimator", ["sketch", "mc"])
def test_sequence_square_is_unbiased_for_the_token_sum(tied_gpt, tokens, estimator):
    """Were the draws of two positions correlated, cross terms would survive the mean."""
    x, y = tokens(2, masked=False)
    x, y = x[:, :4], y[:, :4]
    model = tied_gpt()
    exact = DiagonalFisher(model, "exact", chunk_size=2).fit([(x, y)]).importance
    many = (x.repeat(150, 1), y.repeat(150, 1))
    few, lots = (
        root_mean_square(
            [error_after(model, many, estimator, passes, exact, seed, 300) for seed in (0, 1, 2)]
        )
        for passes in (1, 8)
    )
    assert lots < 0.06
    assert 1.5 < few / lots < 5.0  # sqrt(8) = 2.8


def mc_label(p, uniform):
    return int(sampled_labels(p[None], torch.tensor([uniform], dtype=torch.float64)))


def test_mc_never_draws_an_impossible_label():
    p = torch.tensor([0.0, 0.5, 0.4999999, 0.0])  # sums to a little less than 1, as softmax may
    assert mc_label(p, 0.0) == 1
    assert mc_label(p, 1.0 - 1e-12) == 2


def test_mc_tells_rare_labels_apart():
    p = torch.full((2001,), 1e-9)
    p[0] = 1.0
    assert mc_label(p, 0.5) == 0
    assert abs(mc_label(p, (1.0 + 1000.5e-9) / (1.0 + 2000e-9)) - 1001) <= 1
