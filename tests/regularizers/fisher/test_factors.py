"""The nearest Kronecker product against a singular value decomposition of the rearranged sum."""

import pytest
import torch
from torch import Tensor

from ars.regularizers.fisher.kronecker import KroneckerFactors, nearest_product


def moment(size: int, rank: int) -> Tensor:
    rows = torch.randn(size, rank, dtype=torch.float64)
    return rows @ rows.T


def kron(factors: KroneckerFactors) -> Tensor:
    return torch.kron(factors.outputs, factors.inputs)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_it_is_the_leading_singular_term(scale: float) -> None:
    first = KroneckerFactors(moment(4, 4), moment(3, 2))
    second = KroneckerFactors(moment(4, 2), scale * moment(3, 3))
    rearranged = torch.outer(first.outputs.flatten(), first.inputs.flatten())
    rearranged += torch.outer(second.outputs.flatten(), second.inputs.flatten())
    u, s, v = torch.linalg.svd(rearranged)
    best = s[0] * torch.outer(u[:, 0], v[0])
    found = nearest_product(first, second)
    actual = torch.outer(found.outputs.flatten(), found.inputs.flatten())
    torch.testing.assert_close(actual, best, rtol=1e-8, atol=1e-12 * best.abs().max().item())
    for factor in found:
        assert torch.linalg.eigvalsh(factor)[0] > -1e-12 * factor.abs().max()


def test_it_is_exact_where_one_factor_is_shared() -> None:
    shared = moment(3, 3)
    a, b = moment(4, 2), moment(4, 3)
    found = nearest_product(KroneckerFactors(a, shared), KroneckerFactors(b, 2 * shared))
    torch.testing.assert_close(kron(found), torch.kron(shared, a + 2 * b))
    found = nearest_product(KroneckerFactors(shared, a), KroneckerFactors(3 * shared, b))
    torch.testing.assert_close(kron(found), torch.kron(a + 3 * b, shared))


def test_orthogonal_products_of_one_size_leave_one_of_them_or_a_mixture() -> None:
    one, two = torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))
    found = nearest_product(KroneckerFactors(one, one), KroneckerFactors(two, two))
    error = kron(found) - torch.kron(one, one) - torch.kron(two, two)
    assert error.square().sum() == pytest.approx(1.0, abs=1e-6)  # that of keeping either


def test_a_product_that_is_zero_changes_nothing() -> None:
    zero = torch.zeros(3, 3, dtype=torch.float64)
    some = KroneckerFactors(moment(3, 3), moment(3, 3))
    for nothing in (KroneckerFactors(zero, zero), KroneckerFactors(zero, some.outputs)):
        torch.testing.assert_close(kron(nearest_product(some, nothing)), kron(some))
        torch.testing.assert_close(kron(nearest_product(nothing, some)), kron(some))
        assert not kron(nearest_product(nothing, nothing)).any()


def test_small_float32_factors_keep_their_precision() -> None:
    """Gradients of a trained model square to 1e-20, and their inner products to 1e-40."""
    first = KroneckerFactors(moment(4, 4).float(), 1e-20 * moment(3, 3).float())
    second = KroneckerFactors(moment(4, 4).float(), 1e-20 * moment(3, 3).float())
    found = nearest_product(first, second)
    wide = [KroneckerFactors(f.inputs.double(), f.outputs.double()) for f in (first, second)]
    torch.testing.assert_close(
        kron(found).double(), kron(nearest_product(*wide)), rtol=1e-4, atol=1e-27
    )
    assert found.inputs.dtype == found.outputs.dtype == torch.float32
