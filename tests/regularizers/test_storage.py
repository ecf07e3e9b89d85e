"""uint8 importances: the stated error, exact zeros and maxima, and the Fisher's storage."""

import pytest
import torch
from torch import nn

from ars.regularizers import DiagonalFisher, Quantized, dequantize, quantize


def heavy_tailed(*shape):
    """Squares of normal numbers over twelve decades, with a tenth of zeros."""
    values = torch.randn(shape).square() * 10 ** (12 * torch.rand(shape) - 12)
    return values * (torch.rand(shape) > 0.1)


@pytest.mark.parametrize(
    "shape", [(), (1,), (63,), (64,), (65,), (7, 33), (3, 5, 64), (0,), (0, 3)]
)
def test_error_is_within_the_stated_bound(shape):
    omega = heavy_tailed(*shape)
    values, scale = quantize(omega)
    assert values.shape == omega.shape
    assert values.dtype == torch.uint8
    assert values.is_contiguous()
    assert scale.shape == ((omega.numel() + 63) // 64,)
    assert scale.dtype == torch.float32
    back = dequantize(values, scale)
    flat = omega.flatten().double()
    each = scale.double().repeat_interleave(64)[: omega.numel()]
    r = (flat / each.clamp(min=1e-300)).sqrt()
    bound = each * (2 * r + 1 / 510) / 510
    error = (back.flatten().double() - flat).abs()
    assert (error <= bound + 1e-6 * flat).all()
    assert (back[omega == 0] == 0).all()


def test_zeros_and_maxima_are_exact_and_blocks_are_apart():
    omega = heavy_tailed(256)
    omega[64:128] = 0
    omega[128:192] *= 1e-20
    values, scale = quantize(omega)
    back = dequantize(values, scale).view(4, 64)
    assert torch.equal(back.amax(1), omega.view(4, 64).amax(1))
    assert torch.equal(scale, omega.view(4, 64).amax(1))
    assert (back[1] == 0).all()
    assert (back[2] > 0).sum() > 10  # a large neighbour does not drown it
    assert (values.view(4, 64)[0] == 255).sum() == 1


def test_formula_of_the_fused_step():
    omega = heavy_tailed(5, 40)
    values, scale = quantize(omega)
    q = values.flatten()
    by_hand = [scale[i // 64] * (q[i].float() / 255) ** 2 for i in range(200)]
    torch.testing.assert_close(dequantize(values, scale), torch.stack(by_hand).view(5, 40))


def test_the_smallest_and_largest_floats():
    tiny = torch.full((3,), 1e-44)
    assert (dequantize(*quantize(tiny)) == tiny).all()
    large = torch.full((3,), 3e38)
    torch.testing.assert_close(dequantize(*quantize(large)), large)


def test_flattens_in_the_logical_order_of_a_transposed_tensor():
    omega = heavy_tailed(64, 9).t()
    values, scale = quantize(omega)
    assert torch.equal(values, quantize(omega.contiguous()).values)
    assert torch.equal(scale, quantize(omega.contiguous()).scale)


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf"), 1e300])
def test_refuses_what_is_no_importance(value):
    omega = torch.ones(70, dtype=torch.float64)
    omega[69] = value
    with pytest.raises(ValueError, match="negative or not finite in float32"):
        quantize(omega)


def test_refuses_wrong_dtypes_and_shapes():
    values, scale = quantize(torch.ones(70))
    with pytest.raises(TypeError, match="quantized already"):
        quantize(values)
    with pytest.raises(TypeError, match="uint8 values"):
        dequantize(values.int(), scale)
    with pytest.raises(TypeError, match="float32 scale"):
        dequantize(values, scale.double())
    with pytest.raises(ValueError, match=r"70 values need a scale of shape \(2,\), got \(1,\)"):
        dequantize(values, scale[:1])


def fitted(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3))
    batch = torch.randn(30, 6), torch.arange(30) % 3
    return DiagonalFisher(model, "empirical", dtype=dtype).fit([batch])


def test_a_fisher_is_stored_in_the_dtype_asked_for():
    exact = fitted(None).importance
    for name, tensor in fitted(torch.float32).importance.items():
        assert torch.equal(tensor, exact[name])
    for name, tensor in fitted(torch.bfloat16).importance.items():
        assert tensor.dtype == torch.bfloat16  # rounded once, after the sum
        assert torch.equal(tensor, exact[name].bfloat16())
    compact = fitted(torch.uint8)
    for name, stored in compact.quantized.items():
        assert isinstance(stored, Quantized)
        assert torch.equal(stored.values, quantize(exact[name]).values)
        assert torch.equal(compact.importance[name], dequantize(*stored))
    nbytes = sum(t.nbytes for stored in compact.quantized.values() for t in stored)
    numel = sum(t.numel() for t in exact.values())
    assert nbytes <= (1 + 4 / 64) * numel + 4 * len(exact)


def test_quantized_belongs_to_uint8():
    with pytest.raises(RuntimeError, match=r"dtype=torch\.uint8"):
        _ = fitted(torch.bfloat16).quantized
    with pytest.raises(RuntimeError, match="call fit"):
        _ = DiagonalFisher(nn.Linear(2, 2), dtype=torch.uint8).quantized
    with pytest.raises(ValueError, match=r"stored in torch\.float16"):
        DiagonalFisher(nn.Linear(2, 2), dtype=torch.float16)
