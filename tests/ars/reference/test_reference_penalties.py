"""EWC, subspace and Kronecker penalties against closed forms, dense matrices and autograd."""

import pytest
import torch

from ars import reference


def test_ewc_by_hand():
    param, anchor = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 4.0])
    importance = torch.tensor([9.0, 0.5, 2.0])
    assert float(reference.ewc_value(param, anchor, importance, 10.0)) == 20.0
    assert reference.ewc_gradient(param, anchor, importance, 10.0).tolist() == [0.0, 10.0, -20.0]


@pytest.mark.parametrize("protect", ["inside", "outside"])
@pytest.mark.parametrize("side", ["output", "input"])
def test_subspace_equals_the_dense_projector(side, protect):
    delta = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    size = 6 if side == "output" else 9
    basis = torch.linalg.qr(torch.randn(size, 3, dtype=torch.float64)).Q
    projector = basis @ basis.T
    if protect == "outside":
        projector = torch.eye(size, dtype=torch.float64) - projector
    part = projector @ delta if side == "output" else delta @ projector
    expected = 0.7 * torch.trace(part @ part.T)
    value = reference.subspace_value(delta, basis, 0.7, side=side, protect=protect)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(expected, delta)
    torch.testing.assert_close(
        reference.subspace_gradient(delta.detach(), basis, 0.7, side=side, protect=protect),
        gradient, rtol=1e-11, atol=1e-14,
    )  # fmt: skip


def test_inside_and_outside_add_up():
    delta, basis = torch.randn(5, 4).double(), torch.linalg.qr(torch.randn(4, 2).double()).Q
    parts = [
        reference.subspace_value(delta, basis, 1.0, side="input", protect=protect)
        for protect in ("inside", "outside")
    ]
    torch.testing.assert_close(sum(parts), delta.square().sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("identity", [False, True])
def test_kronecker_value_and_gradient_of_the_whole_matrix(identity: bool) -> None:
    a, g = torch.randn(4, 4).double(), torch.randn(3, 3).double()
    a, g = a @ a.T, torch.eye(3).double() if identity else g @ g.T
    delta = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    outputs = None if identity else g
    value = reference.kronecker_value(delta, a, outputs, 0.7)
    flat = delta.detach().flatten()
    torch.testing.assert_close(value.detach(), 0.35 * flat @ torch.kron(g, a) @ flat)
    (expected,) = torch.autograd.grad(value, delta)
    torch.testing.assert_close(
        reference.kronecker_gradient(delta.detach(), a, outputs, 0.7), expected
    )
