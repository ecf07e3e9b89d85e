"""Importances from the second moments of an Adam."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from ars import ARSAdamW, ARSConfig
from ars.regularizers import DiagonalFisher


@pytest.mark.parametrize("ours", [False, True])
def test_adam_is_its_corrected_second_moment(ours):
    torch.manual_seed(0)
    model = nn.Linear(3, 2).bfloat16() if ours else nn.Linear(3, 2)
    beta = 0.9
    if ours:
        opt = ARSAdamW(model.parameters(), betas=(0.8, beta), ars=ARSConfig.paper())
    else:
        opt = torch.optim.AdamW(model.parameters(), betas=(0.8, beta))
    average = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in model.named_parameters()}
    weight = 0.0
    for _ in range(5):
        opt.zero_grad()
        loss = model(torch.randn(4, 3).to(model.weight)).float().square().mean()
        loss.backward()
        opt.step(loss=loss) if ours else opt.step()
        effective = beta
        if ours:  # the controller moves the betas
            effective = float(opt.diagnostics["beta2"])
        weight = 1 - (1 - weight) * effective
        for n, p in model.named_parameters():
            average[n] = effective * average[n] + (1 - effective) * p.grad.float() ** 2
    fisher = DiagonalFisher.from_optimizer(model, opt, scale=4.0, dtype=torch.float32)
    for n, t in average.items():
        torch.testing.assert_close(fisher.importance[n], 4.0 * t / weight, rtol=1e-4, atol=0.0)
    assert fisher.n_samples == 5
    assert fisher.estimator == "adam"


def test_products_that_torch_carried_along_are_not_used():
    model = nn.Linear(3, 2)
    ours = ARSAdamW(model.parameters(), ars=ARSConfig.paper())
    theirs = torch.optim.AdamW(model.parameters())
    for step in range(6):
        opt = ours if step < 4 else theirs
        if step == 4:
            theirs.load_state_dict(ours.state_dict())
        opt.zero_grad()
        model(torch.ones(4, 3)).square().mean().backward()
        opt.step()
    assert "beta_products" in theirs.state[model.weight]
    fisher = DiagonalFisher.from_optimizer(model, theirs, dtype=torch.float32)
    expected = theirs.state[model.weight]["exp_avg_sq"] / (1 - 0.999**6)
    torch.testing.assert_close(fisher.importance["weight"], expected)


def test_adam_of_single_samples_is_the_empirical_fisher(relative_error):
    """Near a stationary point beta2 close to 1 averages squares; scale undoes the batch's mean."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(64, 3, dtype=torch.float64), torch.arange(64) % 2
    opt = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.0, 1 - 1e-9))
    for xs, ys in zip(x, y, strict=True):
        opt.zero_grad()
        functional.cross_entropy(model(xs[None]), ys[None]).backward()
        opt.step()
    fisher = DiagonalFisher.from_optimizer(model, opt)
    expected = DiagonalFisher(model, "empirical").fit([(x, y)]).importance
    assert relative_error(fisher.importance, expected) < 1e-6


def test_adam_refuses_what_it_cannot_read():
    model = nn.Linear(3, 2)
    opt = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="no 'exp_avg_sq' of 'weight'"):
        DiagonalFisher.from_optimizer(model, opt)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    sgd.step()
    opt.step()
    with pytest.raises(ValueError, match=r"SGD holds no 'exp_avg_sq'.*requires_grad=False"):
        DiagonalFisher.from_optimizer(model, sgd)
    with pytest.raises(ValueError, match="Adam holds no 'exp_avg_sq' of 'weight'"):
        DiagonalFisher.from_optimizer(nn.Linear(3, 2), opt)
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer, got Linear"):
        DiagonalFisher.from_optimizer(model, model)
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="scale must be finite and > 0"):
            DiagonalFisher.from_optimizer(model, opt, scale=scale)
    with pytest.raises(TypeError, match="scale must be a number"):
        DiagonalFisher.from_optimizer(model, opt, scale="8")
    with pytest.raises(ValueError, match=r"from_optimizer\(model, opt\)"):
        DiagonalFisher(model, "adam").fit([(torch.ones(1, 3), torch.tensor([0]))])
