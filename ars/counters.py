"""Step counters and products of betas: how they lie in memory, and how a CPU advances them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ars import reference
from ars.batch import Batch, Hyper

__all__ = ["CounterPool", "Counters"]

# Counters in one memory: pickle, unlike torch.save, saves all of it with each of them.
TOGETHER = 64


class CounterPool:
    """Makes counters side by side, so that one call can advance many of them."""

    def __init__(self) -> None:
        self._unused: dict[tuple[object, ...], list[Tensor]] = {}

    def zeros(self, name: str, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a new counter.

        Args:
            name: What it counts: those of one name lie side by side.
            *shape: Its shape.
            dtype: Its dtype.
            device: Where it lies.
        """
        unused = self._unused.setdefault((name, shape, dtype, device), [])
        if not unused:
            memory = torch.zeros(TOGETHER, *shape, dtype=dtype, device=device)
            unused += reversed(memory.unbind())
        return unused.pop()


class Counters:
    """The counters of one batch on a CPU.

    They are never moved: users share them between processes, or look at them through views.

    Args:
        batch: The batch.
    """

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._members = batch.steps + batch.products + batch.products_steps
        self._addresses = list(map(Tensor.data_ptr, self._members))
        self._steps, self._products, self._products_steps = (
            list(_neighbours(tensors))
            for tensors in (batch.steps, batch.products, batch.products_steps)
        )
        # A tensor is added to many three times as fast as a number; to integers only an integer.
        exact = all(map(Tensor.is_floating_point, batch.steps))
        self._one = torch.ones((), dtype=torch.float32 if exact else torch.int64, device="cpu")
        self._groups = torch.tensor(batch.groups, device="cpu")
        self._firsts, self._kinds = self._groups, batch.groups

    def hold(self, batch: Batch) -> bool:
        """Whether these are the batch's counters, where they are now."""
        return batch is self._batch and self._addresses == list(map(Tensor.data_ptr, self._members))

    def count_(self) -> None:
        """Advance the steps, also those that the products are of."""
        torch._foreach_add_(self._steps + self._products_steps, self._one, alpha=1)

    def multiply_(self, given: list[Hyper], hypers: list[Hyper]) -> tuple[list[int], Tensor | None]:
        """Advance the products of the betas, if there are any; to be followed by :meth:`count_`.

        Args:
            given: Each group's hyperparameters, without the gate.
            hypers: With it.

        Returns:
            A number for each tensor, the same for those of one group with the same products; and
            the products, (tensors, 2), or None.
        """
        if not self._products:
            return self._kinds, None
        steps, current = (_joined(tensors) for tensors in (self._steps, self._products_steps))
        if steps.dtype != current.dtype or not torch.equal(steps, current):
            self._correct_(given, steps)
        betas = self._betas(hypers)
        lengths = list(map(len, self._products))
        factors = [betas] * len(lengths) if len(betas) == 1 else list(betas.split(lengths))
        torch._foreach_mul_(self._products, factors)
        products = _joined(self._products)
        if self._kinds is self._batch.groups or not torch.equal(products, products[self._firsts]):
            self._kinds = self._alike(products)
            self._firsts = torch.tensor(self._kinds, device="cpu")
        return self._kinds, products

    def _betas(self, hypers: list[Hyper]) -> Tensor:
        """Return the betas of each tensor, (tensors, 2), or those of all, (1, 2)."""
        pairs = [(hyper.beta1, hyper.beta2) for hyper in hypers]
        betas = torch.tensor(pairs, dtype=torch.float64, device="cpu")
        return betas if len(betas) == 1 else betas.index_select(0, self._groups)

    def _correct_(self, given: list[Hyper], steps: Tensor) -> None:
        """Put powers in the place of products that are not of the steps taken."""
        products, current = _joined(self._products), _joined(self._products_steps)
        powers = reference.next_product(
            products, current[:, None], steps[:, None], self._betas(given), 1.0
        )
        for memories, values in ((self._products, powers), (self._products_steps, steps)):
            for memory, value in zip(memories, values.split(list(map(len, memories))), strict=True):
                memory.copy_(value)

    def _alike(self, products: Tensor) -> list[int]:
        """Return for each tensor the first one of its group that has its products."""
        firsts: dict[tuple[int, float, float], int] = {}
        rows = zip(self._batch.groups, *products.T.tolist(), strict=True)
        return [firsts.setdefault(row, i) for i, row in enumerate(rows)]


def _joined(memories: list[Tensor]) -> Tensor:
    return memories[0] if len(memories) == 1 else torch.cat(memories)


def _neighbours(tensors: list[Tensor]) -> Iterator[Tensor]:
    """Yield tensors that lie one behind the other as one, a row for each, in their order."""
    stretch: list[Tensor] = []
    for tensor in tensors:
        if stretch and not _follows(tensor, stretch[-1]):
            yield _as_one(stretch)
            stretch = []
        stretch.append(tensor.detach())
    if stretch:
        yield _as_one(stretch)


def _follows(tensor: Tensor, other: Tensor) -> bool:
    """Whether a tensor is like another, and begins in its memory where that one ends."""
    return (
        tensor.dtype == other.dtype
        and tensor.shape == other.shape
        and tensor.is_contiguous()
        and other.is_contiguous()
        and tensor.untyped_storage()._cdata == other.untyped_storage()._cdata
        and tensor.storage_offset() == other.storage_offset() + other.numel()
    )


def _as_one(stretch: list[Tensor]) -> Tensor:
    first, size = stretch[0], stretch[0].numel()
    shape, strides = ((len(stretch), size), (size, 1)) if size > 1 else ((len(stretch),), (1,))
    return first.as_strided(shape, strides, first.storage_offset())
