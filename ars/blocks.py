"""The tensors of a step cut into runs that stay in a CPU's cache between operations."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ars.batch import Batch
from ars.reference.penalties import SCALED, decode_importance

__all__ = [
    "BLOCK", "Operands", "Piece", "Run", "Scratch", "as_flat", "gathered", "operands", "runs",
]  # fmt: skip

# Elements of a run: long enough to hide the calls, short enough for a second-level cache.
BLOCK = 1 << 17


class Operands(NamedTuple):
    """What one tensor's update reads and writes, but for its gradient; all of one shape."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    anchor: Tensor | None
    importance: Tensor | None
    pull: Tensor | None

    @property
    def written(self) -> list[Tensor]:
        """Those that the update changes."""
        return [t for t in self[:4] if t is not None]


def operands(batch: Batch, i: int) -> Operands:
    """Return the operands of tensor i."""
    return Operands(
        batch.params[i],
        batch.exp_avgs[i],
        batch.exp_avg_sqs[i],
        batch.max_exp_avg_sqs[i],
        batch.anchors[i],
        batch.importances[i],
        batch.pulls[i],
    )


def as_flat(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return a tensor's elements as one row, in the memory order that ``strides`` mean.

    A view if the tensor has these strides; otherwise a copy.

    Args:
        tensor: Any tensor.
        strides: Strides of a dense tensor of its shape.

    Returns:
        The elements, shape (numel,).
    """
    if tensor.stride() != strides:
        dense = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device="cpu")
        tensor = dense.copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


class Piece(NamedTuple):
    """A stretch of one tensor's operands, each of them a row of the same length."""

    operands: Operands
    scale: Tensor | None  # of a compressed importance
    step: Tensor  # 0-d, of the whole tensor
    tensor: int  # its index in the batch
    part: int  # which of its stretches of BLOCK elements

    @property
    def kind(self) -> tuple[torch.dtype, bool, bool, bool]:
        """What must be alike to be updated in one call: dtype, amsgrad, penalty, pull."""
        _, exp_avg, _, largest, anchor, _, pull = self.operands
        return exp_avg.dtype, largest is not None, anchor is not None, pull is not None

    def importance(self) -> Tensor:
        """Return how hard the penalty pulls, a floating-point row; for penalised pieces only."""
        importance = self.operands.importance
        assert importance is not None
        return importance if self.scale is None else decode_importance(importance, self.scale)


class Scratch:
    """Memory for intermediate results: new memory for each would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._rows: dict[torch.dtype, Tensor] = {}

    def rows(self, dtype: torch.dtype) -> Tensor:
        """Return four rows of a dtype, shape (4, BLOCK)."""
        if dtype not in self._rows:
            self._rows[dtype] = torch.empty(4, BLOCK, dtype=dtype, device="cpu")
        return self._rows[dtype]


class Run:
    """Pieces of one kind that are updated together: at most ``BLOCK`` elements.

    Attributes:
        pieces: The pieces.
        columns: The lists of their operands.
        steps: Their tensors' step counters.
        sizes: Their numbers of elements.
        theta, gradient, delta, pull: Rows of scratch for all pieces together.
        thetas, gradients: The stretches of the first two that belong to each piece.
    """

    def __init__(self, pieces: list[Piece], scratch: Scratch) -> None:
        self.pieces = pieces
        self.dtype, self.amsgrad, self.penalized, self.pulled = pieces[0].kind
        self.columns: Any = Operands._make(
            list(column) for column in zip(*(piece.operands for piece in pieces), strict=True)
        )
        self.steps = [piece.step for piece in pieces]
        self.sizes = sizes = [piece.operands.param.numel() for piece in pieces]
        rows = scratch.rows(self.dtype)[:, : sum(sizes)]
        self.theta, self.gradient, self.delta, self.pull = rows
        self.thetas, self.gradients = self.theta.split(sizes), self.gradient.split(sizes)


def gathered(stretches: list[Tensor], row: Tensor) -> Tensor:
    """Return stretches as one, in the dtype of ``row``: a lone one as it is, or copied there."""
    if len(stretches) > 1:
        return torch.cat(stretches, out=row)
    return stretches[0] if stretches[0].dtype == row.dtype else row.copy_(stretches[0])


def runs(batch: Batch, tensors: Iterable[tuple[int, Operands]], scratch: Scratch) -> Iterator[Run]:
    """Cut large tensors, and gather small ones, into runs.

    Args:
        batch: The batch they are in.
        tensors: Their indices and operands, as rows.
        scratch: Memory that all runs share.

    Yields:
        The runs.
    """
    pending: list[Piece] = []
    size = 0
    for index, rows in tensors:
        numel = rows.param.numel()
        for part, start in enumerate(range(0, numel, BLOCK)):
            stop = min(start + BLOCK, numel)
            whole = numel <= BLOCK
            cut = rows if whole else [None if t is None else t[start:stop] for t in rows]
            scale = batch.scales[index]
            if scale is not None:
                scale = scale[start // SCALED : -(-stop // SCALED)]
            piece = Piece(Operands._make(cut), scale, batch.steps[index], index, part)
            if pending and (size + stop - start > BLOCK or piece.kind != pending[0].kind):
                yield Run(pending, scratch)
                pending, size = [], 0
            pending.append(piece)
            size += stop - start
    if pending:
        yield Run(pending, scratch)
