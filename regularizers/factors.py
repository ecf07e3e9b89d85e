"""The two matrices of a layer's Kronecker-factored Fisher: their sums, means and products."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FactorSums", "KroneckerFactors", "nearest_product", "outer_products"]


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


def nearest_product(first: KroneckerFactors, second: KroneckerFactors) -> KroneckerFactors:
    """Return the Kronecker product nearest to the sum of two, in the Frobenius norm.

    Rearranged, G (x) A is the outer product vec(G) vec(A)^T, so the nearest one is the leading term
    of a singular value decomposition of rank two. It takes inner products of the factors only: with
    S_G and S_A the 2 x 2 Gram matrices of the vec(G_i) and vec(A_i), the leading right singular
    vector is sum_i y_i vec(A_i), where y = L w, S_G = L L^T, and w is the leading eigenvector of
    L^T S_A L. Positive semi-definite factors have inner products >= 0, hence (Perron and Frobenius)
    y >= 0, and the result is positive semi-definite again.

    Args:
        first: A_1 and G_1, symmetric and positive semi-definite.
        second: A_2 and G_2, of the same shapes.

    Returns:
        A, a weighted mean of the two A_i, and G, a sum of the G_i with weights; exact where the
        A_i, or the G_i, are multiples of one another.

    References:
        Van Loan and Pitsianis, "Approximation with Kronecker products", 1993.
    """
    s_a, s_g = (_gram(one, two) for one, two in zip(first, second, strict=True))
    values, vectors = torch.linalg.eigh(s_g)
    root = vectors * values.clamp(min=0).sqrt()  # L
    y = root @ torch.linalg.eigh(root.T @ s_a @ root).eigenvectors[:, -1]
    y = y.abs()  # an eigenvector's sign is arbitrary, and in a tie its direction
    (a1, g1), (a2, g2) = first, second
    if not y @ s_a @ y > 0:  # both products are 0, and so is that of the sums
        return KroneckerFactors(a1 + a2, g1 + g2)
    y = y / y.sum()
    x = s_a @ y / (y @ s_a @ y)
    y, x = y.to(a1.dtype), x.to(g1.dtype)
    return KroneckerFactors(y[0] * a1 + y[1] * a2, x[0] * g1 + x[1] * g2)


def _gram(first: Tensor, second: Tensor) -> Tensor:
    """Inner products of two matrices with themselves and each other, (2, 2) float64."""
    one, two = first.double().flatten(), second.double().flatten()
    return torch.stack([one @ one, one @ two, two @ one, two @ two]).view(2, 2)
