"""How a step on a CPU is divided into calls of torch's kernels, kept from step to step."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ars.batch import Batch, Hyper
from ars.blocks import BLOCK, Operands, Run, Scratch, as_flat, operands, runs

__all__ = ["Alike", "Plan"]

# Tensors that share a memory: pickle, unlike torch.save, saves all of it with each of them.
TOGETHER = 64


class Alike(NamedTuple):
    """Tensors of one group whose betas have the same products: they differ after a miss."""

    group: int
    first: int  # any of them
    direct: list[int]  # those that torch's kernel can update as they are
    runs: list[Run]  # those that need work before
    strided: list[int]  # those whose elements lie apart, or in different orders


class Plan:
    """The division of one batch.

    Args:
        batch: The tensors.
        scratch: Memory for the runs.
        scaled: Whether gradients must be multiplied before torch's kernel may see them.
    """

    def __init__(self, batch: Batch, scratch: Scratch, *, scaled: bool) -> None:
        self._batch, self._scaled = batch, scaled
        self._steps = _share_(batch.steps)
        self._products = _share_(batch.products)
        self._strides = [param.stride() for param in batch.params]
        self._layout = batch.layout
        self._static = [operands(batch, i) for i in range(len(batch.params))]
        self._cut: list[int] = []
        members: dict[Any, list[int]] = defaultdict(list)
        products = torch.cat(self._products).tolist() if self._products else []
        for i, group in enumerate(batch.groups):
            members[group, tuple(products[i]) if products else None].append(i)
        firsts = {i: indices[0] for indices in members.values() for i in indices}
        self._firsts = torch.tensor([firsts[i] for i in range(len(firsts))], device="cpu")
        self._groups = torch.tensor(batch.groups, device="cpu")
        self.classes = [self._alike(indices, scratch) for indices in members.values()]
        # Views are kept of these; the others are handed to torch's kernel as the objects they are.
        self._viewed = [t for i in self._cut for t in self._static[i] if t is not None]
        self._viewed += batch.steps + batch.products
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
        group = self._batch.groups[indices[0]]
        return Alike(group, indices[0], direct, list(runs(self._batch, rows, scratch)), strided)

    def _as_rows(self, i: int, strides: tuple[int, ...]) -> Operands:
        return Operands._make(None if t is None else as_flat(t, strides) for t in self._static[i])

    def holds(self, batch: Batch, *, scaled: bool) -> bool:
        """Whether this is the division of these tensors as they are now, or does as well.

        One for gradients that are multiplied does for all: norms that are clipped now and then
        would otherwise cost a division each time.
        """
        return (
            batch is self._batch
            and (self._scaled or not scaled)
            and batch.layout is self._layout
            and self._addresses == list(map(Tensor.data_ptr, self._viewed))
            and self._are_alike()
        )

    def _are_alike(self) -> bool:
        """Whether the products of each class still are the same: a user may edit one in place."""
        if not self._products:
            return True
        products = torch.cat(self._products)
        return torch.equal(products, products.index_select(0, self._firsts))

    def count_(self, hypers: list[Hyper]) -> None:
        """Advance the steps, and the products of the betas."""
        torch._foreach_add_(self._steps, 1)
        if self._products:
            pairs = [(h.beta1, h.beta2) for h in hypers]
            betas = torch.tensor(pairs, dtype=torch.float64, device="cpu")
            factors = [betas] * len(self._products)
            if len(hypers) > 1:
                factors = list(betas.index_select(0, self._groups).split(TOGETHER))
            torch._foreach_mul_(self._products, factors)

    def products_of(self, alike: Alike) -> tuple[float, float] | None:
        """Return the products of these tensors' betas, None if nothing makes the betas vary."""
        if not self._products:
            return None
        product1, product2 = self._products[alike.first // TOGETHER][
            alike.first % TOGETHER
        ].tolist()
        return product1, product2

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


def _share_(tensors: list[Tensor]) -> list[Tensor]:
    """Move tensors of one shape into few memories, so that one call updates many of them.

    Args:
        tensors: The tensors; they stay the same objects with the same values, in the widest of
            their dtypes.

    Returns:
        All of them, stacked by ``TOGETHER``.
    """
    shared = []
    for start in range(0, len(tensors), TOGETHER):
        members = tensors[start : start + TOGETHER]
        shared.append(torch.stack(members))
        for tensor, row in zip(members, shared[-1].unbind(), strict=True):
            tensor.data = row
    return shared
