"""The step on a GPU: what the Triton kernels need, kept on the device from step to step."""

import math
from operator import is_
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ars import reference
from ars.controller import ARSController
from ars.csrc_triton.layout import Config
from ars.csrc_triton.layout import Hyper as Column
from ars.step.batch import DIAGNOSTICS, Batch, Hyper, Options, to_device

if TYPE_CHECKING:
    from ars.csrc_triton.step import Controller, FusedAdam

__all__ = ["TritonStep"]

_NORM = DIAGNOSTICS.index("grad_norm")


class TritonStep:
    """Takes fused steps, and makes the kernels' tables anew when a tensor has moved.

    Numbers of a group that changed on the host are copied without waiting; a learning rate or beta
    that is a tensor on the device is copied there, so a captured graph reads it live.
    """

    def __init__(self) -> None:
        self._fused: FusedAdam | None = None
        self._hyper: Tensor | None = None
        self._rows: list[list[float]] = []
        self._key: tuple[object, ...] = ()

    def step_(self, batch: Batch, hypers: list[Hyper], options: Options) -> None:
        """Take one step in at most two launches per dtype.

        Args:
            batch: The tensors, all on one device.
            hypers: The rows of hyperparameters.
            options: What holds for all groups.
        """
        device = batch.tensors[0].param.device
        self.write_hyper(hypers, options.max_norm, device)
        fused = self._tables_for(batch, options)
        surprise = to_device(options.surprise, device)
        if surprise is not None and not surprise.is_floating_point():
            surprise = surprise.double()
        scale = to_device(options.grad_scale, device)
        norm = options.norm
        if norm is not None:  # of parts of a whole, of which the kernels see too little
            norm = torch.as_tensor(norm, dtype=torch.float64, device=device)
            if scale is not None:
                norm = norm / scale.double()
            if surprise is None:
                surprise = norm
            if options.max_norm is not None:
                clip = reference.clip_coefficient(norm, options.max_norm)
                scale = ((1.0 if scale is None else scale.double()) / clip).float()
            before = options.diagnostics[_NORM].clone()
        fused.step(
            batch.grads,
            loss=surprise,
            clip=options.max_norm is not None and norm is None,
            grad_scale=scale,
            found_inf=to_device(options.found_inf, device),
            layout=batch.layout,
        )
        if norm is not None:
            stays = to_device(options.found_inf, device)
            place = options.diagnostics[_NORM]
            place.copy_(norm if stays is None else torch.where(stays != 0, before, norm))
        if options.penalty is not None:
            self._report(batch, options.penalty, options)

    def _report(self, batch: Batch, penalty: Tensor, options: Options) -> None:
        """Add the value of the part of the penalty that the kernels do not see."""
        place = options.diagnostics[DIAGNOSTICS.index("penalty")]
        penalty = penalty.detach().to(place.device, place.dtype, non_blocking=True)
        if batch.has_anchor():  # of which they have put theirs
            penalty = place + penalty
        if options.found_inf is not None:
            penalty = torch.where(to_device(options.found_inf, place.device) != 0, place, penalty)
        place.copy_(penalty)

    def write_hyper(
        self, hypers: list[Hyper], max_norm: float | None, device: torch.device
    ) -> None:
        """Bring the hyperparameters on the device up to date.

        Args:
            hypers: The rows of hyperparameters.
            max_norm: What the gradient norm is clipped to, or None.
            device: Where they go.

        Raises:
            RuntimeError: During a CUDA-graph capture, which would replay these numbers for ever.
        """
        max_norm = math.inf if max_norm is None else max_norm
        rows, live = [], []
        for index, hyper in enumerate(hypers):
            columns = {Column.LR: hyper.lr, Column.BETA1: hyper.beta1, Column.BETA2: hyper.beta2}
            columns |= {Column.STRENGTH: hyper.strength, Column.BETA_FACTOR: hyper.beta_factor}
            columns[Column.SIGN] = -hyper.factor if hyper.maximize else hyper.factor
            row = [0.0] * len(Column)
            for column, value in columns.items():
                if isinstance(value, Tensor) and value.device == device:
                    live.append((index, column, value))
                    row[column] = math.nan  # unlike any number that may follow the tensor
                else:
                    row[column] = float(value)
            row[Column.EPS], row[Column.WEIGHT_DECAY] = hyper.eps, hyper.weight_decay
            row[Column.MAX_NORM] = max_norm
            rows.append(row)
        if self._hyper is None or self._hyper.shape[0] != len(rows) or self._rows != rows:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "hyperparameters have changed since the last step: take one, or call "
                    "write_hyperparameters(), before capturing a CUDA graph"
                )
            values = torch.tensor(rows, dtype=torch.float64, device="cpu")
            if self._hyper is None or self._hyper.shape != values.shape:
                self._hyper = torch.empty_like(values, device=device)
            pinned = values.pin_memory() if device.type == "cuda" else values
            self._hyper.copy_(pinned, non_blocking=True)
            self._rows = rows
        for index, column, value in live:
            self._hyper[index, column].copy_(value.detach().reshape(()))

    def _tables_for(self, batch: Batch, options: Options) -> "FusedAdam":
        """Return the kernels' tables for these tensors: the last ones, if nothing has moved."""
        from ars.csrc_triton.step import FusedAdam

        hyper = self._hyper
        assert hyper is not None  # written before the tables are asked for
        key = (batch, hyper, options.controller, options.decoupled, options.proximal)
        fused = self._fused
        if fused is None or not all(map(is_, self._key, key)) or fused.is_outdated():
            fused = FusedAdam(
                batch.tensors,
                batch.groups,
                hyper=hyper,
                decoupled=options.decoupled,
                controller=_for_kernels(options.controller),
                proximal=options.proximal,
                stochastic=options.stochastic,
                seed=options.seed,
                numbers=batch.numbers,
                diagnostics=options.diagnostics,
            )
            self._fused, self._key = fused, key
        return fused


def _for_kernels(controller: ARSController | None) -> "Controller | None":
    """Hand the kernels the controller's own tensors, and its constants as one more."""
    from ars.csrc_triton.step import Controller

    if controller is None:
        return None
    config = controller.config
    constants = [getattr(config, column.name.lower()) for column in Config]
    return Controller(
        window=controller.window,
        counts=controller.counts,
        gate_state=controller.gate_state,
        config=torch.tensor(constants, dtype=torch.float64, device=controller.window.device),
        seed=config.seed,
        gate=config.gate,
        standardize=config.standardize,
        detrend=config.detrend,
    )
