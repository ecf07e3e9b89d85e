"""EWC.value() as one operation: its derivatives, what it keeps, and the proximal extreme."""

import pytest
import torch
from ewc_models import move, random_importance, small_model
from torch import nn

from ars.reference import ewc_value
from ars.regularizers import EWC


def moved_penalty(dtype=torch.float64, **options):
    model = small_model(dtype)
    penalty = EWC(model, random_importance(model), 3.0, **options)
    move(model)
    return model, penalty


def autograd_value(penalty):
    return sum(
        ewc_value(p, penalty.anchor[name], penalty.importance[name], penalty.strength)
        for name, (p, *_) in zip(penalty.anchor, penalty.terms(), strict=True)
    )


def test_first_and_second_derivatives_are_those_of_autograd():
    model, penalty = moved_penalty()
    params = list(model.parameters())
    directions = [torch.randn_like(p) for p in params]
    results = []
    for value in (penalty.value(), autograd_value(penalty)):
        # Squared, so that the derivative with respect to the incoming gradient counts too.
        first = torch.autograd.grad(value**2, params, create_graph=True)
        product = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
        results.append((value, *first, *torch.autograd.grad(product, params)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    model, penalty = moved_penalty()
    params = tuple(model.parameters())
    assert torch.autograd.gradcheck(lambda *_: penalty.value(), params)
    assert torch.autograd.gradgradcheck(lambda *_: penalty.value(), params)


def test_large_tensors_are_worked_on_in_blocks():
    model = nn.Linear(600, 500).double()
    penalty = EWC(model, random_importance(model), 3.0)
    move(model)
    value = penalty.value()
    assert value.item() == pytest.approx(autograd_value(penalty).item(), rel=1e-12)
    value.backward()
    expected = 3.0 * penalty.importance["weight"] * (model.weight - penalty.anchor["weight"])
    torch.testing.assert_close(model.weight.grad, expected.detach(), rtol=1e-14, atol=0.0)


def test_strides_frozen_parameters_and_half_precision():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Linear(4, 4)).to(memory_format=torch.channels_last)
    model[1].bfloat16()
    penalty = EWC(model, random_importance(model), 2.0)
    move(model)
    model[0].bias.requires_grad_(False)
    penalty.value().backward()
    assert model[0].bias.grad is None
    for name, p in model.named_parameters():
        if p.requires_grad:
            expected = 2.0 * penalty.importance[name] * (p.detach() - penalty.anchor[name])
            assert p.grad.dtype == p.dtype
            torch.testing.assert_close(p.grad, expected.to(p.dtype), rtol=1e-6, atol=0.0)


def test_keeps_only_references_to_the_parameters():
    model, penalty = moved_penalty()
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        penalty.value()
    addresses = {p.data_ptr() for p in model.parameters()}
    assert len(kept) >= len(addresses)
    assert {t.data_ptr() for t in kept if t.ndim} == addresses


def test_a_parameter_changed_before_the_backward_pass_is_an_error():
    model, penalty = moved_penalty()
    value = penalty.value()
    move(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_strength_changed_before_the_backward_pass_does_not_matter():
    model, penalty = moved_penalty()
    penalty.strength = strength = torch.tensor(3.0, dtype=torch.float64)
    value = penalty.value()
    strength.fill_(100.0)
    value.backward()
    expected = 3.0 * penalty.importance["0.weight"] * (
        model[0].weight.detach() - penalty.anchor["0.weight"]
    )  # fmt: skip
    torch.testing.assert_close(model[0].weight.grad, expected, rtol=1e-14, atol=0.0)
