"""Which implementation takes the step, and the check that it can."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ars import reference
from ars.csrc_triton import has_triton
from ars.reference import Scalar
from ars.step import eager
from ars.step.batch import DIAGNOSTICS, Batch, Hyper, Options, hyper_rows
from ars.step.cpu import CpuStep, grad_norm
from ars.step.triton import TritonStep

__all__ = ["NORMS", "Implementation", "Steppers", "choose", "is_misplaced", "step_"]

Implementation: TypeAlias = Literal["loop", "foreach", "fused", "triton"]
# How each takes the norm of some tensors; the kernels' own is of all they are given.
NORMS: dict[Implementation, Callable[[list[Tensor]], Scalar]] = {
    "loop": reference.grad_norm,
    "foreach": grad_norm,
    "fused": grad_norm,
    "triton": reference.grad_norm,
}


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
        params: The parameters to be optimized; of DTensors, the parts that are here.
        foreach: True forces torch's foreach kernels (CPU); False with ``fused`` not True, the loop.
        fused: True forces the fused kernels: Triton on a GPU, torch's on a CPU.
        differentiable: Forces the loop, and excludes ``foreach``.
        rounding: Whether bfloat16 parameters are rounded stochastically or master weights, which
            torch's kernels cannot do: on a CPU that takes the loop.

    Returns:
        ``loop``, ``foreach``, ``fused`` (torch's on a CPU) or ``triton``.

    Raises:
        RuntimeError: An explicit choice cannot be had here; names the remedy.
    """
    devices = {p.device.type for p in params}
    if differentiable:
        if foreach:
            raise RuntimeError(
                "`foreach` does not support `differentiable`: leave foreach None for the loop"
            )
        return "loop"
    wrapped = next((p for p in params if is_traceable_wrapper_subclass(p)), None)
    if wrapped is not None:
        if rounding:
            raise RuntimeError(
                "stochastic_rounding and master_weights read the bits of a parameter, which a "
                f"{type(wrapped).__name__} does not have itself: train it without them"
            )
        # The other kernels see one rank's part, and take its norm for the whole.
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
    if devices == {"cuda"} and has_triton() and len({p.device for p in params}) == 1:
        return "triton"
    if fused:
        raise RuntimeError(
            "`fused=True` requires all the params to be floating point Tensors on the CPU, or on "
            f"one GPU with Triton installed; they are on {sorted({str(p.device) for p in params})} "
            f"and Triton is {'installed' if has_triton() else 'missing'}. Leave fused=None for "
            "the loop"
        )
    return "loop"


def is_misplaced(groups: list[dict[str, Any]], device: torch.device) -> bool:
    """Whether parameters are elsewhere than on ``device``, or have gradients but no data (meta).

    Args:
        groups: The optimizer's parameter groups; the first parameter is looked at.
        device: Where they were.
    """
    first = next((group["params"][0] for group in groups if group["params"]), None)
    if first is None:
        return False
    if not first.is_meta:
        return bool(first.device != device)
    return any(param.grad is not None for group in groups for param in group["params"])


class Steppers:
    """The implementations that keep something between the steps of one optimizer."""

    def __init__(self) -> None:
        self.triton = TritonStep()
        self.cpu = CpuStep()


def step_(
    implementation: Implementation,
    batch: Batch,
    hypers: list[Hyper],
    options: Options,
    steppers: Steppers,
) -> None:
    """Take one step in place; all implementations compute the same step.

    Args:
        implementation: What :func:`choose` returned.
        batch: The tensors.
        hypers: Each group's hyperparameters.
        options: What holds for all groups.
        steppers: What is kept from step to step.
    """
    rows = hyper_rows(hypers, unused=batch.unused)
    if implementation == "triton":
        steppers.triton.step_(batch, rows, options)
    elif implementation == "loop":
        eager.step_(batch, rows, options)
    else:
        steppers.cpu.step_(batch, rows, options, foreach=implementation == "foreach")
    if batch.proximal_only is not None:
        count = batch.tensors[0].step
        value = eager.take_proximal_step_(batch.proximal_only, hypers, options, count=count)
        place = options.diagnostics[DIAGNOSTICS.index("penalty")]
        # Without a penalty in the step itself, the kernels have left the last one's value there.
        if options.penalty is not None or batch.has_anchor():
            value = place + value
        place.copy_(torch.where(eager.may_move(options), value, place))
