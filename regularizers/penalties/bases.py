r"""Orthonormal bases of the subspaces that matter: of weights, of activations, of coordinates.

A basis of dimension k in d is U, (d, k), with U^T U = I. It is the span of the leading singular
vectors: the smallest k whose squared singular values reach a fraction of their sum (the energy), or
a given k.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ars.regularizers.checks import checked_module
from ars.regularizers.fisher.covariance import ActivationCovariance
from ars.regularizers.fisher.estimators import accumulation_dtype
from ars.regularizers.fisher.layers import matrix_layers
from ars.regularizers.penalties.penalty_base import check_names
from ars.sharded import whole

__all__ = [
    "activation_bases",
    "check_bases",
    "covariance_basis",
    "parameters_of_bases",
    "weight_basis",
]

# How far U^T U may be from I. A basis orthonormalised in bfloat16 is off by 4e-3 and is refused;
# one computed in float32 is off by about 1e-6.
ORTHONORMALITY = 1e-4


def check_basis(what: str, basis: object, param: Tensor, side: str) -> None:
    """Refuse what is not a basis of a subspace on one side of a parameter.

    Args:
        what: Its name, for messages.
        basis: U, (d, k) with orthonormal columns, or int64 indices of coordinates, (k,).
        param: The parameter, flattened from dimension 1 on.
        side: ``"output"``: d is its number of rows; ``"input"``: of columns.

    Raises:
        TypeError: Not a tensor, or neither floating point nor int64.
        ValueError: A wrong shape, columns that are not orthonormal, an index out of range or given
            twice, or a parameter with fewer than two dimensions.
    """
    if param.ndim < 2 or not param.numel():
        raise ValueError(
            f"{what} is for a parameter of shape {tuple(param.shape)}, which has no sides; "
            "leave it out, and restrain it with an EWC"
        )
    size = len(param) if side == "output" else param.numel() // len(param)
    if not isinstance(basis, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(basis).__name__}")
    if basis.dtype == torch.int64:
        if basis.ndim != 1 or not basis.numel():
            raise ValueError(f"{what} is indices, so of shape (k,), got {tuple(basis.shape)}")
        if int(basis.min()) < 0 or int(basis.max()) >= size:
            raise ValueError(f"{what} has an index outside [0, {size}), the side it lies on")
        if basis.unique().numel() != basis.numel():
            raise ValueError(f"{what} has an index twice; name each coordinate once")
        return
    if not basis.is_floating_point():
        raise TypeError(f"{what} must be floating point, or int64 indices, got {basis.dtype}")
    if basis.ndim != 2 or len(basis) != size or not 1 <= basis.shape[1] <= size:
        raise ValueError(
            f"{what} has shape {tuple(basis.shape)}, expected ({size}, k) with 1 <= k <= {size}: "
            "one row for each coordinate of the side it lies on"
        )
    wide = basis.detach().to(accumulation_dtype(basis.dtype))
    gram = wide.T @ wide
    error = float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max())
    if not error <= ORTHONORMALITY:  # also refuses nan
        raise ValueError(
            f"{what} is not orthonormal: U^T U is off the identity by {error:.2g}; "
            "take torch.linalg.qr(basis).Q in float32"
        )


def parameters_of_bases(bases: object, model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that ``bases`` are for, in the model's order.

    Args:
        bases: U by parameter name.
        model: The model.

    Returns:
        The parameters by name, at least one.

    Raises:
        TypeError: Not a mapping.
        ValueError: Empty.
    """
    if not isinstance(bases, Mapping):
        got = type(bases).__name__
        way = "; from_activations takes that" if hasattr(type(bases), "covariance") else ""
        raise TypeError(f"bases must be a mapping from parameter name to tensor, got {got}{way}")
    if not bases:
        raise ValueError("bases is empty: there is nothing to penalise")
    check_names(bases, model, "bases")
    return {name: p for name, p in model.named_parameters() if name in bases}


