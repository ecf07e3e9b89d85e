r"""The quadratic pull of tensors towards their anchors, as one differentiable operation.

    E = 1/2 lambda sum_i Omega_i (theta_i - theta*_i)^2
    dE/dtheta_i = lambda Omega_i (theta_i - theta*_i)

One pass over the operands each way; between them only references are kept, no difference and no
product. Autograd's own graph of the same formula keeps two tensors of every parameter's size.
Oracle: :func:`ars.reference.ewc_value` and :func:`ars.reference.ewc_gradient`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ars.reference import ewc_gradient
from ars.regularizers.checks import check_can_differentiate
from ars.regularizers.fisher.estimators import accumulation_dtype
from ars.regularizers.penalties.penalty_base import copy_like
from ars.regularizers.storage import Quantized, dequantize, quantize
from ars.sharded import is_sharded, part_of, place_like, sum_of_parts, with_part

__all__ = ["Pull", "quadratic_value"]

# Elements worked on at once on a CPU: the intermediate results stay in the second-level cache.
_BLOCK = 1 << 17

_Operands: TypeAlias = tuple[Tensor, Tensor, Tensor]  # parameter, anchor, importance


class Pull:
    """Anchor and importance of one parameter, with the parameter's strides and device.

    Args:
        name: Of the parameter, for messages.
        param: The parameter, which becomes the anchor.
        importance: Omega, checked, of the parameter's shape.
        storage: ``"full"``, ``"bfloat16"`` or ``"compact"``, which is the anchor in bfloat16 and
            the importance in uint8 (:func:`~ars.regularizers.quantize`): 8, 4 or 3.06 bytes.

    Raises:
        ValueError: ``"compact"`` for a parameter that is not contiguous.
    """

    def __init__(self, name: str, param: Tensor, importance: Tensor, storage: str) -> None:
        check_can_differentiate("building a penalty")
        self.param = param
        self.anchor = copy_like(param, param)
        self.importance: Tensor | Quantized = copy_like(param, importance)
        if storage != "full":
            self.anchor = self.anchor.bfloat16()
        if storage == "bfloat16":
            self.importance = self.importance.bfloat16()
        if storage == "compact":
            if not part_of(param).is_contiguous():
                raise ValueError(
                    f"{name!r} is not contiguous, and the blocks of the uint8 importance follow "
                    "the row-major order; use storage='bfloat16', or make it contiguous"
                )
            values, scale = quantize(part_of(self.importance))
            self.importance = Quantized(with_part(values, param), scale)

    def omega(self) -> Tensor:
        """Return the importance in floating point; what is stored, where it is stored so."""
        if isinstance(self.importance, Quantized):
            values, scale = self.importance
            return with_part(dequantize(part_of(values), scale), self.param)
        return self.importance

    def assign(self, importance: Tensor, anchor: Tensor) -> None:
        """Overwrite both in place, so that who holds the tensors sees the new values.

        Args:
            importance: In floating point; whole, or placed in any way.
            anchor: Of any floating dtype; likewise.
        """
        part_of(self.anchor).copy_(part_of(place_like(anchor, self.param)))
        part = part_of(place_like(importance, self.param))
        if isinstance(self.importance, Quantized):
            for stored, new in zip(self.importance, quantize(part), strict=True):
                part_of(stored).copy_(new)
        else:
            part_of(self.importance).copy_(part)

    def moved(self, param: Tensor, storage: str) -> "Pull":
        """Return this pull for the same parameter that is placed in another way.

        Args:
            param: The parameter as it is placed now.
            storage: As it was made with.
        """
        pull = Pull("", param, self.omega(), storage)
        part_of(pull.anchor).copy_(part_of(place_like(self.anchor, param)))
        return pull

    def term(self) -> tuple[Tensor, ...]:
        """Return (parameter, anchor, importance), or with uint8 (.., importance, scale)."""
        importance = self.importance
        stored = importance if isinstance(importance, Quantized) else (importance,)
        return (self.param, self.anchor, *stored)


def quadratic_value(pulls: Sequence[Pull], strength: float | Tensor) -> Tensor:
    """Return E as a differentiable function of the parameters, of any order.

    Args:
        pulls: The terms; not empty.
        strength: Lambda. A tensor is read now: changing it before the backward pass is harmless.

    Returns:
        E, 0-d, float32 (float64 with a float64 parameter), on the first parameter's device.
    """
    value: Tensor = _Quadratic.apply(pulls, strength, *(pull.param for pull in pulls))
    return value


class _Quadratic(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pulls: Sequence[Pull], strength: float | Tensor, *params: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*params)
        ctx.pulls = pulls
        ctx.strength = strength.clone() if isinstance(strength, Tensor) else strength
        sharded = any(is_sharded(pull.param) for pull in pulls)
        total: Any = 0.0
        totals: list[Tensor] = []
        for pull in pulls:
            for theta, anchor, omega in _pieces(pull.param, pull):
                delta = theta - anchor
                square = (delta * delta).mul_(omega).sum()
                total = total + square.to(params[0].device)
            if sharded:
                totals.append(total)
                total = 0.0
        if sharded:
            total = sum_of_parts(totals, params)
        value: Tensor = total * (0.5 * ctx.strength)
        return value

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = []
        needed = ctx.needs_input_grad[2:]
        for pull, param, needs in zip(ctx.pulls, ctx.saved_tensors, needed, strict=True):
            if not needs:
                gradients.append(None)
                continue
            scale = (outputs[0] * ctx.strength).to(param.device)
            if torch.is_grad_enabled():  # of a gradient that is to be differentiated again
                gradient = ewc_gradient(param, _wide_anchor(pull), pull.omega(), scale)
            else:
                dtype = accumulation_dtype(param.dtype)
                gradient = torch.empty_like(param, dtype=dtype)
                part = part_of(gradient)
                results = _flat(part) if _works_in_blocks(pull) else (part,)
                for (theta, anchor, omega), result in zip(
                    _pieces(param, pull), results, strict=True
                ):
                    torch.sub(theta, anchor, out=result).mul_(omega).mul_(scale)
            gradients.append(gradient.to(param.dtype))
        return (None, None, *gradients)


def _wide_anchor(pull: Pull) -> Tensor:
    """Return the anchor in the dtype of the computation: a bfloat16 difference would be rounded."""
    return pull.anchor.to(accumulation_dtype(pull.param.dtype))


def _works_in_blocks(pull: Pull) -> bool:
    """Whether to work in blocks: on a CPU, where all operands lie in memory in one order."""
    part = part_of(pull.param)
    return part.device.type == "cpu" and part.is_contiguous()


def _flat(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.view(-1).split(_BLOCK)


def _pieces(param: Tensor, pull: Pull) -> Iterator[_Operands]:
    operands = (
        part_of(param).detach(), part_of(_wide_anchor(pull)), part_of(pull.omega()),
    )  # fmt: skip
    if not _works_in_blocks(pull):
        yield operands
        return
    yield from zip(*(_flat(t) for t in operands), strict=True)
