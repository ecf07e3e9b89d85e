"""The two matrices of a layer's Kronecker-factored Fisher, and the sums they are means of."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FactorSums", "KroneckerFactors", "outer_products"]


class KroneckerFactors(NamedTuple):
    """The two factors of one layer's Fisher, F = G (x) A.

    Args:
        inputs: A, the second moment of the layer's inputs: (d, d), or (d + 1, d + 1) with the bias
            as the last column. For a convolution d counts channels times kernel elements.
        outputs: G, the second moment of the gradients of its outputs: (p, p).
    """

    inputs: Tensor
    outputs: Tensor


@dataclass
class FactorSums:
    """Sums of one layer's outer products, and how many rows the inputs' is of."""

    inputs: Tensor
    outputs: Tensor
    count: Tensor

    @classmethod
    def of(cls, rows: Tensor, size: int) -> "FactorSums":
        """Start at zero.

        Args:
            rows: Like those to be added, (..., d).
            size: p, how many outputs the layer has.
        """
        d = rows.shape[-1]
        zeros = rows.new_zeros
        return cls(zeros(d, d), zeros(size, size), zeros((), dtype=torch.int64))

    def add_inputs(self, rows: Tensor, valid: Tensor, *, reduce: bool) -> None:
        """Add what the layer read.

        Args:
            rows: (B, t, d).
            valid: Which of them count, (B, t).
            reduce: Average the positions of a sample first.
        """
        if reduce:
            weights = valid.to(rows.dtype)
            rows = torch.einsum("btd,bt->bd", rows, weights / weights.sum(1, keepdim=True).clamp(1))
            valid = valid.any(1)
        self.inputs += outer_products(rows[valid])
        self.count += valid.sum()

    def add_outputs(self, rows: Tensor, *, reduce: bool) -> None:
        """Add the gradients of what the layer returned, (B, t, p), summed over t to ``reduce``."""
        rows = rows.to(self.outputs.dtype)
        self.outputs += outer_products(rows.sum(1) if reduce else rows.flatten(0, 1))

    def means(self, samples: int) -> KroneckerFactors:
        """Return the factors, given how many samples there were."""
        return KroneckerFactors(self.inputs / self.count.clamp(min=1), self.outputs / samples)


def outer_products(rows: Tensor) -> Tensor:
    """Sum the outer products of rows, (n, d) -> (d, d), in their own precision."""
    with torch.autocast(device_type=rows.device.type, enabled=False):
        return rows.T @ rows
