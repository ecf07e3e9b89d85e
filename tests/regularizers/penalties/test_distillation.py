"""Distillation against the definition of the divergence in float64."""

import copy
import math

import pytest
import torch
from torch import nn

from ars.regularizers import Distillation, distillation_loss


def closed_form(logits, teacher, temperature):
    """T^2 sum_c p* (log p* - log p), averaged over all positions."""
    p, q = (torch.softmax(z.double() / temperature, -1) for z in (logits, teacher))
    return temperature**2 * (q * (q.log() - p.log())).sum(-1).mean()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_value_and_gradient_are_those_of_the_definition(shape, temperature):
    logits, teacher = torch.randn(2, *shape).double()
    logits.requires_grad_()
    loss = distillation_loss(logits, teacher, temperature)
    expected = closed_form(logits, teacher, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    ours, theirs = (torch.autograd.grad(x, logits)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


def test_gradient_tends_to_one_that_does_not_depend_on_the_temperature():
    """(z - z*) centred, over C: what the factor T^2 is for."""
    logits, teacher = torch.randn(2, 1, 5).double()
    logits.requires_grad_()
    delta = (logits - logits.mean()) - (teacher - teacher.mean())
    for temperature in (1e3, 1e4):
        (gradient,) = torch.autograd.grad(distillation_loss(logits, teacher, temperature), logits)
        torch.testing.assert_close(gradient, (delta / 5).detach(), rtol=1e-2, atol=1e-3)


def test_masked_positions_do_not_count():
    logits, teacher = torch.randn(2, 3, 4, 5).double()
    mask = torch.rand(3, 4) < 0.5
    assert 0 < mask.sum() < 12
    loss = distillation_loss(logits, teacher, mask=mask)
    expected = closed_form(logits[mask], teacher[mask], 2.0)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    assert distillation_loss(logits, teacher, mask=torch.zeros_like(mask)).item() == 0.0


def test_half_precision_is_computed_in_float32():
    logits, teacher = torch.randn(2, 3, 50).bfloat16()
    loss = distillation_loss(logits, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(closed_form(logits, teacher, 2.0).item(), rel=1e-5)


def test_certain_predictions_stay_finite():
    logits = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = distillation_loss(logits, -logits.detach(), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert logits.grad.isfinite().all()


def test_penalty_runs_the_teacher_as_it_is_in_evaluation():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.9), nn.Linear(4, 6)).double()
    penalty = Distillation(copy.deepcopy(model), strength=0.5, temperature=3.0)
    inputs, targets = torch.randn(8, 3).double(), torch.tensor([0, -100] * 4)
    with torch.no_grad():
        expected = penalty.teacher.eval()(inputs)
    penalty.teacher.train()
    assert penalty.value(inputs, expected).item() == 0.0
    grown = nn.Linear(3, 9).double()  # with three new classes
    value = penalty.value(inputs, grown(inputs), targets)
    theirs = 0.5 * closed_form(grown(inputs)[::2, :6], expected[::2], 3.0)
    torch.testing.assert_close(value, theirs, rtol=1e-12, atol=1e-14)
    value.backward()
    assert grown.weight.grad[:6].abs().max() > 0
    assert not grown.weight.grad[6:].any()
    assert all(p.grad is None for p in penalty.teacher.parameters())
    assert all(module.training for module in penalty.teacher.modules())


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((torch.ones(2, 3), torch.ones(2, 4)), ValueError, r"shape \(2, 3\), the teacher's \(2, 4"),
        ((torch.ones(0, 3), torch.ones(0, 3)), ValueError, r"shape \(0, 3\) are empty"),
        ((torch.ones(2, 3), torch.ones(2, 3), 0.0), ValueError, "temperature must be from"),
        ((torch.ones(2, 3), torch.ones(2, 3), math.inf), ValueError, "temperature must be from"),
    ],
)
def test_refuses_wrong_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        distillation_loss(*arguments)


def test_refuses_wrong_masks_and_settings():
    z = torch.ones(2, 3)
    with pytest.raises(TypeError, match=r"mask must be bool, got torch.int64"):
        distillation_loss(z, z, mask=torch.ones(2).long())
    with pytest.raises(ValueError, match=r"mask has shape \(3,\), the positions \(2,\)"):
        distillation_loss(z, z, mask=torch.ones(3).bool())
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got Tensor"):
        Distillation(z)
    with pytest.raises(ValueError, match="strength must be finite"):
        Distillation(nn.Linear(1, 1), strength=-1.0)
    penalty = Distillation(nn.Linear(1, 4))
    with pytest.raises(ValueError, match="strength must be finite"):
        penalty.strength = math.nan
    assert penalty.strength == 1.0
    with pytest.raises(ValueError, match=r"shape \(2, 3\), the teacher's \(2, 4\)"):
        penalty.value(torch.ones(2, 1), z)
    for temperature in (-1.0, 0.0, 1e-320, 1e-4, 1e5, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"temperature must be from 0\.001 to 10000, got"):
            Distillation(nn.Linear(1, 1), temperature=temperature)
