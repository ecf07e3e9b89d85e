"""The tensors of a step cut into runs that stay in a CPU's cache between operations."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ars.batch import Batch

__all__ = ["BLOCK", "Piece", "runs"]

# Elements of a run: long enough to hide the calls, short enough for a second-level cache.
BLOCK = 1 << 17


class Piece(NamedTuple):
    """A stretch of one tensor's operands, all of them flat and of the same length."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    grad: Tensor
    anchor: Tensor | None
    importance: Tensor | None
    step: Tensor  # 0-d, of the whole tensor

    @property
    def kind(self) -> tuple[torch.dtype, bool, bool]:
        """What must be alike to be updated in one call: dtype, amsgrad, penalty."""
        return self.exp_avg.dtype, self.max_exp_avg_sq is not None, self.anchor is not None


def runs(batch: Batch, members: list[int]) -> Iterator[list[Piece]]:
    """Cut large tensors, and gather small ones, into runs of at most ``BLOCK`` elements.

    A strided operand is worked on as a dense copy, written back after the last run.

    Args:
        batch: The tensors.
        members: Which of them.

    Yields:
        Pieces of one kind; to be updated before the next run is asked for.
    """
    run: list[Piece] = []
    size = 0
    copies: list[tuple[Tensor, Tensor]] = []
    for i in members:
        written = (
            batch.params[i], batch.exp_avgs[i], batch.exp_avg_sqs[i], batch.max_exp_avg_sqs[i]
        )  # fmt: skip
        read = (batch.grads[i], batch.anchors[i], batch.importances[i])
        dense = [None if t is None else t.contiguous() for t in written + read]
        for original, copy in zip(written, dense, strict=False):
            if original is not None and copy is not None and copy is not original:
                copies.append((original, copy))
        flat = [None if t is None else t.view(-1) for t in dense]
        numel = batch.params[i].numel()
        for start in range(0, numel, BLOCK):
            stop = min(start + BLOCK, numel)
            cut = flat if numel <= BLOCK else [None if t is None else t[start:stop] for t in flat]
            piece = Piece._make([*cut, batch.steps[i]])
            if run and (size + stop - start > BLOCK or piece.kind != run[0].kind):
                yield run
                run, size = [], 0
            run.append(piece)
            size += stop - start
    if run:
        yield run
    for original, copy in copies:
        original.copy_(copy)
