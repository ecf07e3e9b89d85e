"""How a step on a CPU is divided into calls of torch's kernels, kept from step to step."""

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ars.batch import Batch
from ars.blocks import BLOCK, Operands, Run, Scratch, as_flat, operands, runs

__all__ = ["Alike", "Direct", "Plan"]


class Direct(NamedTuple):
    """Tensors that torch's kernel can update as they are."""

    indices: list[int]  # in the batch
    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]  # empty without amsgrad
    steps: list[Tensor]


class Alike(NamedTuple):
    """Tensors of one group whose betas have the same products."""

    first: int  # any of them
    direct: Direct
    runs: list[Run]  # those that need work before
    strided: list[int]  # those whose elements lie apart, or in different orders


class Plan:
    """The division of one batch.

    Args:
        batch: The tensors.
        kinds: What tensors that are updated together have in common: their group, or more.
        scratch: Memory for the runs.
        scaled: Whether gradients must be multiplied before torch's kernel may see them.
    """

    def __init__(self, batch: Batch, kinds: list[int], scratch: Scratch, *, scaled: bool) -> None:
        self._batch, self._classes_of, self._scaled = batch, kinds, scaled
        self._strides = [param.stride() for param in batch.params]
        self._layout = batch.layout
        self._static = [operands(batch, i) for i in range(len(batch.params))]
        self._cut: list[int] = []
        members: dict[int, list[int]] = defaultdict(list)
        for i, kind in enumerate(kinds):
            members[kind].append(i)
        self.classes = [self._alike(indices, scratch) for indices in members.values()]
        # Views are kept of these; the others are handed to torch's kernel as the objects they are.
        self._viewed = [t for i in self._cut for t in self._static[i] if t is not None]
        self._addresses = list(map(Tensor.data_ptr, self._viewed))

    def _alike(self, indices: list[int], scratch: Scratch) -> Alike:
        """Sort tensors by what their update takes."""
        direct, in_rows, strided = [], [], []
        for i in indices:
            tensors = [t for t in self._static[i] if t is not None]
            param, grad, strides = tensors[0], self._batch.grads[i], self._strides[i]
            # What zeros_like would lay out in another way has gaps or overlaps.
            dense = param.is_contiguous() or torch.empty_like(param).stride() == strides
            # A compressed importance has a scale for so many elements in the order of a dense row.
            ordered = self._batch.scales[i] is None or param.is_contiguous()
            if not (dense and ordered) or any(t.stride() != strides for t in tensors):
                strided.append(i)
            elif (
                self._scaled
                or grad.dtype != param.dtype
                or grad.stride() != strides
                or self._static[i].anchor is not None
                or self._static[i].pull is not None
                or any(t.dtype != param.dtype for t in tensors)
            ):
                in_rows.append(i)
            else:
                direct.append(i)
        self._cut += in_rows
        rows = ((i, self._as_rows(i, self._strides[i])) for i in in_rows)
        cut = list(runs(self._batch, rows, scratch))
        return Alike(indices[0], self._direct(direct), cut, strided)

    def _direct(self, indices: list[int]) -> Direct:
        batch = self._batch
        lists = batch.params, batch.exp_avgs, batch.exp_avg_sqs, batch.max_exp_avg_sqs, batch.steps
        chosen = [[t for i in indices if (t := tensors[i]) is not None] for tensors in lists]
        return Direct(indices, *chosen)

    def _as_rows(self, i: int, strides: tuple[int, ...]) -> Operands:
        return Operands._make(None if t is None else as_flat(t, strides) for t in self._static[i])

    def holds(self, batch: Batch, kinds: list[int], *, scaled: bool) -> bool:
        """Whether this is the division of these tensors as they are now, or does as well.

        One for gradients that are multiplied does for all: norms that are clipped now and then
        would otherwise cost a division each time.
        """
        return (
            batch is self._batch
            and (self._scaled or not scaled)
            and batch.layout is self._layout
            and self._classes_of == kinds
            and self._addresses == list(map(Tensor.data_ptr, self._viewed))
        )

    def stretches(self, grads: list[Tensor]) -> dict[int, tuple[Tensor, ...]]:
        """Cut the gradients of the tensors in runs as the runs are cut."""
        return {i: _cut(as_flat(grads[i], self._strides[i])) for i in self._cut}

    def strided(
        self, alike: Alike, scratch: Scratch
    ) -> Iterator[tuple[Run, dict[int, tuple[Tensor, ...]]]]:
        """Lay strided tensors out in rows, and write them back.

        Args:
            alike: The tensors.
            scratch: Memory for the runs.

        Yields:
            A run and the stretches of its gradients, to be updated before the next is asked for.
        """
        for i in alike.strided:
            strides = torch.empty(self._static[i].param.shape, device="meta").stride()
            rows = self._as_rows(i, strides)
            stretches = {i: _cut(as_flat(self._batch.grads[i], strides))}
            for run in runs(self._batch, [(i, rows)], scratch):
                yield run, stretches
            for original, row in zip(self._static[i].written, rows.written, strict=True):
                original.copy_(row.view(original.shape))


def _cut(row: Tensor) -> tuple[Tensor, ...]:
    """Cut a row into stretches of BLOCK elements."""
    return (row,) if row.numel() <= BLOCK else row.split(BLOCK)
