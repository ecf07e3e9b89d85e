"""Bad input: a clear error that names the thing, before anything has changed."""

import math

import pytest
import torch
from optimizers import gradients, parameters

from ars import ARSAdamW, ARSConfig


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"lr": -1.0}, ValueError, "Invalid learning rate"),
        ({"lr": "1e-3"}, TypeError, "lr must be a number, got the text '1e-3'"),
        ({"weight_decay": "0"}, TypeError, "weight_decay must be a number, got the text '0'"),
        ({"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
        ({"eps": -1.0}, ValueError, "Invalid epsilon"),
        ({"weight_decay": -1.0}, ValueError, "Invalid weight_decay value: -1"),
        ({"ars": {"window": 10}}, TypeError, "ars must be an ARSConfig or None"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be > 0"),
        ({"max_grad_norm": math.nan}, ValueError, "max_grad_norm must be > 0"),
        ({"max_grad_norm": "1"}, TypeError, "max_grad_norm must be a number or None, got '1'"),
        ({"max_grad_norm": torch.ones(())}, TypeError, r"got tensor\(1.\): use float"),
        ({"foreach": True, "fused": True}, RuntimeError, "cannot be `True` together"),
        ({"fused": True, "differentiable": True}, RuntimeError, "does not support"),
        ({"foreach": True, "differentiable": True}, RuntimeError, "foreach.* does not support"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_constructor_refuses(settings, error, match):
    with pytest.raises(error, match=match):
        ARSAdamW(parameters(), **settings)


def test_a_model_is_no_list_of_parameters():
    with pytest.raises(TypeError, match=r"params is a model, Linear: .* model.parameters\(\)"):
        ARSAdamW(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("loss", "error", "match"),
    [
        (torch.ones(3), ValueError, r"scalar, got shape \(3,\): reduce it"),
        ("1.0", TypeError, "got str"),
        (torch.tensor(1j), TypeError, "loss must be real, is torch.complex64: pass its .abs()"),
    ],
)
def test_loss_is_checked_before_anything_moves(loss, error, match):
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = ARSAdamW(params)
    gradients(params, 0)
    with pytest.raises(error, match=match):
        optimizer.step(loss=loss)
    assert all(map(torch.equal, params, before))
    assert not optimizer.state


def test_the_surprise_may_not_change_its_kind():
    params = parameters()
    optimizer = ARSAdamW(params)
    gradients(params, 0)
    optimizer.step(loss=1.0)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="has watched the loss and now gets the grad_norm"):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    plain = ARSAdamW(params, ars=None)
    plain.step(loss=1.0)
    plain.step()  # nobody watches


@pytest.mark.parametrize("ars", [ARSConfig(), ARSConfig.paper()], ids=["default", "paper"])
def test_nan_in_the_gradient_is_seen_and_not_remembered(ars):
    """As in torch the parameters become NaN; the controller says so and keeps its memory."""
    params = parameters(shapes=((4,),))
    optimizer = ARSAdamW(params, ars=ars)
    gradients(params, 0)
    optimizer.step()
    window = optimizer.controller.window.clone()
    params[0].grad[2] = math.nan
    optimizer.step()
    assert math.isnan(float(optimizer.diagnostics["surprise"]))
    assert float(optimizer.diagnostics["phi"]) == ars.phi_min
    assert torch.equal(optimizer.controller.window, window)