def check_bases(bases: Mapping[str, Tensor], parameters: Mapping[str, Tensor], side: str) -> None:
    """Refuse what is not one basis for each of the parameters.

    Args:
        bases: U by parameter name.
        parameters: The parameters by name.
        side: Side of the weights that the bases lie on.

    Raises:
        ValueError: A parameter without a basis, or as :func:`check_basis` says.
    """
    for name in bases:
        if name not in parameters:
            raise ValueError(f"bases has {name!r}, which this penalty does not hold")
    for name, param in parameters.items():
        if name not in bases:
            raise ValueError(f"bases lacks {name!r}, which this penalty holds")
        check_basis(f"the basis of {name!r}", bases[name], param, side)


def check_size(energy: float | None, rank: int | None) -> None:
    """Refuse anything but exactly one of an energy in (0, 1] and a rank >= 1.

    Args:
        energy: Fraction of the squared singular values to keep.
        rank: Number of directions to keep.

    Raises:
        ValueError: Both, neither, or out of range.
    """
    if (energy is None) == (rank is None):
        raise ValueError(
            f"give either energy or rank, got energy={energy!r} and rank={rank!r}; "
            "energy=0.99 keeps the directions with 99 % of the squared singular values"
        )
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], got {energy!r}")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be an integer >= 1, got {rank!r}")


def _leading(
    what: str,
    squares: Tensor,
    vectors: Tensor,
    noise: float,
    energy: float | None,
    rank: int | None,
) -> Tensor:
    """Return the leading columns of ``vectors``, whose ``squares`` descend.

    Directions whose square is at most ``noise`` times the largest are rounding errors, and left
    out whatever is asked for.

    Raises:
        ValueError: There is no direction.
    """
    squares = squares.double().clamp(min=0)
    total = float(squares.sum())
    if not 0 < total < torch.inf:
        raise ValueError(
            f"{what} is zero or not finite: it spans no subspace; leave it out, "
            "or look for an overflow where it was computed"
        )
    k = int((squares > noise * float(squares[0])).sum())
    if rank is not None:
        k = min(k, rank)
    elif energy is not None:
        k = min(k, 1 + int((squares.cumsum(0) < energy * total).sum()))
    return vectors[:, :k].contiguous()


def weight_basis(
    what: str, weight: Tensor, side: str, *, energy: float | None = None, rank: int | None = None
) -> Tensor:
    """Span of a weight's leading singular vectors.

    Args:
        what: Its name, for messages.
        weight: (rows, ...), flattened from dimension 1 on.
        side: ``"output"`` for the left vectors, ``"input"`` for the right ones.
        energy: Fraction of the squared singular values to keep, in (0, 1].
        rank: Instead of ``energy``: how many vectors, at most the weight's rank.

    Returns:
        U, (rows, k) or (columns, k).

    Raises:
        ValueError: The weight has fewer than two dimensions.
    """
    check_size(energy, rank)
    if weight.ndim < 2:
        raise ValueError(f"{what} has shape {tuple(weight.shape)}: no singular vectors; drop it")
    matrix = whole(weight).flatten(1).to(accumulation_dtype(weight.dtype))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    vectors = left if side == "output" else right.mT
    # Singular values are off by this part of the largest, so their squares by its square.
    error = torch.finfo(matrix.dtype).eps * max(matrix.shape)
    return _leading(what, values.square(), vectors, error**2, energy, rank)


