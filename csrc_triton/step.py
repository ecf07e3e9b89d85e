"""The host side of the fused step: tables, workspaces, and the one or two launches a step takes."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ars.csrc_triton.adam import COUPLED, NO_PENALTY, PROXIMAL, adam_kernel
from ars.csrc_triton.control import control_kernel
from ars.csrc_triton.layout import Correction, Diagnostic, Scalar, Table
from ars.csrc_triton.tiles import TILE, GradientTable, address_table, addresses, tile_map, upload
from ars.csrc_triton.validation import (
    PARAM_DTYPES,
    check_controller,
    check_counters,
    check_hyper,
    check_params,
    check_penalty,
    check_same,
    check_state,
)

__all__ = ["Controller", "FusedAdam", "launch"]

# 4 warps x 32 lanes x 8 elements: two 128-bit fp32 accesses, or one of bf16, a thread and operand.
BLOCK = 1024
# 8 warps x 4: the control kernel's last program goes through tensors and partials so many at once.
TENSOR_BLOCK = 1024
SUM_BLOCK = 2048
ADAM_WARPS = 4
CONTROL_WARPS = 8

_DEVICE_TYPE = "cuda" if isinstance(adam_kernel, triton.JITFunction) else "cpu"
_TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def launch(kernel: Any, grid: tuple[int], *args: Any, **options: Any) -> None:
    """Launch a kernel: the only way this package does, so that launches can be counted."""
    # Contraction is off at every launch, whatever the default of the Triton version: results then
    # do not depend on it. One stage, as the loops must not be pipelined through shared memory.
    kernel[grid](*args, **options, enable_fp_fusion=False, num_stages=1)


class Controller(NamedTuple):
    """The state and constants of a controller, on the device."""

    window: Tensor  # (W,) float64, ring buffer, written in place
    counts: Tensor  # (2,) int64, surprises written and steps taken, written in place
    config: Tensor  # (6,) float64, see layout.Config
    seed: int
    standardize: bool
    detrend: bool


@dataclass(frozen=True)
class _Launch:
    """What distinguishes the launches of one step: the dtypes, and which tensors have them."""

    tiles: Tensor  # (programs, 2) int32
    first_partial: int
    param: torch.dtype
    moment: torch.dtype
    anchor: torch.dtype
    importance: torch.dtype
    penalized: bool


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
        max_exp_avg_sqs: Running maxima of the second moments (amsgrad), likewise, or None.
        steps: Steps taken, 0-d float32 tensors.
        products: Products of the betas so far, (2,) float64, or None without a controller.
        groups: Row of ``hyper`` of each parameter.
        hyper: Hyperparameters, (G, 8) float64, see :class:`~ars.csrc_triton.layout.Hyper`.
        decoupled: AdamW's weight decay; otherwise it joins the gradient (Adam).
        controller: The controller, or None for constant betas.
        anchors: EWC anchors, of any float dtype, None for a parameter without a penalty.
        importances: EWC importances >= 0, None in the same places.
        proximal: Apply EWC as the proximal step (9) instead of as a gradient (8).

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
        max_exp_avg_sqs: list[Tensor] | None,
        steps: list[Tensor],
        products: list[Tensor] | None,
        groups: list[int],
        *,
        hyper: Tensor,
        decoupled: bool,
        controller: Controller | None,
        anchors: list[Tensor | None] | None = None,
        importances: list[Tensor | None] | None = None,
        proximal: bool = False,
    ) -> None:
        check_params(params, _DEVICE_TYPE)
        check_hyper(hyper, groups, params)
        check_state(params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
        check_counters(params, steps, products, gated=controller is not None)
        check_penalty(params, anchors, importances)
        if controller is not None:
            check_controller(controller.window, controller.counts, controller.config, hyper)
        device = params[0].device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("make a FusedAdam, or take a step, before capturing a CUDA graph")

        # Kept alive because the tables hold their addresses.
        self._operands = (
            params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, products, anchors, importances,
        )  # fmt: skip
        self._params = params
        self._hyper = hyper
        self._controller = controller
        self._decoupled = decoupled
        self._amsgrad = max_exp_avg_sqs is not None
        self._penalty = (PROXIMAL if proximal else COUPLED).value
        self._columns = self._address_columns(*self._operands)
        numels = [param.numel() for param in params]
        with torch.cuda.device_of(params[0]):
            self._table = address_table(
                {**self._columns, Table.NUMEL: numels, Table.GROUP: groups}, device
            )
            self._gradients = GradientTable(len(params), device)
            self._launches = _plan(params, exp_avgs, anchors, importances, device)
            self._allocate(device)
        self._contiguous = [param.is_contiguous() for param in params]
        self._strided = [index for index, flat in enumerate(self._contiguous) if not flat]

    def _allocate(self, device: torch.device) -> None:
        count = sum(len(launch.tiles) for launch in self._launches)
        double = any(launch.moment == torch.float64 for launch in self._launches)
        number = torch.float64 if double else torch.float32
        shape = (self._hyper.shape[0], len(Scalar))
        self._scalars = torch.zeros(shape, dtype=number, device=device)
        shape = (len(self._params), len(Correction))
        self._corrections = torch.zeros(shape, dtype=number, device=device)
        self._norm_partials = torch.zeros(count, dtype=torch.float64, device=device)
        self._penalty_partials = torch.zeros_like(self._norm_partials)
        self._tickets = torch.zeros(2, dtype=torch.int32, device=device)
        start = torch.zeros(len(Diagnostic), dtype=torch.float64)
        start[Diagnostic.SURPRISE] = start[Diagnostic.GRAD_NORM] = float("nan")
        start[Diagnostic.PSI] = start[Diagnostic.PHI] = 1.0
        self.diagnostics = upload(start, device)
        seed = 0 if self._controller is None else self._controller.seed & 0xFFFFFFFFFFFFFFFF
        signed = seed - (1 << 64) if seed >> 63 else seed  # torch has no uint64 arithmetic
        self._seed = upload(torch.tensor([signed], dtype=torch.int64), device)

    @staticmethod
    def _address_columns(
        params: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor] | None,
        steps: list[Tensor],
        products: list[Tensor] | None,
        anchors: list[Tensor | None] | None,
        importances: list[Tensor | None] | None,
    ) -> dict[Table, list[int]]:
        operands: dict[Table, Any] = {
            Table.PARAM: params,
            Table.EXP_AVG: exp_avgs,
            Table.EXP_AVG_SQ: exp_avg_sqs,
            Table.MAX_EXP_AVG_SQ: max_exp_avg_sqs,
            Table.STEP: steps,
            Table.PRODUCTS: products,
            Table.ANCHOR: anchors,
            Table.IMPORTANCE: importances,
        }
        return {column: addresses(tensors, len(params)) for column, tensors in operands.items()}

    def matches(
        self,
        params: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor] | None,
        steps: list[Tensor],
        products: list[Tensor] | None,
        *,
        anchors: list[Tensor | None] | None = None,
        importances: list[Tensor | None] | None = None,
    ) -> bool:
        """Whether these tensors lie where the tables say; otherwise make another FusedAdam."""
        return self._columns == self._address_columns(
            params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, products, anchors, importances
        )

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

    def _check_gradients(self, grads: list[Tensor]) -> list[int]:
        """Validate the gradients and return their addresses.

        Those at the addresses of the last step, and contiguous where they were, have been
        validated then; 10,000 tensors cost a millisecond this way, and 15 otherwise.

        Raises:
            ValueError: If there is not one for each parameter.
        """
        if len(grads) != len(self._params):
            raise ValueError(f"{len(grads)} gradients for {len(self._params)} parameters")
        found = list(map(Tensor.data_ptr, grads))
        suspects: Any = self._strided
        if (
            self._gradients.moved(found)
            or list(map(Tensor.is_contiguous, grads)) != self._contiguous
        ):
            suspects = range(len(grads))
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
                self._norm_partials, self._tickets[:1], self.diagnostics,
                part.first_partial, len(self._norm_partials),
                len(self._params), self._hyper.shape[0],
                GRAD=_TRITON_DTYPES[part.param],
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
                self._penalty_partials, self._tickets[1:], self.diagnostics,
                part.first_partial, len(self._penalty_partials),
                PARAM=_TRITON_DTYPES[part.param],
                MOMENT=_TRITON_DTYPES[part.moment],
                ANCHOR=_TRITON_DTYPES[part.anchor],
                IMPORTANCE=_TRITON_DTYPES[part.importance],
                AMSGRAD=self._amsgrad,
                DECOUPLED=self._decoupled,
                PENALTY=self._penalty if part.penalized else NO_PENALTY.value,
                LAST=index == last,
                TILE=TILE,
                BLOCK=BLOCK if part.moment == torch.float32 else BLOCK // 2,
                SUM_BLOCK=SUM_BLOCK,
                num_warps=ADAM_WARPS,
            )  # fmt: skip


def _plan(
    params: list[Tensor],
    exp_avgs: list[Tensor],
    anchors: list[Tensor | None] | None,
    importances: list[Tensor | None] | None,
    device: torch.device,
) -> list[_Launch]:
    """Split the tensors into launches: one for each parameter dtype, in order of appearance.

    Parameters without a penalty share a launch with those of their dtype that have one. Penalties
    stored in several pairs of dtypes cost a launch for each pair.
    """
    pairs: dict[torch.dtype, dict[tuple[torch.dtype, torch.dtype] | None, list[int]]] = {}
    for index, param in enumerate(params):
        anchor = anchors[index] if anchors is not None else None
        importance = importances[index] if importances is not None else None
        pair = None if anchor is None or importance is None else (anchor.dtype, importance.dtype)
        pairs.setdefault(param.dtype, {}).setdefault(pair, []).append(index)

    launches: list[_Launch] = []
    first_partial = 0
    for dtype, members in pairs.items():
        free = members.pop(None, [])
        for pair, penalized in members.items() or [(None, [])]:
            tensors = sorted(penalized + free)
            free = []
            tiles = tile_map([params[index].numel() for index in tensors], tensors, device)
            moment = exp_avgs[tensors[0]].dtype
            anchor_dtype, importance_dtype = pair or (moment, moment)
            launches.append(
                _Launch(
                    tiles,
                    first_partial,
                    dtype,
                    moment,
                    anchor_dtype,
                    importance_dtype,
                    penalized=pair is not None,
                )
            )
            first_partial += len(tiles)
    return launches
