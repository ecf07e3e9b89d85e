r"""Adam and AdamW with betas that change from step to step, eqs. (5) to (7), penalty included."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ars.reference.penalties import ewc_gradient, ewc_proximal
from ars.reference.scalars import Scalar, at_most


class AdamResult(NamedTuple):
    """What one Adam step produces for one tensor.

    Args:
        param: The parameter.
        exp_avg: Its first moment.
        exp_avg_sq: Its second moment.
        max_exp_avg_sq: The running maximum of that; None without amsgrad.
    """

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None


def grad_norm(grads: list[Tensor]) -> Tensor:
    """Euclidean norm of all gradients as one vector, 0-d float64 on the first one's device.

    Args:
        grads: At least one, of any shapes and dtypes; complex ones count as pairs of real numbers.

    Example:
        >>> grad_norm([torch.tensor([3.0]), torch.tensor(4j)])
        tensor(5., dtype=torch.float64)
    """
    device = grads[0].device
    views = [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in grads]
    squares = [torch.linalg.vector_norm(g, dtype=torch.float64).square().to(device) for g in views]
    return torch.stack(squares).sum().sqrt()


def clip_coefficient(norm: Scalar, max_norm: float) -> Any:
    """Factor that clips a gradient of this norm as torch does, ``min(1, max / (norm + 1e-6))``.

    Args:
        norm: The norm, a number or 0-d.
        max_norm: What it is clipped to, > 0.

    Example:
        >>> clip_coefficient(torch.tensor(4.0), 1.0), clip_coefficient(torch.tensor(0.5), 1.0)
        (tensor(0.2500), tensor(1.))
    """
    return at_most(max_norm / (norm + 1e-6), 1.0)


def next_product(
    product: Tensor, product_step: Tensor, step: Tensor, base: Scalar, beta: Scalar
) -> Tensor:
    r"""Advance the product of a beta that changes by one step (6), :math:`B \leftarrow B \beta`.

    A product that is not of the steps taken is out of date: whoever sets a step counter back, or
    lets another Adam go on, advances no product. It is then that of constant betas, a power.

    Args:
        product: B, float64.
        product_step: How many steps it is of, of the same shape.
        step: How many steps have been taken, likewise.
        base: The beta that is neither gated nor changed, in [0, 1).
        beta: This step's beta, in [0, 1).

    Example:
        >>> taken = torch.tensor(2.0)
        >>> float(next_product(torch.tensor(0.25), taken, taken, base=0.5, beta=0.5))
        0.125
        >>> float(next_product(torch.tensor(0.25), taken, torch.tensor(0.0), base=0.5, beta=0.5))
        0.5
    """
    return torch.where(product_step == step, product, base ** step.double()) * beta


def adam_denominator(exp_avg_sq: Tensor, correction2: Scalar, eps: float) -> Tensor:
    r"""Return :math:`\sqrt{v / c_2} + \epsilon`, the metric of Adam (7) and proximal EWC (9).

    Args:
        exp_avg_sq: Second moment v, any shape.
        correction2: Bias correction c2, in (0, 1].
        eps: Added to the root, >= 0.

    Example:
        >>> adam_denominator(torch.tensor([1.0]), 0.25, eps=0.5)
        tensor([2.5000])
    """
    return exp_avg_sq.sqrt() / correction2**0.5 + eps


def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None = None,
    *,
    lr: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    correction1: Scalar,
    correction2: Scalar,
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
    maximize: bool = False,
    clip: Scalar = 1.0,
    anchor: Tensor | None = None,
    importance: Tensor | None = None,
    strength: Scalar = 0.0,
    proximal: bool = False,
    pull: Tensor | None = None,
) -> AdamResult:
    r"""One AdamW step, with the EWC penalty in it, for one tensor.

    .. math::
        g &\leftarrow c\, g + \lambda \Omega (\theta - \theta^*)
                                                        \quad\text{(coupled EWC, 8)} \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2                          \quad (5) \\
        \theta &\leftarrow (1 - \eta w) \theta
            - \eta \frac{m / c_1}{\sqrt{v / c_2} + \epsilon}                \quad (7) \\
        \theta &\leftarrow \theta^* + \frac{\theta - \theta^*}
            {1 + \eta \lambda \Omega / (\sqrt{v / c_2} + \epsilon)}
                                                        \quad\text{(proximal EWC, 9)}

    with :math:`c_i = 1 - B_i`. For betas that change, :math:`B_i \leftarrow B_i \beta_i` from 1 on
    (6): the product, which is the power :math:`\beta_i^t` when they do not.

    Args:
        param: Parameter, any shape; computed in the moments' dtype and rounded once.
        grad: Its gradient, same shape.
        exp_avg: First moment m, same shape, float32 or float64.
        exp_avg_sq: Second moment v, likewise.
        max_exp_avg_sq: Running maximum of v (amsgrad), or None.
        lr: Learning rate, >= 0.
        beta1: Decay of m, in [0, 1).
        beta2: Decay of v, in [0, 1).
        correction1: Bias correction c1 of m, after this step's beta, in (0, 1].
        correction2: Bias correction c2 of v, likewise.
        eps: Added to the root, >= 0.
        weight_decay: w, >= 0.
        decoupled: AdamW's decay; otherwise w theta joins the gradient (Adam).
        maximize: Ascend the task's objective. The penalty still pulls towards the anchor.
        clip: Factor c on the task's gradient.
        anchor: EWC anchor, same shape, or None for no penalty.
        importance: EWC importance Omega >= 0, same shape.
        strength: EWC strength lambda >= 0.
        proximal: Apply EWC as the proximal step (9) instead of as a gradient (8).
        pull: Gradient of another penalty, same shape, or None; joins as it is, as (8) does.

    Returns:
        The new values; the arguments are not changed.

    Example:
        >>> zero = torch.zeros(2)
        >>> constants = {"eps": 0.0, "weight_decay": 0.0, "correction1": 0.5, "correction2": 0.5}
        >>> adam_step(
        ...     torch.ones(2), torch.tensor([3.0, -0.2]), zero, zero,
        ...     lr=0.1, beta1=0.5, beta2=0.5, **constants,
        ... ).param
        tensor([0.9000, 1.1000])

    References:
        Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv:1711.05101.
    """
    dtype = exp_avg.dtype
    theta = param.to(dtype)
    g = grad.to(dtype) * (-clip if maximize else clip)
    if anchor is not None and importance is not None and not proximal:
        g = g + ewc_gradient(theta, anchor.to(dtype), importance.to(dtype), strength)
    if pull is not None:
        g = g + pull.to(dtype)
    if decoupled:
        theta = theta * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * theta
    m = beta1 * exp_avg + (1 - beta1) * g
    v = beta2 * exp_avg_sq + (1 - beta2) * g * g
    largest = None if max_exp_avg_sq is None else torch.maximum(max_exp_avg_sq, v)
    denominator = adam_denominator(v if largest is None else largest, correction2, eps)
    theta = theta - (lr / correction1) * (m / denominator)
    if anchor is not None and importance is not None and proximal:
        theta = ewc_proximal(
            theta, anchor.to(dtype), importance.to(dtype), lr * strength, denominator
        )
    # A scalar of double precision makes that of a 0-d tensor.
    largest = None if largest is None else largest.to(dtype)
    return AdamResult(theta.to(param.dtype), m.to(dtype), v.to(dtype), largest)
