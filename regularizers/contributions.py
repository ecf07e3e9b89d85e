r"""What one use of a parameter adds to the gradient of each sample, kept unsummed and unformed.

Each kind knows two things: to add the squares of its samples' gradients to a sum, for a parameter
with this one use, and to add the gradient of one sample to a scratch tensor, for a parameter whose
uses (a tied embedding and head) must be added before they are squared.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ars.functional import add_squared_products_

__all__ = ["Contribution", "Outer", "Patches", "Rows", "Sums", "add_squares_of_uses_"]


class Contribution(Protocol):
    """One use of a parameter by all samples."""

    def add_squares_(self, total: Tensor) -> None:
        """Add the squared gradients of all samples to ``total``, of the parameter's shape."""
        ...

    def add_to_(self, scratch: Tensor, n: int) -> None:
        """Add the gradient of sample n to ``scratch``, of the parameter's shape."""
        ...


class Sums(NamedTuple):
    """Gradients that are small enough to be formed: (N, *shape)."""

    gradients: Tensor

    def add_squares_(self, total: Tensor) -> None:
        """Add the squares."""
        total += self.gradients.to(total.dtype).square().sum(0)

    def add_to_(self, scratch: Tensor, n: int) -> None:
        """Add one sample's."""
        scratch += self.gradients[n]


class Outer(NamedTuple):
    """Sums of outer products, a matrix for each of the groups that channels may fall into.

    Args:
        g: (N, T, groups, p), the gradients of the outputs.
        a: (N, T, groups, d), the inputs; the parameter has groups * p * d elements in this order.
    """

    g: Tensor
    a: Tensor

    def add_squares_(self, total: Tensor) -> None:
        """Add the squares, group by group."""
        groups, p, d = self.g.shape[2], self.g.shape[3], self.a.shape[3]
        for i, part in enumerate(total.view(groups, p, d)):
            add_squared_products_(part, self.g[:, :, i], self.a[:, :, i])

    def add_to_(self, scratch: Tensor, n: int) -> None:
        """Add one sample's product."""
        groups, p, d = self.g.shape[2], self.g.shape[3], self.a.shape[3]
        for i, part in enumerate(scratch.view(groups, p, d)):
            g, a = self.g[n, :, i].to(scratch.dtype), self.a[n, :, i].to(scratch.dtype)
            part.addmm_(g.mT, a)


class Patches(NamedTuple):
    """Outer products whose inputs are too large to be unfolded for all samples at once.

    Args:
        samples: N.
        size: Samples to unfold together.
        outer: Forms the products of some samples.
    """

    samples: int
    size: int
    outer: Callable[[slice], Outer]

    def add_squares_(self, total: Tensor) -> None:
        """Add the squares, some samples at a time."""
        for start in range(0, self.samples, self.size):
            self.outer(slice(start, start + self.size)).add_squares_(total)

    def add_to_(self, scratch: Tensor, n: int) -> None:
        """Add one sample's."""
        self.outer(slice(n, n + 1)).add_to_(scratch, 0)


class Rows(NamedTuple):
    """Rows of an embedding: the gradient of row v is the sum of those positions that read it.

    Args:
        ids: (N, T), int64.
        g: (N, T, d).
    """

    ids: Tensor
    g: Tensor

    def add_squares_(self, total: Tensor) -> None:
        """Add the squares: sums over equal (sample, id), then squares over equal id.

        By sorting, so that nothing of a vocabulary's size is made and no sum's order is left to
        chance, as it would be with a GPU's atomic additions.
        """
        samples = len(self.ids)
        numbers = torch.arange(samples, device=self.ids.device)[:, None]
        # (id, sample) in this order: equal ids end up side by side for the second sum.
        key, order = (self.ids * samples + numbers).flatten().sort(stable=True)
        rows = self.g.flatten(0, 1)[order].to(total.dtype)
        key, sizes = key.unique_consecutive(return_counts=True)
        squares = _segment_sums(rows, sizes).square_()
        ids, sizes = (key // samples).unique_consecutive(return_counts=True)
        total.index_add_(0, ids, _segment_sums(squares, sizes))

    def add_to_(self, scratch: Tensor, n: int) -> None:
        """Add one sample's."""
        key, order = self.ids[n].sort(stable=True)
        ids, sizes = key.unique_consecutive(return_counts=True)
        scratch.index_add_(0, ids, _segment_sums(self.g[n][order].to(scratch.dtype), sizes))


def _segment_sums(rows: Tensor, sizes: Tensor) -> Tensor:
    """Sum consecutive rows, ``sizes`` of them at a time, in their order."""
    if rows.device.type == "cpu":  # a loop there; 5 times faster than segment_reduce
        segment = torch.arange(len(sizes)).repeat_interleave(sizes)
        return rows.new_zeros(len(sizes), rows.shape[1]).index_add_(0, segment, rows)
    return torch.segment_reduce(rows, "sum", lengths=sizes)


def add_squares_of_uses_(total: Tensor, uses: Sequence[Contribution], samples: int) -> None:
    """Add the squares of the summed uses of a parameter.

    Args:
        total: Of the parameter's shape.
        uses: Everything the samples' gradients consist of.
        samples: N.
    """
    if len(uses) == 1:
        uses[0].add_squares_(total)
        return
    small = [use.gradients for use in uses if isinstance(use, Sums)]
    if len(small) == len(uses):
        Sums(torch.stack(small).sum(0)).add_squares_(total)
        return
    scratch = torch.empty_like(total)
    for n in range(samples):
        scratch.zero_()
        for use in uses:
            use.add_to_(scratch, n)
        total.addcmul_(scratch, scratch)
