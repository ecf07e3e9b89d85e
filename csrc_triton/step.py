"""The host side of the fused step: tables, workspaces, and the one or two launches a step takes."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
import triton
from torch import Tensor

from ars.csrc_triton.adam import COUPLED, NO_PENALTY, PROXIMAL, adam_kernel
from ars.csrc_triton.control import control_kernel
from ars.csrc_triton.layout import Correction, Diagnostic, Scalar, Table
from ars.csrc_triton.plan import TRITON_DTYPES, Controller, Operands, plan_launches
from ars.csrc_triton.tiles import TILE, GradientTable, address_table, upload
from ars.csrc_triton.validation import (
    PARAM_DTYPES,
    check_buffer,
    check_controller,
    check_hyper,
    check_operands,
    check_params,
    check_same,
)

__all__ = ["Controller", "FusedAdam", "launch"]

# 128 threads x 4 elements: one 128-bit access of fp32, or 64-bit of bf16, a thread and
# operand. Twice that is 94 registers instead of 56, and moves bf16 results through shared memory.
BLOCK = 512
# 256 threads x 4 and x 8: the control kernel's last program takes so many tensors, and partials.
TENSOR_BLOCK = 1024
SUM_BLOCK = 2048
WARP = 32 if torch.version.hip is None else 64
ADAM_WARPS = 128 // WARP
CONTROL_WARPS = 256 // WARP
# Contraction is off at every launch, whatever the default of the Triton version: results then do
# not depend on it. One stage, as the loops must not be pipelined through shared memory.
OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}

_DEVICE_TYPE = "cuda" if isinstance(adam_kernel, triton.JITFunction) else "cpu"


def launch(kernel: Any, grid: tuple[int], *args: Any, **options: Any) -> None:
    """Launch a kernel: the only way this package does, so that launches can be counted."""
    kernel[grid](*args, **options, **OPTIONS)


class FusedAdam:
    r"""Everything one device needs to take fused steps: tables, scalars, workspaces.

    A step is eqs. (1) to (9) of :mod:`ars.reference` in two launches, or one control launch per
    parameter dtype (if the gradient norm is needed) and one more for each: no host
    synchronisation, and no compilation after the first step. ``hyper`` and ``Controller.config``
    are read on the device at every step: rewrite them in place between steps, or between replays
    of a CUDA graph. Parameters, moments, steps and products are written in place.

    Args:
        params: Parameters, float16, bfloat16, float32 or float64, dense, on one device.
        exp_avgs: First moments, one for each and in the same memory order; float32, or float64
            with a float64 parameter.
        exp_avg_sqs: Second moments, likewise.
        max_exp_avg_sqs: Running maxima of the second moments, likewise, None without amsgrad.
        steps: Steps taken, 0-d float32 tensors.
        products: Products of the betas so far, (2,) float64, or None without a controller.
        groups: Row of ``hyper`` of each parameter.
        hyper: Hyperparameters, (G, 8) float64, see :class:`~ars.csrc_triton.layout.Hyper`.
        decoupled: AdamW's weight decay; otherwise it joins the gradient (Adam).
        controller: The controller, or None for constant betas.
        anchors: EWC anchors, of any float dtype, None for a parameter without a penalty.
        importances: EWC importances >= 0, None in the same places.
        proximal: Apply EWC as the proximal step (9) instead of as a gradient (8).
        diagnostics: Where steps report to, (10,) float64; None makes it.

    Attributes:
        diagnostics: (10,) float64, see :class:`~ars.csrc_triton.layout.Diagnostic`; NaN stands for
            what was not measured: the gradient norm if neither clipping nor the controller needed
            it, and the surprise without a controller.

    Raises:
        TypeError: If a tensor's dtype is not as above, or it is a wrapper such as a DTensor.
        ValueError: If shapes, devices or memory orders do not match.
        RuntimeError: If made during a CUDA-graph capture.

    References:
        Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv:1711.05101;
        Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks",
        arXiv:1612.00796.
    """

    def __init__(
        self,
        params: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: Sequence[Tensor | None] | None,
        steps: list[Tensor],
        products: list[Tensor] | None,
        groups: list[int],
        *,
        hyper: Tensor,
        decoupled: bool,
        controller: Controller | None,
        anchors: Sequence[Tensor | None] | None = None,
        importances: Sequence[Tensor | None] | None = None,
        proximal: bool = False,
        diagnostics: Tensor | None = None,
    ) -> None:
        check_params(params, _DEVICE_TYPE)
        check_hyper(hyper, groups, params)
        operands = Operands(
            params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, products, anchors, importances
        )
        check_operands(operands, gated=controller is not None)
        if controller is not None:
            check_controller(controller.window, controller.counts, controller.config, hyper)
        if diagnostics is not None:
            check_buffer("diagnostics", diagnostics, (len(Diagnostic),), hyper)
        device = params[0].device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("make a FusedAdam, or take a step, before capturing a CUDA graph")

        self._operands = operands  # kept alive because the tables hold their addresses
        self._params = params
        self._hyper = hyper
        self._controller = controller
        self._decoupled = decoupled
        self._penalty = (PROXIMAL if proximal else COUPLED).value
        self._columns = operands.addresses()
        numels = [param.numel() for param in params]
        with torch.cuda.device_of(params[0]):
            self._table = address_table(
                {**self._columns, Table.NUMEL: numels, Table.GROUP: groups}, device
            )
            self._gradients = GradientTable(len(params), device)
            self._launches = plan_launches(operands, device)
            self._allocate(device, diagnostics)
        self._like = _likeness(params)
        self._strided = [i for i, param in enumerate(params) if not param.is_contiguous()]

    def _allocate(self, device: torch.device, diagnostics: Tensor | None) -> None:
        count = sum(len(launch.tiles) for launch in self._launches)
        double = any(launch.moment == torch.float64 for launch in self._launches)
        number = torch.float64 if double else torch.float32
        shape = (self._hyper.shape[0], len(Scalar))
        self._scalars = torch.zeros(shape, dtype=number, device=device)
        shape = (len(self._params), len(Correction))
        self._corrections = torch.zeros(shape, dtype=number, device=device)
        self._norm_partials = torch.zeros(count, dtype=torch.float64, device=device)
        self._penalty_partials = torch.zeros_like(self._norm_partials)
        self._norm_ticket = torch.zeros(1, dtype=torch.int32, device=device)
        self._penalty_ticket = torch.zeros_like(self._norm_ticket)
        start = torch.zeros(len(Diagnostic), dtype=torch.float64)
        start[Diagnostic.SURPRISE] = start[Diagnostic.GRAD_NORM] = float("nan")
        start[Diagnostic.PSI] = start[Diagnostic.PHI] = 1.0
        start = upload(start, device)
        self.diagnostics = start if diagnostics is None else diagnostics.copy_(start)
        seed = 0 if self._controller is None else self._controller.seed
        signed = (seed + (1 << 63)) % (1 << 64) - (1 << 63)  # the same 64 bits as an int64
        self._seed = upload(torch.tensor([signed]), device)

    def matches(
        self,
        params: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: Sequence[Tensor | None] | None,
        steps: list[Tensor],
        products: list[Tensor] | None,
        *,
        anchors: Sequence[Tensor | None] | None = None,
        importances: Sequence[Tensor | None] | None = None,
    ) -> bool:
        """Whether these tensors lie where the tables say; otherwise make another FusedAdam."""
        operands = Operands(
            params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, products, anchors, importances
        )
        return self._columns == operands.addresses()

    def step(self, grads: list[Tensor], *, loss: Tensor | None, clip: bool) -> None:
        """Take one step.

        Args:
            grads: Gradients, like the parameters in shape, dtype and memory order.
            loss: The surprise, 0-d and floating, on the same device; None observes the gradient
                norm. Without a controller it is not read.
            clip: Whether the gradient norm is needed for clipping: any ``MAX_NORM`` is finite.

        Raises:
            TypeError: If a gradient's dtype, or the loss's, is not as above.
            ValueError: If a gradient's or the loss's shape, device or memory order is another.
        """
        gated = self._controller is not None
        if not gated:
            loss = None
        found = self._check_gradients(grads)
        if loss is not None:
            loss = self._check_loss(loss)
        with torch.cuda.device_of(self._table):
            grad_table = self._gradients.refresh(found)
            self._control(grad_table, loss, norm=clip or (gated and loss is None))
            self._update(grad_table)
        # Autograd must notice, as with any operation in place.
        torch.autograd.graph.increment_version(self._params)

    def _check_gradients(self, grads: list[Tensor]) -> list[int]:
        """Validate the gradients and return their addresses.

        What has the address, dtype, shape and contiguity of the last step's was validated then.
        Looking takes a third of a microsecond a tensor; validating again, three times that.

        Raises:
            ValueError: If there is not one for each parameter.
        """
        if len(grads) != len(self._params):
            raise ValueError(f"{len(grads)} gradients for {len(self._params)} parameters")
        try:
            found = list(map(Tensor.data_ptr, grads))
            unchanged = not self._gradients.moved(found) and self._like == _likeness(grads)
        except RuntimeError:  # a sparse tensor, say, has no address: found out below
            found, unchanged = [], False
        suspects: Sequence[int] = self._strided if unchanged else range(len(grads))
        for index in suspects:
            param = self._params[index]
            check_same("gradient", index, grads[index], param, param.dtype)
        return found

    def _check_loss(self, loss: Tensor) -> Tensor:
        if loss.dtype not in PARAM_DTYPES:
            raise TypeError(f"loss is {loss.dtype}; pass a floating-point tensor")
        if loss.numel() != 1 or loss.device != self._table.device:
            raise ValueError(
                f"loss has shape {tuple(loss.shape)} on {loss.device}; pass one number on "
                f"{self._table.device}"
            )
        return loss.detach()

    def _control(self, grad_table: Tensor, loss: Tensor | None, *, norm: bool) -> None:
        controller = self._controller
        window = 1 if controller is None else controller.window.numel()
        for index, part in enumerate(self._launches):
            last = index == len(self._launches) - 1
            if not (norm or last):
                continue
            launch(
                control_kernel,
                (len(part.tiles) if norm else 1,),
                self._table, grad_table, part.tiles,
                self._hyper, self._scalars, self._corrections,
                controller and controller.window, controller and controller.counts,
                controller and controller.config, self._seed,
                loss,
                self._norm_partials, self._norm_ticket, self.diagnostics,
                part.first_partial, len(self._norm_partials),
                len(self._params), self._hyper.shape[0],
                GRAD=TRITON_DTYPES[part.param],
                NORM=norm,
                LAST=last,
                GATED=controller is not None,
                STANDARDIZE=controller is not None and controller.standardize,
                DETREND=controller is not None and controller.detrend,
                DECOUPLED=self._decoupled,
                WINDOW=window,
                WINDOW_BLOCK=triton.next_power_of_2(window),
                GROUP_BLOCK=triton.next_power_of_2(self._hyper.shape[0]),
                TENSOR_BLOCK=TENSOR_BLOCK,
                TILE=TILE,
                SUM_BLOCK=SUM_BLOCK,
                num_warps=CONTROL_WARPS,
            )  # fmt: skip

    def _update(self, grad_table: Tensor) -> None:
        last = max((i for i, part in enumerate(self._launches) if part.penalized), default=-1)
        for index, part in enumerate(self._launches):
            launch(
                adam_kernel,
                (len(part.tiles),),
                self._table, grad_table, part.tiles,
                self._scalars, self._corrections,
                self._penalty_partials, self._penalty_ticket, self.diagnostics,
                part.first_partial, len(self._penalty_partials),
                PARAM=TRITON_DTYPES[part.param],
                MOMENT=TRITON_DTYPES[part.moment],
                ANCHOR=TRITON_DTYPES[part.anchor],
                IMPORTANCE=TRITON_DTYPES[part.importance],
                AMSGRAD=part.amsgrad,
                DECOUPLED=self._decoupled,
                PENALTY=self._penalty if part.penalized else NO_PENALTY.value,
                LAST=index == last,
                TILE=TILE,
                BLOCK=BLOCK if part.moment == torch.float32 else BLOCK // 2,
                SUM_BLOCK=SUM_BLOCK,
                num_warps=ADAM_WARPS,
            )  # fmt: skip


def _likeness(tensors: list[Tensor]) -> tuple[list[Any], ...]:
    """What a gradient must have in common with its parameter, as fast as it can be had."""
    dtypes, shapes = map(attrgetter("dtype"), tensors), map(attrgetter("shape"), tensors)
    return list(dtypes), list(shapes), list(map(Tensor.is_contiguous, tensors))
