"""Muon, the matrices of one shape orthogonalised together.

torch.optim.Muon takes one matrix after the other, always in bfloat16. A GPT has many matrices of
few shapes, so that batches of them need few launches; and a CPU without matrix units multiplies
bfloat16 far slower than fp32.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonalize"]


def orthogonalize(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    r"""Push the singular values of matrices towards 1 by Newton and Schulz's iteration.

        X_0 = M / max(||M||_F, eps),    X <- a X + (b X X^T + c (X X^T)^2) X

    The usual coefficients end with singular values between about 0.7 and 1.2, in five iterations.

    Args:
        matrices: (n, rows, columns), in the dtype of the products.
        coefficients: a, b and c.
        steps: iterations.
        eps: least norm.

    References:
        Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    a, b, c = coefficients
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices  # the smaller Gram matrix of the two
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Muon):
    """torch's Muon with the same settings and state, faster.

    Args:
        params: matrices; all further arguments are those of torch.optim.Muon.

    Example:
        >>> weight = torch.nn.Parameter(torch.randn(4, 8))
        >>> optimizer = Muon([weight], lr=0.02)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step.

        Args:
            closure: differentiates the loss anew and returns it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            moments: list[Tensor] = []
            self._init_group(group, params, grads, moments)
            if params:
                _step_group(group, params, grads, moments)
        return loss


def _step_group(
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    moments: list[Tensor],
) -> None:
    lr, momentum = float(group["lr"]), group["momentum"]
    torch._foreach_lerp_(moments, grads, 1 - momentum)
    updates = torch._foreach_lerp(grads, moments, momentum) if group["nesterov"] else moments
    torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, param in enumerate(params):
        alike[(param.shape, param.dtype, param.device)].append(index)
    for (shape, _, device), indices in alike.items():
        stacked = torch.stack([updates[index] for index in indices])
        stacked = stacked.to(torch.float32 if device.type == "cpu" else torch.bfloat16)
        whole = orthogonalize(stacked, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rate = _rate(lr, shape, group["adjust_lr_fn"])
        alike_params = [params[index] for index in indices]
        torch._foreach_add_(alike_params, list(whole.to(alike_params[0].dtype)), alpha=-rate)


def _rate(lr: float, shape: torch.Size, adjust: str | None) -> float:
    """The learning rate of matrices of a shape, as torch.optim.Muon's ``adjust_lr_fn`` has it."""
    rows, columns = shape
    if adjust == "match_rms_adamw":
        return float(0.2 * max(rows, columns) ** 0.5) * lr
    return float(max(1.0, rows / columns) ** 0.5) * lr
