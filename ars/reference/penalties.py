r"""The quadratic penalties towards an anchor, eqs. (8) to (10) and (12): values and gradients."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ars.reference.scalars import Scalar

Side: TypeAlias = Literal["output", "input"]
Protect: TypeAlias = Literal["inside", "outside"]

SCALED = 64  # elements that share a scale of their uint8 importance


def decode_importance(values: Tensor, scale: Tensor) -> Tensor:
    r"""Expand a compressed importance, :math:`\Omega_i = s_{\lfloor i/64 \rfloor} (q_i / 255)^2`.

    Args:
        values: q, uint8, of the parameter's shape.
        scale: s, float32, one for every 64 elements of the flattened values.

    Returns:
        The importance, float32, of the same shape.

    Example:
        >>> decode_importance(torch.tensor([0, 51, 255], dtype=torch.uint8), torch.tensor([25.0]))
        tensor([ 0.,  1., 25.])
    """
    # By a number on the CPU, torch multiplies CUDA tensors with its rounded reciprocal.
    largest = torch.full((), 255, dtype=scale.dtype, device=values.device)
    root = values.reshape(-1).to(scale.dtype) / largest
    each = scale.repeat_interleave(SCALED)[: root.numel()]
    return (each * root * root).reshape(values.shape)


def ewc_value(param: Tensor, anchor: Tensor, importance: Tensor, strength: Scalar) -> Tensor:
    r"""EWC penalty of one tensor, 0-d: :math:`\frac{\lambda}{2} \sum \Omega (\theta - \theta^*)^2`.

    Computed in the promoted dtype of its arguments (fp32 for a bf16 parameter with fp32 anchor).

    Args:
        param: Parameter, any shape.
        anchor: Where it is pulled to, same shape.
        importance: Omega >= 0, same shape.
        strength: lambda >= 0.

    Example:
        >>> ewc_value(torch.ones(2), torch.zeros(2), torch.tensor([1.0, 3.0]), strength=0.5)
        tensor(1.)

    References:
        Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks",
        arXiv:1612.00796.
    """
    delta = param - anchor
    return 0.5 * strength * (importance * delta * delta).sum()


def ewc_gradient(param: Tensor, anchor: Tensor, importance: Tensor, strength: Scalar) -> Tensor:
    r"""Gradient of :func:`ewc_value`, :math:`\lambda \Omega (\theta - \theta^*)` (8).

    Args:
        param: Parameter, any shape.
        anchor: Where it is pulled to, same shape.
        importance: Omega >= 0, same shape.
        strength: lambda >= 0.

    Example:
        >>> ewc_gradient(torch.ones(2), torch.zeros(2), torch.tensor([1.0, 3.0]), strength=0.5)
        tensor([0.5000, 1.5000])
    """
    # In this order, as a product of strength and importance that overflows is NaN at the anchor.
    return strength * (importance * (param - anchor))


def ewc_proximal(
    param: Tensor,
    anchor: Tensor,
    importance: Tensor,
    metric: Scalar,
    denominator: Scalar = 1.0,
) -> Tensor:
    r"""Proximal EWC step (9).

    .. math:: \theta \leftarrow \theta^* + \frac{\theta - \theta^*}{1 + q / d}
              = \theta - \frac{q}{d + q} (\theta - \theta^*), \qquad q = \text{metric}\, \Omega

    The factor lies in [0, 1], so the step is stable for every strength. It is formed from the end
    that the result is nearer to, and no quotient is larger than 1: where :math:`\Omega` is 0 the
    parameter is what it was, to the bit, and where q is beyond all bounds it is the anchor.

    Args:
        param: Parameter, any shape.
        anchor: Where it is pulled to, same shape.
        importance: Omega >= 0, same shape.
        metric: :math:`\eta \lambda`, a scalar or of the parameter's shape.
        denominator: d, :math:`\sqrt{\hat v} + \epsilon` > 0, likewise.

    Example:
        >>> ewc_proximal(torch.ones(2), torch.zeros(2), torch.tensor([0.0, 3.0]), metric=1.0)
        tensor([1.0000, 0.2500])
    """
    delta = param - anchor
    largest = torch.finfo(delta.dtype).max
    # Infinity times an importance of 0, and infinity through infinity, would be NaN.
    if isinstance(metric, Tensor):
        metric = metric.to(delta.dtype).clamp(max=largest)
    else:
        metric = min(metric, largest)
    if isinstance(denominator, Tensor):
        denominator = denominator.clamp(max=largest)
    q = metric * importance.to(delta.dtype)
    part = delta * (q.clamp(max=denominator) / (denominator + q))
    return torch.where(q > denominator, anchor + part, param - part)


def _penalized_part(delta: Tensor, basis: Tensor, side: Side, protect: Protect) -> Tensor:
    """Return the part of ``delta`` that the penalty restrains, without forming a d x d matrix."""
    if not basis.is_floating_point():  # coordinates: U is columns of the identity
        dim = 0 if side == "output" else 1
        inside = torch.zeros_like(delta).index_copy(dim, basis, delta.index_select(dim, basis))
    elif side == "output":
        inside = basis @ (basis.T @ delta)
    else:
        inside = (delta @ basis) @ basis.T
    return inside if protect == "inside" else delta - inside


def subspace_value(
    delta: Tensor, basis: Tensor, strength: Scalar, *, side: Side, protect: Protect
) -> Tensor:
    r"""Subspace penalty :math:`R = \gamma \|Q \Delta W\|_F^2` (10), 0-d.

    With :math:`P = U U^T`: ``protect="inside"`` restrains :math:`Q = P`, ``"outside"``
    :math:`Q = I - P`; ``side="output"`` multiplies from the left (rows of W), ``"input"`` from the
    right (columns).

    Args:
        delta: Weight minus anchor, shape (rows, columns).
        basis: U with orthonormal columns, shape (rows, k) or (columns, k) by ``side``; or the
            indices of k different coordinates, shape (k,), int64, for U made of unit vectors.
        strength: gamma >= 0.
        side: Which side of the weight the subspace lies on.
        protect: Which part of the change is penalised.

    Returns:
        The penalty, 0-d.

    Example:
        >>> first = torch.tensor([0])  # the first coordinate
        >>> subspace_value(torch.ones(2, 3), first, 2.0, side="output", protect="inside")
        tensor(6.)
    """
    part = _penalized_part(delta, basis, side, protect)
    return strength * (part * part).sum()


def subspace_gradient(
    delta: Tensor, basis: Tensor, strength: Scalar, *, side: Side, protect: Protect
) -> Tensor:
    r"""Gradient of :func:`subspace_value`, :math:`2 \gamma Q \Delta W` as Q is a projector.

    Args:
        delta: As for :func:`subspace_value`; likewise the others.
        basis: U.
        strength: gamma >= 0.
        side: Which side of the weight the subspace lies on.
        protect: Which part of the change is penalised.

    Example:
        >>> first = torch.tensor([0])
        >>> subspace_gradient(torch.ones(2, 1), first, 2.0, side="output", protect="inside")
        tensor([[4.],
                [0.]])
    """
    return 2 * strength * _penalized_part(delta, basis, side, protect)


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
        >>> kronecker_gradient(torch.ones(1, 2), torch.eye(2), None, strength=3.0)
        tensor([[3., 3.]])
    """
    product = delta @ inputs
    return strength * (product if outputs is None else outputs @ product)
