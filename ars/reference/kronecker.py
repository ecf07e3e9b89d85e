r"""The quadratic penalty with a Kronecker-factored weight, eq. (12)."""

from torch import Tensor

from ars.reference.penalties import Scalar


def kronecker_value(
    delta: Tensor, inputs: Tensor, outputs: Tensor | None, strength: Scalar
) -> Tensor:
    r"""Kronecker penalty :math:`\frac{\lambda}{2} \operatorname{tr}(G D A D^T)` (12), 0-d.

    It is :math:`\frac{\lambda}{2} d^T (G \otimes A) d` with d the rows of D one after the other.

    Args:
        delta: D, the change of a layer's matrix, shape (p, d).
        inputs: A, symmetric and positive semi-definite, (d, d).
        outputs: G, likewise, (p, p); None for the identity.
        strength: lambda >= 0.

    Example:
        >>> import torch
        >>> kronecker_value(torch.ones(1, 2), torch.eye(2), None, strength=3.0)
        tensor(3.)

    References:
        Ritter et al., "Online structured Laplace approximations for overcoming catastrophic
        forgetting", arXiv:1805.07810.
    """
    return 0.5 * (delta * kronecker_gradient(delta, inputs, outputs, strength)).sum()


def kronecker_gradient(
    delta: Tensor, inputs: Tensor, outputs: Tensor | None, strength: Scalar
) -> Tensor:
    r"""Gradient of :func:`kronecker_value`, :math:`\lambda G D A`, shape (p, d).

    Args:
        delta: D, the change of a layer's matrix, shape (p, d).
        inputs: A, symmetric and positive semi-definite, (d, d).
        outputs: G, likewise, (p, p); None for the identity.
        strength: lambda >= 0.

    Example:
        >>> import torch
        >>> kronecker_gradient(torch.ones(1, 2), torch.eye(2), None, strength=3.0)
        tensor([[3., 3.]])
    """
    product = delta @ inputs
    return strength * (product if outputs is None else outputs @ product)
