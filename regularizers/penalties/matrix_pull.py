"""The pull of one layer's matrix: anchor, Kronecker factors and the buffers of its gradient."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ars.reference import kronecker_gradient, kronecker_value
from ars.regularizers.checks import check_can_differentiate
from ars.regularizers.fisher.estimators import accumulation_dtype
from ars.regularizers.fisher.kronecker import KroneckerFactors, nearest_product
from ars.regularizers.penalties.penalty_base import check_unmoved
from ars.regularizers.penalties.sharded_value import with_gradients
from ars.sharded import (
    divides,
    indices_here,
    is_placed_like,
    is_sharded,
    part_of,
    place_like,
    whole,
    with_part,
    with_rows,
)

__all__ = ["MatrixPull"]

# How far a factor may be from its transpose, relative to its largest entry. Sums of outer products
# in float32 are off by about 1e-7; a factor stored in bfloat16 is symmetric as well.
ASYMMETRY = 1e-4


class MatrixPull:
    """Anchor, factors and buffers of one weight and its bias.

    Args:
        name: Of the weight.
        bias: Name of the bias that belongs to it, or None.
        parameters: Both, by name.
        inputs: A, (d, d), or (d + 1, d + 1) with the bias. With a dimension in front, that of each
            of as many matrices that the weight holds: (matrices, p, d), or (matrices * p, d).
        outputs: G, (p, p), likewise, or None for the identity.
        transposed: Whether the weight is stored as W^T, (d, p).

    Raises:
        TypeError: A factor is not a floating-point tensor.
        ValueError: The weight is no matrix, does not hold as many as A has, or is sharded and
            transposed or of several; A asks for a bias that there is not, or a factor has the wrong
            shape, or is not finite or not symmetric or has a negative diagonal.
    """

    _rows: Tensor | None = None  # what pickles of earlier versions do not hold
    _transposed = False
    _blocks: int | None = None  # how many matrices; None for one, without a dimension for them

    def __init__(
        self,
        name: str,
        bias: str | None,
        parameters: Mapping[str, nn.Parameter],
        inputs: Tensor,
        outputs: Tensor | None,
        *,
        transposed: bool = False,
    ) -> None:
        check_can_differentiate("building a penalty")
        weight = parameters[name]
        if weight.ndim < 2:
            raise ValueError(
                f"{name!r} has shape {tuple(weight.shape)} and is no matrix; leave it out, and "
                "restrain it with an EWC"
            )
        self.name, self._transposed = name, transposed
        rows, columns = len(weight), math.prod(weight.shape[1:])
        if isinstance(inputs, Tensor) and inputs.ndim == 3:
            self._blocks = _checked_blocks(name, weight, len(inputs))
            rows, columns = weight.shape[:-1].numel() // self._blocks, weight.shape[-1]
        if transposed:
            rows, columns = columns, rows
            if is_sharded(weight):
                raise ValueError(
                    f"{name!r} is stored transposed (Conv1D) and sharded, so by the columns of its "
                    "matrix, which a Kronecker factor mixes; restrain it with an EWC"
                )
        self._parts: dict[str, nn.Parameter] = {name: weight}
        if isinstance(inputs, Tensor) and inputs.shape[-2:] == (columns + 1, columns + 1):
            if bias is None:
                raise ValueError(
                    f"A of {name!r} has {columns + 1} rows for {columns} columns and a bias, but "
                    "the weight's layer trains no bias; freeze a layer after its penalty is built, "
                    "or leave out the last row and column"
                )
            self._parts[bias] = parameters[bias]
        dtype = accumulation_dtype(weight.dtype)
        self._size = rows, columns + (len(self._parts) == 2)
        self._has_outputs = outputs is not None
        self.check("", inputs, outputs)
        _check_placement(self._parts)
        # Which rows of G belong to the rows that are here; None for all.
        self._rows = indices_here(weight, rows=True) if is_sharded(weight) else None
        self.anchor = with_rows(self._matrix().detach(), weight)
        self.inputs = inputs.detach().to(weight.device, dtype, copy=True)
        self.outputs = (
            None if outputs is None else outputs.detach().to(weight.device, dtype, copy=True)
        )
        self._buffers = {n: torch.zeros_like(p, dtype=dtype) for n, p in self._parts.items()}

    def check(self, source: str, inputs: Tensor, outputs: Tensor | None) -> None:
        """Refuse factors that are not those of this layer.

        Args:
            source: Begins the messages, such as ``"the state's "``.
            inputs: A.
            outputs: G or None.

        Raises:
            ValueError: G is missing, or there is one too many; or see the constructor.
        """
        if (outputs is not None) != self._has_outputs:
            raise ValueError(
                f"{source}G of {self.name!r} is {'missing' if self._has_outputs else 'too much'}: "
                "this penalty was built "
                f"{'with' if self._has_outputs else 'from activations, without'} output factors"
            )
        blocks = () if self._blocks is None else (self._blocks,)
        rows, columns = self._size
        _check_factor(f"{source}A of {self.name!r}", inputs, (*blocks, columns, columns))
        if outputs is not None:
            _check_factor(f"{source}G of {self.name!r}", outputs, (*blocks, rows, rows))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The weight, and the bias if it has a part, by name."""
        return self._parts

    def named_anchor(self) -> dict[str, Tensor]:
        """Return the anchor of the weight, and of the bias, by parameter name."""
        anchor = part_of(self.anchor)
        return {n: with_part(self._cut(anchor, n), part) for n, part in self._parts.items()}

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return each parameter with its buffer."""
        return [(p, self._buffers[name]) for name, p in self._parts.items()]

    def value(self, strength: float | Tensor) -> Tensor:
        """Return the penalty of this layer, differentiable in its parameters: of its rows here."""
        self._check_unmoved()
        if self._rows is not None:
            with torch.no_grad():
                value = self.pull_(strength)
                gradients = [part_of(buffer).clone() for buffer in self._buffers.values()]
            return with_gradients(value, list(self._parts.values()), gradients)
        with torch.autocast(device_type=self.anchor.device.type, enabled=False):
            delta = self._matrix() - self.anchor
            return kronecker_value(delta, self.inputs, self.outputs, strength)

    def pull_(self, strength: float | Tensor) -> Tensor:
        """Write the gradient to the buffers; return the penalty of the rows that are here, 0-d."""
        self._check_unmoved()
        with torch.autocast(device_type=self.anchor.device.type, enabled=False):
            delta = self._matrix() - part_of(self.anchor)
            if self._rows is None or self.outputs is None:
                gradient = kronecker_gradient(delta, self.inputs, self.outputs, strength)
            else:  # G mixes the rows of all processes
                weight = next(iter(self._parts.values()))
                rows = whole(with_rows(delta @ self.inputs, weight)).to(delta)
                gradient = strength * (self.outputs[self._rows.to(delta.device)] @ rows)
            for name, buffer in self._buffers.items():
                part_of(buffer).copy_(self._cut(gradient, name))
            return 0.5 * torch.dot(delta.flatten(), gradient.flatten())

    def consolidate(self, inputs: Tensor, outputs: Tensor | None, decay: float) -> None:
        """Add checked factors to ``decay`` times the old ones, and anchor at the parameters."""
        inputs = inputs.detach().to(self.inputs)
        if self.outputs is None or outputs is None:
            self.inputs.mul_(decay).add_(inputs)
        else:
            old = KroneckerFactors(self.inputs, decay * self.outputs)
            new = KroneckerFactors(inputs, outputs.detach().to(self.outputs))
            for number in [...] if self._blocks is None else range(self._blocks):
                parts = [KroneckerFactors(*(f[number] for f in each)) for each in (old, new)]
                nearest = nearest_product(*parts)
                self.inputs[number] = nearest.inputs
                self.outputs[number] = nearest.outputs
        part_of(self.anchor).copy_(self._matrix())

    def decay_(self, decay: float) -> None:
        """Multiply the importance with ``decay``, and anchor at the parameters."""
        (self.inputs if self.outputs is None else self.outputs).mul_(decay)
        part_of(self.anchor).copy_(self._matrix())

    def moved(self, parameters: Mapping[str, nn.Parameter]) -> "MatrixPull":
        """Return this pull for the same parameters that are placed in another way.

        Args:
            parameters: The parameters as they are placed now, by name.
        """
        name, *bias = self._parts
        first = bias[0] if bias else None
        pull = MatrixPull(
            name, first, parameters, self.inputs, self.outputs, transposed=self._transposed
        )
        part_of(pull.anchor).copy_(part_of(place_like(self.anchor, pull.anchor)))
        return pull

    def _check_unmoved(self) -> None:
        for name, buffer in self._buffers.items():
            check_unmoved(name, self._parts[name], buffer, same_dtype=True)

    def _matrix(self) -> Tensor:
        """Return a copy of the rows of [W b] that are here, in the dtype of the computation."""
        weight, *bias = map(part_of, self._parts.values())
        if self._blocks is not None:
            matrix = weight.reshape(self._blocks, -1, weight.shape[-1])
        else:
            matrix = weight.mT if self._transposed else weight.flatten(1)
        columns = [matrix, *(b.view(*matrix.shape[:-1], 1) for b in bias)]
        return torch.cat(columns, -1).to(accumulation_dtype(weight.dtype))

    def _cut(self, matrix: Tensor, name: str) -> Tensor:
        """Return the part of rows like those of [W b] that belongs to one of the two."""
        part = part_of(self._parts[name])
        if part.ndim == 1:
            return matrix[..., -1].reshape(part.shape)
        if self._blocks is not None:
            return matrix[..., : part.shape[-1]].reshape(part.shape)
        if self._transposed:
            return matrix[:, : len(part)].mT
        return matrix[:, : math.prod(part.shape[1:])].view_as(part)


def _checked_blocks(name: str, weight: Tensor, blocks: int) -> int:
    """Return how many matrices a weight is taken for.

    Raises:
        ValueError: It does not hold as many, or is sharded.
    """
    fits = len(weight) == blocks if weight.ndim == 3 else len(weight) % max(blocks, 1) == 0
    if blocks == 0 or weight.ndim > 3 or not fits:
        raise ValueError(
            f"A of {name!r} is of {blocks} matrices, which a weight of shape {tuple(weight.shape)} "
            "does not hold; give (d, d) for one, or fit it on the model as it is now"
        )
    if is_sharded(weight):
        raise ValueError(
            f"{name!r} holds several matrices and is sharded, and what of them is here has no "
            "factors of its own; restrain it with an EWC"
        )
    return blocks


def _check_placement(parts: Mapping[str, nn.Parameter]) -> None:
    """Refuse a weight that is not divided by rows, and its bias with it.

    Raises:
        ValueError: That is so; names it.
    """
    weight_name, *others = parts
    weight: Any = parts[weight_name]
    if is_sharded(weight) and any(divides(p, rows=False) for p in weight.placements):
        raise ValueError(
            f"{weight_name!r} is sharded by columns, {tuple(weight.placements)}, and a Kronecker "
            "factor mixes these; shard it by rows, as fully_shard does, or restrain it with an EWC"
        )
    for name in others:
        if not is_placed_like(parts[name], weight):
            raise ValueError(
                f"{name!r} is not distributed as its {weight_name!r} is; shard both by rows, or "
                "leave the last row and column of A out"
            )


def _check_factor(what: str, factor: object, shape: tuple[int, ...]) -> None:
    """Refuse what cannot be a second moment, or several, of this shape.

    Raises:
        TypeError: Not a floating-point tensor.
        ValueError: A wrong shape, a value that is not finite, or no second moment.
    """
    if not isinstance(factor, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(factor).__name__}")
    if not factor.is_floating_point():
        raise TypeError(f"{what} must be floating point, got {factor.dtype}")
    if factor.shape != shape:
        raise ValueError(
            f"{what} has shape {tuple(factor.shape)}, expected {shape}; "
            "fit it on the model as it is now"
        )
    if not factor.isfinite().all():
        raise ValueError(f"{what} is not finite; look for an overflow where it was computed")
    largest = factor.abs().max()
    if (factor - factor.mT).abs().max() > ASYMMETRY * largest:
        raise ValueError(f"{what} is not symmetric; it must be a second moment")
    if (factor.diagonal(dim1=-2, dim2=-1) < 0).any():
        raise ValueError(f"{what} has a negative diagonal; mean squares are >= 0")
