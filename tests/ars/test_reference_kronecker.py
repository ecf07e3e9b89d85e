"""The Kronecker penalty against the whole matrix G (x) A."""

import pytest
import torch

from ars.reference import kronecker_gradient, kronecker_value


@pytest.mark.parametrize("identity", [False, True])
def test_value_and_gradient(identity: bool) -> None:
    a, g = torch.randn(4, 4).double(), torch.randn(3, 3).double()
    a, g = a @ a.T, torch.eye(3).double() if identity else g @ g.T
    delta = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    outputs = None if identity else g
    value = kronecker_value(delta, a, outputs, 0.7)
    flat = delta.detach().flatten()
    torch.testing.assert_close(value.detach(), 0.35 * flat @ torch.kron(g, a) @ flat)
    (expected,) = torch.autograd.grad(value, delta)
    torch.testing.assert_close(kronecker_gradient(delta.detach(), a, outputs, 0.7), expected)
