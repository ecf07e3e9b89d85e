"""The one or two launches a step takes: what the kernels work in, and the arguments they get."""

from typing import Any

import torch
import triton
from torch import Tensor

from ars.csrc_triton.adam import COUPLED, NO_PENALTY, PROXIMAL, THREADS
from ars.csrc_triton.control import control_kernel
from ars.csrc_triton.layout import Correction, Diagnostic, Scalar
from ars.csrc_triton.split import TRITON_DTYPES, Controller, Launch
from ars.csrc_triton.tiles import TILE, upload
from ars.csrc_triton.update import adam_kernel

__all__ = ["DEVICE_TYPE", "Launches", "launch"]

# 128 threads x 16 bytes of a moment: 128-bit accesses of the moments, and of all that is as wide.
# Twice that is half as many registers more, and moves bf16 results through shared memory.
BLOCK_BYTES = 16 * THREADS.value
# 256 threads x 4 and x 8: the control kernel's last program takes so many tensors, and partials.
TENSOR_BLOCK = 1024
SUM_BLOCK = 2048
WARP = 32 if torch.version.hip is None else 64
ADAM_WARPS = THREADS.value // WARP
CONTROL_WARPS = 256 // WARP
# Contraction is off at every launch, whatever the default of the Triton version: results then do
# not depend on it. One stage, as the loops must not be pipelined through shared memory.
OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}

# Where the kernels run: the interpreter's are on the CPU.
DEVICE_TYPE = "cuda" if isinstance(adam_kernel, triton.JITFunction) else "cpu"


def launch(kernel: Any, grid: tuple[int], *args: Any, **options: Any) -> None:
    """Launch a kernel: the only way this package does, so that launches can be counted."""
    kernel[grid](*args, **options, **OPTIONS)


class Launches:
    """Workspaces of the kernels and how they are launched, for one set of tensors.

    Args:
        parts: The launches of the update, see :func:`~ars.csrc_triton.split.split_launches`.
        table: Addresses, see :class:`~ars.csrc_triton.layout.Table`.
        hyper: Hyperparameters, (G, 9) float64.
        controller: The controller, or None for constant betas.
        decoupled: AdamW's weight decay rather than Adam's.
        proximal: EWC as the proximal step (9) rather than as a gradient (8).
        seed: Key of the stochastic rounding, 64 bits.
        diagnostics: Where steps report to, (10,) float64; None makes it.
    """

    def __init__(
        self,
        parts: list[Launch],
        table: Tensor,
        hyper: Tensor,
        controller: Controller | None,
        *,
        decoupled: bool,
        proximal: bool,
        seed: int,
        diagnostics: Tensor | None,
    ) -> None:
        self._parts = parts
        self._table = table
        self._hyper = hyper
        self._controller = controller
        self._decoupled = decoupled
        self._penalty = (PROXIMAL if proximal else COUPLED).value

        device = table.device
        count = sum(len(part.tiles) for part in parts)
        double = any(part.moment == torch.float64 for part in parts)
        number = torch.float64 if double else torch.float32
        self._scalars = torch.zeros((hyper.shape[0], len(Scalar)), dtype=number, device=device)
        self._corrections = torch.zeros((len(table), len(Correction)), dtype=number, device=device)
        self._norm_partials = torch.zeros(count, dtype=torch.float64, device=device)
        self._penalty_partials = torch.zeros_like(self._norm_partials)
        self._norm_ticket = torch.zeros(1, dtype=torch.int32, device=device)
        self._penalty_ticket = torch.zeros_like(self._norm_ticket)
        start = torch.zeros(len(Diagnostic), dtype=torch.float64, device="cpu")
        start[Diagnostic.SURPRISE] = start[Diagnostic.GRAD_NORM] = float("nan")
        start[Diagnostic.PSI] = start[Diagnostic.PHI] = 1.0
        start = upload(start, device)
        self.diagnostics = start if diagnostics is None else diagnostics.copy_(start)
        seeds = [as_int64(controller.seed if controller else 0), as_int64(seed)]
        self._seed, self._rounding_seed = upload(torch.tensor(seeds, device="cpu"), device).split(1)

    def control(
        self,
        grad_table: Tensor,
        loss: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        *,
        norm: bool,
    ) -> None:
        """Launch the control kernel: for every dtype if the norm is needed, else once."""
        controller = self._controller
        window = 1 if controller is None else controller.window.numel()
        gate = () if controller is None else controller.gate
        for index, part in enumerate(self._parts):
            last = index == len(self._parts) - 1
            if not (norm or last):
                continue
            launch(
                control_kernel,
                (len(part.tiles) if norm else 1,),
                self._table, grad_table, part.tiles,
                self._hyper, self._scalars, self._corrections,
                controller and controller.window, controller and controller.counts,
                controller and controller.gate_state, controller and controller.config, self._seed,
                loss, grad_scale, found_inf,
                self._norm_partials, self._norm_ticket, self.diagnostics,
                part.first_partial, len(self._norm_partials),
                len(self._table), self._hyper.shape[0],
                GRAD=TRITON_DTYPES[part.param],
                NORM=norm,
                LAST=last,
                GATED=controller is not None,
                STANDARDIZE=controller is not None and controller.standardize,
                DETREND=controller is not None and controller.detrend,
                GATE_BETAS="betas" in gate,
                GATE_LR="lr" in gate,
                GATE_GRAD="grad" in gate,
                DECOUPLED=self._decoupled,
                WINDOW=window,
                WINDOW_BLOCK=triton.next_power_of_2(window),
                GROUP_BLOCK=triton.next_power_of_2(self._hyper.shape[0]),
                TENSOR_BLOCK=TENSOR_BLOCK,
                TILE=TILE,
                SUM_BLOCK=SUM_BLOCK,
                num_warps=CONTROL_WARPS,
            )  # fmt: skip

    def update(self, grad_table: Tensor) -> None:
        """Launch the update, once for each part."""
        last = max((i for i, part in enumerate(self._parts) if part.penalized), default=-1)
        for index, part in enumerate(self._parts):
            launch(
                adam_kernel,
                (len(part.tiles),),
                self._table, grad_table, part.tiles,
                self._scalars, self._corrections,
                self._rounding_seed,
                self._penalty_partials, self._penalty_ticket, self.diagnostics,
                part.first_partial, len(self._penalty_partials),
                PARAM=TRITON_DTYPES[part.param],
                MOMENT=TRITON_DTYPES[part.moment],
                ANCHOR=TRITON_DTYPES[part.anchor],
                IMPORTANCE=TRITON_DTYPES[part.importance],
                AMSGRAD=part.amsgrad,
                DECOUPLED=self._decoupled,
                PENALTY=self._penalty if part.penalized else NO_PENALTY.value,
                PULLED=part.pulled,
                ROUNDING=part.rounding,
                LAST=index == last,
                TILE=TILE,
                BLOCK=BLOCK_BYTES // part.moment.itemsize,
                SUM_BLOCK=SUM_BLOCK,
                num_warps=ADAM_WARPS,
            )  # fmt: skip


def as_int64(seed: int) -> int:
    """Return the seed's 64 bits as an int64."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
