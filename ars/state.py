"""Each parameter's optimizer state: how it starts, and its dtypes."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["complete_state", "moment_dtype", "restore_dtypes"]


def moment_dtype(param: Tensor) -> torch.dtype:
    """Moments are at least single precision, and complex for complex parameters."""
    return torch.promote_types(param.dtype, torch.float32)


def complete_state(
    state: dict[str, Any],
    param: Tensor,
    *,
    betas: tuple[float | Tensor, float | Tensor],
    amsgrad: bool,
    step_device: torch.device,
    gated: bool,
) -> None:
    """Start what is missing in a parameter's state: all of it, or what plain AdamW does not keep.

    Args:
        state: The parameter's state, completed in place.
        param: The parameter.
        betas: Its group's betas; those of the steps already taken, if any.
        amsgrad: Keep the running maximum of the second moment.
        step_device: Where the step counter lives.
        gated: Keep the products of the betas (eq. 6), which a controller makes vary.
    """
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=step_device)
    for name in ("exp_avg", "exp_avg_sq") + ("max_exp_avg_sq",) * amsgrad:
        if name not in state:
            state[name] = torch.zeros_like(param, dtype=moment_dtype(param))
    if gated and "beta_products" not in state:
        constant = torch.tensor([float(beta) for beta in betas], dtype=torch.float64)
        products = constant ** state["step"].double().cpu()
        state["beta_products"] = products.to(param.device)


def restore_dtypes(
    state: dict[str, Any], param: Tensor, saved: dict[str, Any], step_device: torch.device
) -> None:
    """Undo torch's cast of a loaded state to the parameter's dtype.

    Args:
        state: The parameter's state as torch has loaded it, corrected in place.
        param: The parameter.
        saved: The parameter's state as it was saved.
        step_device: Where the step counter lives.
    """
    for name, value in saved.items():
        if not isinstance(value, Tensor):
            continue
        if name == "step":
            state[name] = value.to(step_device, torch.float32)
        elif name == "beta_products":
            state[name] = value.to(param.device, torch.float64)
        elif value.is_floating_point() or value.is_complex():
            state[name] = value.to(param.device, moment_dtype(param))
