r"""The one Kronecker product nearest to a sum of two, G (x) A ~ G_1 (x) A_1 + G_2 (x) A_2.

Rearranged, a Kronecker product is the outer product vec(G) vec(A)^T, so the nearest one is the
leading term of a singular value decomposition of rank two. That takes the inner products of the
factors only: with S_G and S_A the 2 x 2 Gram matrices of the vec(G_i) and vec(A_i), the leading
right singular vector is sum_i y_i vec(A_i), where y = L w, S_G = L L^T, and w is the leading
eigenvector of L^T S_A L. Factors that are positive semi-definite have inner products >= 0, hence
(Perron and Frobenius) y >= 0 and factors that are positive semi-definite again.

Reference: Van Loan and Pitsianis, "Approximation with Kronecker products", 1993.
"""

import torch
from torch import Tensor

from ars.regularizers.factors import KroneckerFactors

__all__ = ["nearest_product"]


def nearest_product(first: KroneckerFactors, second: KroneckerFactors) -> KroneckerFactors:
    """Return the Kronecker product nearest to the sum of two, in the Frobenius norm.

    Args:
        first: A_1 and G_1, symmetric and positive semi-definite.
        second: A_2 and G_2, of the same shapes.

    Returns:
        A, a weighted mean of the two A_i, and G, a sum of the G_i with weights; exact where the
        A_i, or the G_i, are multiples of one another.
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
