"""The host side of the fused step: its tensors, what is required of them, and where they are."""

from collections.abc import Sequence
from itertools import compress
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ars.csrc_triton import launches
from ars.csrc_triton.launches import Launches
from ars.csrc_triton.layout import Diagnostic, Operands
from ars.csrc_triton.split import Controller, split_launches
from ars.csrc_triton.tiles import GradientTable, address_table
from ars.csrc_triton.validation import (
    PARAM_DTYPES,
    check_buffer,
    check_controller,
    check_hyper,
    check_numbers,
    check_operands,
    check_params,
    check_same,
)

__all__ = ["Controller", "FusedAdam"]

_DTYPE, _SHAPE = attrgetter("dtype"), attrgetter("shape")


class FusedAdam:
    r"""Everything one device needs to take fused steps: tables, scalars, workspaces.

    A step is eqs. (1) to (9) of :mod:`ars.reference` in two launches, or one control launch per
    parameter dtype (if the gradient norm is needed) and one more for each: no host
    synchronisation, and no compilation after the first step. ``hyper`` and ``Controller.config``
    are read on the device at every step: rewrite them in place between steps, or between replays
    of a CUDA graph. Parameters, moments, steps and products are written in place.

    Args:
        tensors: What belongs to each parameter, see :class:`~ars.csrc_triton.layout.Operands`.
        groups: Row of ``hyper`` of each parameter.
        hyper: Hyperparameters, (G, 9) float64, see :class:`~ars.csrc_triton.layout.Hyper`.
        decoupled: AdamW's weight decay; otherwise it joins the gradient (Adam).
        controller: The controller, or None for constant betas.
        proximal: Apply EWC as the proximal step (9) instead of as a gradient (8).
        stochastic: Round bfloat16 parameters and their moments stochastically, see
            :func:`ars.reference.rounding_bits`.
        seed: Key of that rounding, 64 bits.
        numbers: Index of each parameter for that rounding; by default its place in ``tensors``.
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
        tensors: Sequence[Operands],
        groups: list[int],
        *,
        hyper: Tensor,
        decoupled: bool,
        controller: Controller | None,
        proximal: bool = False,
        stochastic: bool = False,
        seed: int = 0,
        numbers: list[int] | None = None,
        diagnostics: Tensor | None = None,
    ) -> None:
        params = [one.param for one in tensors]
        check_params(params, launches.DEVICE_TYPE)
        check_hyper(hyper, groups, params)
        gates_betas = controller is not None and "betas" in controller.gate
        check_operands(tensors, gates_betas=gates_betas, stochastic=stochastic)
        numbers = list(range(len(params))) if numbers is None else numbers
        check_numbers(numbers, params)
        if controller is not None:
            check_controller(
                controller.window,
                controller.counts,
                controller.gate_state,
                controller.config,
                hyper,
            )
        if diagnostics is not None:
            check_buffer("diagnostics", diagnostics, (len(Diagnostic),), hyper)
        device = params[0].device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("make a FusedAdam, or take a step, before capturing a CUDA graph")

        # Their addresses are in the tables: kept alive, and looked at before every step. Those of a
        # parameter side by side, as they lie in memory: with many tensors that is twice as fast.
        self._tensors = [tensor for one in tensors for tensor in one if tensor is not None]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        self._params = params
        self._gated = controller is not None
        with torch.cuda.device_of(params[0]):
            self._table = address_table(tensors, groups, numbers, device)
            self._gradients = GradientTable(len(params), device)
            self._launches = Launches(
                split_launches(tensors, device), self._table, hyper, controller,
                decoupled=decoupled, proximal=proximal, seed=seed, diagnostics=diagnostics,
            )  # fmt: skip
        self.diagnostics = self._launches.diagnostics
        self._like = _layouts(params)
        self._devices = {params[0].get_device()}
        self._filled = [param.numel() > 0 for param in params]
        self._layout: object = None
        self._strided = [i for i, param in enumerate(params) if not param.is_contiguous()]

    def is_outdated(self) -> bool:
        """Whether a tensor lies elsewhere than the tables say; then make another FusedAdam."""
        return self._addresses != list(map(Tensor.data_ptr, self._tensors))

    def step(
        self,
        grads: list[Tensor],
        *,
        loss: Tensor | None,
        clip: bool,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        layout: object = None,
    ) -> None:
        """Take one step.

        Args:
            grads: Gradients, like the parameters in shape, dtype and memory order.
            loss: The surprise, 0-d and floating, on the same device; None observes the gradient
                norm. Without a controller it is not read.
            clip: Whether the gradient norm is needed for clipping: any ``MAX_NORM`` is finite.
            grad_scale: What the gradients are multiples of, one float32 on the device, or None.
                They are divided by it where they are read; the gradients stay.
            found_inf: Unless it is 0, nothing moves: no parameter, moment, step or product, not
                the controller, not the diagnostics. One float32 on the device, or None.
            layout: If it is the last step's object, the gradients' dtypes, shapes and memory
                orders are taken to be that step's too, and so are the parameters'.

        Raises:
            TypeError: If a gradient's dtype, or another argument's, is not as above.
            ValueError: If a shape, device or memory order is another.
        """
        found = self._check_gradients(grads, seen=layout is not None and layout is self._layout)
        loss = self._check_number("loss", loss, PARAM_DTYPES) if self._gated else None
        self._layout = layout
        grad_scale = self._check_number("grad_scale", grad_scale, (torch.float32,))
        found_inf = self._check_number("found_inf", found_inf, (torch.float32,))
        with torch.cuda.device_of(self._table):
            grad_table = self._gradients.refresh(found)
            norm = clip or (self._gated and loss is None)
            self._launches.control(grad_table, loss, grad_scale, found_inf, norm=norm)
            self._launches.update(grad_table)
        # Autograd must notice, as with any operation in place.
        torch.autograd.graph.increment_version(self._params)

    def _check_gradients(self, grads: list[Tensor], *, seen: bool = False) -> list[int]:
        """Validate the gradients and return their addresses.

        With ``seen``, they are laid out as the last ones. One that has its parameter's dtype, shape
        and contiguity is right if it has memory, on the device; only others, and the few strided
        ones, are worth the microsecond of a closer look.

        Raises:
            ValueError: If there is not one for each parameter, or a parameter has changed since the
                tables were made.
        """
        if len(grads) != len(self._params):
            raise ValueError(f"{len(grads)} gradients for {len(self._params)} parameters")
        try:
            found = list(map(Tensor.data_ptr, grads))
            right = seen or self._like == _layouts(grads)
        except RuntimeError:  # a sparse tensor, say, has no address: found out below
            found, right = [], False
        if right and self._gradients.needs_upload(found):
            somewhere = 0 not in compress(found, self._filled)
            right = somewhere and set(map(Tensor.get_device, grads)) == self._devices
        for index in self._strided if right else range(len(grads)):
            param = self._params[index]
            check_same("gradient", index, grads[index], param, param.dtype)
        if not right and self._like != _layouts(self._params):
            self._addresses = []  # they have moved, in a way
            raise ValueError(
                "a parameter has another dtype, shape or memory order than when its gradient was "
                "last looked at; take the step again, for new tables"
            )
        return found

    def _check_number(
        self, name: str, number: Tensor | None, dtypes: tuple[torch.dtype, ...]
    ) -> Tensor | None:
        if number is None:
            return None
        if number.dtype not in dtypes:
            expected = "a floating-point tensor" if len(dtypes) > 1 else f"a {dtypes[0]} tensor"
            raise TypeError(f"{name} is {number.dtype}; pass {expected}")
        if number.numel() != 1 or number.device != self._table.device:
            raise ValueError(
                f"{name} has shape {tuple(number.shape)} on {number.device}; pass one number on "
                f"{self._table.device}"
            )
        return number.detach()


def _layouts(tensors: list[Tensor]) -> tuple[list[Any], ...]:
    """What a gradient must have in common with its parameter, as fast as it can be had."""
    dtypes, shapes = map(_DTYPE, tensors), map(_SHAPE, tensors)
    return list(dtypes), list(shapes), list(map(Tensor.is_contiguous, tensors))
