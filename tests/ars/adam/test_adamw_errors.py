"""Bad input: a clear error that names the thing, before anything has changed."""

import math

import pytest
import torch
from optimizers import Pull, gradients, parameters

from ars import ARSAdamW, ARSConfig


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"lr": -1.0}, ValueError, "Invalid learning rate"),
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
        ({"penalty": object()}, TypeError, "penalty object has no 'strength'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_constructor_refuses(settings, error, match):
    with pytest.raises(error, match=match):
        ARSAdamW(parameters(), **settings)


def test_no_parameters():
    with pytest.raises(ValueError, match="empty parameter list"):
        ARSAdamW([])


@pytest.mark.parametrize("explicit", [{"foreach": True}, {"fused": True}])
def test_explicit_choice_does_not_fall_back(explicit):
    param = torch.empty(3, device="meta", requires_grad=True)
    optimizer = ARSAdamW([param], **explicit)
    param.grad = torch.empty_like(param)
    with pytest.raises(RuntimeError, match="meta"):  # as torch does, not before the step
        optimizer.step()


def pulling(**changes):
    params = parameters(shapes=((4,), (3, 2)))
    penalty = Pull(params)
    for name, value in changes.items():
        setattr(penalty, name, value)
    return params, penalty


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mode": "soft"}, "mode must be 'coupled' or 'proximal', got 'soft'"),
        ({"strength": -1.0}, "strength must be finite and >= 0, got -1.0"),
        ({"strength": math.inf}, "strength must be finite"),
    ],
)
def test_penalty_settings(changes, match):
    params, penalty = pulling(**changes)
    with pytest.raises(ValueError, match=match):
        ARSAdamW(params, penalty=penalty)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (
            lambda p: (p[1], torch.zeros(3, 3), torch.zeros(3, 2)),
            r"anchor of b.*\(3, 3\).*\(3, 2\)",
        ),
        (lambda p: (p[1], torch.zeros(3, 2), torch.zeros(6)), r"importance of b has shape \(6,\)"),
        (lambda p: (p[1], p[1], torch.zeros(3, 2).int()), "importance of b must be floating"),
        (lambda p: (p[1], p[1], torch.zeros(3, 2, device="meta")), "importance of b is on meta"),
        (
            lambda p: (torch.zeros(5), torch.zeros(5), torch.zeros(5)),
            r"shape \(5,\) .* not from a copy",
        ),
    ],
)
def test_penalty_terms(row, match):
    params, penalty = pulling()
    penalty.rows = [row(params)]
    named = list(zip("ab", params, strict=True))
    with pytest.raises(ValueError, match=match):
        ARSAdamW(named, penalty=penalty)


def test_penalty_of_a_complex_parameter():
    """A real anchor of its shape would be broadcast over real and imaginary parts."""
    wave = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    _, penalty = pulling()
    penalty.rows = [(wave, torch.zeros(2), torch.ones(2))]
    with pytest.raises(ValueError, match=r"wave is complex, and only real .*: leave it out"):
        ARSAdamW([("wave", wave)], penalty=penalty)


def test_penalty_with_two_terms_for_one_parameter():
    params, penalty = pulling()
    penalty.rows *= 2
    with pytest.raises(ValueError, match="two terms for parameter 0 of group 0"):
        ARSAdamW(params, penalty=penalty)


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


def test_sparse_gradients():
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = ARSAdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="an embedding with sparse=False"):
        optimizer.step()
    assert not optimizer.state[embedding.weight].get("step")


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