def covariance_basis(
    what: str, covariance: Tensor, *, energy: float | None = None, rank: int | None = None
) -> Tensor:
    """Span of the leading eigenvectors of a second moment of activations.

    Args:
        what: Its name, for messages.
        covariance: C, (d, d), symmetric and positive semi-definite, of any scale.
        energy: Fraction of the trace to keep, in (0, 1].
        rank: Instead of ``energy``: how many vectors, at most the rank of C.

    Returns:
        U, (d, k).

    Raises:
        TypeError: Not a floating-point tensor.
        ValueError: Not square, not symmetric, zero or not finite.
    """
    check_size(energy, rank)
    if not isinstance(covariance, Tensor) or not covariance.is_floating_point():
        got = covariance.dtype if isinstance(covariance, Tensor) else type(covariance).__name__
        raise TypeError(f"{what} must be a floating-point tensor (d, d), got {got}")
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"{what} has shape {tuple(covariance.shape)}, expected (d, d)")
    if not covariance.isfinite().all():
        raise ValueError(f"{what} is not finite; look for an overflow where it was computed")
    wide = covariance.detach().to(accumulation_dtype(covariance.dtype))
    if not torch.allclose(wide, wide.T, rtol=1e-3, atol=1e-3 * float(wide.abs().max())):
        raise ValueError(f"{what} is not symmetric; give the mean of a a^T over the activations a")
    values, vectors = torch.linalg.eigh(wide)
    # Eigenvalues are off by a few roundings of the largest. A bound that grew with d would cut the
    # long flat tail of a wide layer, whose many small eigenvalues are much of the energy.
    error = torch.finfo(wide.dtype).eps * max(10.0, len(wide) ** 0.5)
    return _leading(what, values.flip(0), vectors.flip(1), error, energy, rank)


def _transposed_weights(model: nn.Module) -> list[str]:
    return [name for name, layer in matrix_layers(model).items() if layer.transposed]


def activation_bases(
    model: nn.Module,
    activations: ActivationCovariance | Mapping[str, Tensor] | Iterable[Any],
    names: Iterable[str] | None = None,
    *,
    energy: float | None = None,
    rank: int | None = None,
) -> dict[str, Tensor]:
    """Span of the leading directions of each layer's inputs.

    Args:
        model: The model.
        activations: A fitted covariance, second moments (d, d) by parameter or module name, or
            batches.
        names: Parameters; by default all that have a covariance.
        energy: Fraction of the second moment to keep, in (0, 1].
        rank: Instead of ``energy``: how many directions, at most.

    Returns:
        U by parameter name, (d, k).

    Raises:
        ValueError: A name that the model or the activations do not have, or whose weight is stored
            transposed or holds several matrices.
    """
    check_size(energy, rank)
    model = checked_module(model)
    if isinstance(activations, Mapping):
        given = dict(activations)
    elif isinstance(activations, ActivationCovariance):
        given = activations.covariance
    else:
        batches: Iterable[Any] = activations
        given = ActivationCovariance(model).fit(batches).covariance
    known = dict(model.named_parameters(remove_duplicate=False))
    covariances = {
        name if name in known else f"{name}.weight": covariance
        for name, covariance in given.items()
    }
    transposed = [n for n in _transposed_weights(model) if n in covariances]
    several = [n for n, c in covariances.items() if isinstance(c, Tensor) and c.ndim == 3]
    if names is None and transposed:
        warnings.warn(
            f"the weight of {', '.join(map(repr, transposed[:8]))} is stored transposed (Conv1D), "
            "so its rows are the inputs: left out; protect it by KroneckerPenalty of the same "
            "activations",
            stacklevel=3,
        )
    if names is None and several:
        warnings.warn(
            f"{', '.join(map(repr, several[:8]))} holds several matrices, which have no subspace "
            "in common: left out; protect it by KroneckerPenalty of the same activations",
            stacklevel=3,
        )
    without = {*transposed, *several}
    wanted = [n for n in covariances if n not in without] if names is None else list(names)
    for name in wanted:
        if name in transposed:
            raise ValueError(
                f"{name!r} is stored transposed (Conv1D), so that a basis of its inputs would act "
                "on its outputs; protect it by KroneckerPenalty of the same activations"
            )
        if name in several:
            raise ValueError(
                f"{name!r} holds several matrices, which have no subspace in common; protect it by "
                "KroneckerPenalty of the same activations"
            )
        if name not in covariances:
            raise ValueError(
                f"activations lack {name!r}, which names asks for; they have {list(covariances)}"
            )
    covariances = {name: covariances[name] for name in wanted}
    check_names(covariances, model, "activations")
    return {
        name: covariance_basis(f"the covariance of {name!r}", c, energy=energy, rank=rank)
        for name, c in covariances.items()
    }
