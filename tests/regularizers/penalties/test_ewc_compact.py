"""EWC with the anchor in bfloat16 and the importance in bfloat16 or uint8."""

import pytest
import torch
from ewc_models import move, random_importance, small_model
from torch import nn

from ars.regularizers import EWC, dequantize, quantize


def compact(model, **options):
    return EWC(model, random_importance(model), 3.0, storage="compact", **options)


def test_terms_hold_what_the_codec_made():
    model = small_model()
    importance = random_importance(model)
    for name, (p, anchor, values, scale) in zip(importance, compact(model).terms(), strict=True):
        expected = quantize(importance[name])
        assert p is dict(model.named_parameters())[name]
        assert torch.equal(anchor, p.detach().bfloat16())
        assert torch.equal(values, expected.values)
        assert torch.equal(scale, expected.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_are_those_of_what_is_stored(dtype):
    model = small_model(dtype)
    penalty = compact(model)
    move(model)
    value = penalty.value()
    value.backward()
    total = 0.0
    for p, anchor, values, scale in penalty.terms():
        delta = p.detach().double() - anchor.double()
        omega = dequantize(values, scale).double()
        total += 1.5 * float((omega * delta**2).sum())
        expected = (3.0 * omega * delta).to(dtype)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2  # one rounding to bfloat16
        torch.testing.assert_close(p.grad, expected, rtol=tolerance, atol=0.0)
    assert value.item() == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize(
    ("storage", "expected"), [("full", 8), ("bfloat16", 4), ("compact", 3.0625)]
)
def test_bytes_a_parameter(storage, expected):
    model = nn.Linear(256, 256, bias=False)
    ((p, *stored),) = EWC(model, {"weight": torch.rand(256, 256)}, storage=storage).terms()
    assert sum(t.numel() * t.element_size() for t in stored) / p.numel() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_terms_are_rounded_once_and_computed_in_float32(dtype):
    model = nn.Conv2d(2, 4, 3).to(dtype).to(memory_format=torch.channels_last)
    importance = random_importance(model)
    penalty = EWC(model, importance, 3.0, storage="bfloat16")
    move(model)
    value = penalty.value()
    value.backward()
    total = 0.0
    for (name, omega), (p, anchor, stored) in zip(importance.items(), penalty.terms(), strict=True):
        assert anchor.dtype == stored.dtype == torch.bfloat16
        assert anchor.stride() == stored.stride() == p.stride()
        assert torch.equal(stored, omega.float().bfloat16()), name
        delta = p.detach().double() - anchor.double()
        total += 1.5 * float((stored.double() * delta**2).sum())
        expected = (3.0 * stored.double() * delta).to(dtype)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2  # one rounding to bfloat16
        torch.testing.assert_close(p.grad, expected, rtol=tolerance, atol=0.0)
    assert value.item() == pytest.approx(total, rel=1e-6)


def test_decay_is_computed_in_float32():
    model = nn.Linear(64, 64, bias=False)
    first, second = torch.rand(2, 64, 64)
    penalty = EWC(model, {"weight": first}, storage="bfloat16")
    stored = penalty.importance["weight"].float()
    penalty.consolidate({"weight": second}, decay=0.9)
    expected = (stored * 0.9 + second).bfloat16()
    assert torch.equal(penalty.importance["weight"], expected)


def test_is_close_to_full_storage():
    model = small_model(torch.bfloat16)  # whose anchor bfloat16 holds exactly
    full, small = EWC(model, random_importance(model), 3.0), compact(model)
    move(model)
    assert small.value().item() == pytest.approx(full.value().item(), rel=0.01)


def test_further_tasks_keep_the_addresses():
    model = small_model(torch.bfloat16)
    full, small = EWC(model, random_importance(model), 3.0), compact(model)
    addresses = [t.data_ptr() for term in small.terms() for t in term]
    for seed in range(2):
        move(model, seed=seed)
        for penalty in (full, small):
            penalty.consolidate(random_importance(model, seed=seed), decay=0.5)
    move(model, seed=7)
    for penalty in (full, small):
        penalty.add_task(random_importance(model, seed=8))
    move(model, seed=9)
    assert [t.data_ptr() for term in small.terms() for t in term] == addresses
    assert small.value().item() == pytest.approx(full.value().item(), rel=0.02)
    assert small.constant == pytest.approx(full.constant, rel=0.02)


def test_refuses_what_it_cannot_store():
    model = nn.Conv2d(2, 4, 3, bias=False).to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"'weight' is not contiguous, .* use storage='bfloat16'"):
        EWC(model, {"weight": torch.rand(4, 2, 3, 3)}, storage="compact")
    with pytest.raises(ValueError, match=r"unknown storage 'tiny'; choose one of \['full', 'bflo"):
        EWC(model, {"weight": torch.rand(4, 2, 3, 3)}, storage="tiny")
