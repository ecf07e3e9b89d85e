"""Which implementation takes the step, and the check that it can."""

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ars import loop
from ars.batch import Batch, Hyper, Options
from ars.device import DeviceStep
from ars.host import HostStep
from ars.squares import add_squared_products_

__all__ = [
    "Implementation", "Kept", "add_squared_products_", "choose", "have_moved", "step_",
]  # fmt: skip

Implementation: TypeAlias = Literal["loop", "foreach", "fused", "triton"]


@functools.cache
def _has_triton() -> bool:
    """Whether Triton is installed; it is imported only when a kernel is launched."""
    return importlib.util.find_spec("triton") is not None


def choose(
    params: Sequence[Tensor],
    *,
    foreach: bool | None,
    fused: bool | None,
    differentiable: bool,
    rounding: bool = False,
) -> Implementation:
    """Choose the implementation as torch's arguments ask; with neither, the fastest there is.

    Args:
        params: The parameters to be optimized.
        foreach: True forces torch's foreach kernels (CPU); False with ``fused`` not True, the loop.
        fused: True forces the fused kernels: Triton on a GPU, torch's on a CPU.
        differentiable: Forces the loop.
        rounding: Whether bfloat16 parameters are rounded stochastically or master weights, which
            torch's kernels cannot do: on a CPU that takes the loop.

    Returns:
        ``loop``, ``foreach``, ``fused`` (torch's on a CPU) or ``triton``.

    Raises:
        RuntimeError: An explicit choice cannot be had here; names the remedy.
    """
    devices = {p.device.type for p in params}
    if differentiable:
        return "loop"
    wrapped = next((p for p in params if is_traceable_wrapper_subclass(p)), None)
    if (
        wrapped is not None
    ):  # the other kernels see one rank's part, and take its norm for the whole
        if foreach or fused:
            raise RuntimeError(
                f"foreach=True and fused=True are not for a {type(wrapped).__name__}, whose memory "
                "is not its own: leave both None for the loop"
            )
        return "loop"
    if rounding and devices == {"cpu"}:
        if foreach or fused:
            raise RuntimeError(
                "stochastic_rounding and master_weights are not in torch's CPU kernels, which "
                "foreach=True and fused=True ask for: leave both None for the loop"
            )
        return "loop"
    if foreach:
        if not devices <= {"cpu"}:
            raise RuntimeError(
                "`foreach=True` requires all the params to be on the CPU, not on "
                f"{sorted(devices)}: torch's foreach kernels take the gate from the host, which "
                "would wait for the device at every step. Use fused=True, or leave both None"
            )
        return "foreach"
    if not fused and (foreach is False or fused is False):
        return "loop"
    if devices <= {"cpu"}:
        return "fused"
    if devices == {"cuda"} and _has_triton() and len({p.device for p in params}) == 1:
        return "triton"
    if fused:
        raise RuntimeError(
            "`fused=True` requires all the params to be floating point Tensors on the CPU, or on "
            f"one GPU with Triton installed; they are on {sorted({str(p.device) for p in params})} "
            f"and Triton is {'installed' if _has_triton() else 'missing'}. Leave fused=None for "
            "the loop"
        )
    return "loop"


def have_moved(groups: list[dict[str, Any]], device: torch.device) -> bool:
    """Whether parameters with gradients are elsewhere than on ``device``, or without data (meta).

    Args:
        groups: The optimizer's parameter groups; the first parameter is looked at.
        device: Where they were.
    """
    first = next((group["params"][0] for group in groups if group["params"]), None)
    if first is None or (first.device == device and not first.is_meta):
        return False
    return any(param.grad is not None for group in groups for param in group["params"])


class Kept:
    """What the implementations keep between the steps of one optimizer."""

    def __init__(self) -> None:
        self.device = DeviceStep()
        self.host = HostStep()


def step_(
    implementation: Implementation,
    batch: Batch,
    hypers: list[Hyper],
    options: Options,
    kept: Kept,
) -> None:
    """Take one step in place; all implementations compute the same step.

    Args:
        implementation: What :func:`choose` returned.
        batch: The tensors.
        hypers: Each group's hyperparameters.
        options: What holds for all groups.
        kept: What is kept from step to step.
    """
    if implementation == "triton":
        kept.device.step_(batch, hypers, options)
    elif implementation == "loop":
        loop.step_(batch, hypers, options)
    else:
        kept.host.step_(batch, hypers, options, foreach=implementation == "foreach")
