r"""The second moment that an Adam holds, in the place of a Fisher.

Omega = scale * v^,    v^ = exp_avg_sq / (1 - prod_t beta_2,t)
"""

import math
from numbers import Real

import torch
from torch import Tensor

from ars.regularizers.fisher.estimators import accumulation_dtype

__all__ = ["adam_importance"]


def adam_importance(
    parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, scale: float
) -> tuple[dict[str, Tensor], int]:
    """Return the optimizer's bias-corrected second moments times ``scale``.

    Args:
        parameters: By name.
        optimizer: Holds ``exp_avg_sq`` and ``step`` of each; with ``beta_products`` its correction
            is theirs, else the power of its group's second beta.
        scale: Finite, > 0.

    Returns:
        The importance by name, float32 (float64 for a float64 parameter), and the steps taken.

    Raises:
        TypeError: ``optimizer`` is not an optimizer or ``scale`` not a number.
        ValueError: A parameter has no second moment in it, or ``scale`` is not positive.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be finite and > 0, got {scale}")
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    importance, steps = {}, 0
    for name, p in parameters.items():
        state = optimizer.state.get(p, {})
        if p not in groups or "exp_avg_sq" not in state:
            raise ValueError(
                f"{type(optimizer).__name__} holds no 'exp_avg_sq' of {name!r}; pass the Adam "
                "that trained this model, after at least one step of every parameter, or set "
                "requires_grad=False on what it does not train"
            )
        step = int(state["step"])
        # Another optimizer may have carried our products along without advancing them.
        if "beta_products" in state and state.get("beta_products_step", step) == step:
            remaining = float(state["beta_products"][1])
        else:
            remaining = float(groups[p]["betas"][1]) ** step
        moment = state["exp_avg_sq"].detach().to(accumulation_dtype(p.dtype))
        importance[name] = moment * (scale / (1 - remaining))
        steps = max(steps, step)
    return importance, steps
