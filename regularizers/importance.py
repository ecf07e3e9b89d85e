"""What an EWC penalty makes of a Fisher: checked, weighted by layer, embedded in larger shapes."""

import warnings
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from numbers import Real

import torch
from torch import Tensor

from ars.regularizers.checks import check_tensor, checked_strength
from ars.regularizers.fisher import DiagonalFisher

__all__ = [
    "check_importance",
    "embedded",
    "estimator_of",
    "factor_of",
    "importance_of",
    "layer_factors",
    "merged_estimator",
]

# Below it an importance does nothing at any usable strength; above this share of such entries the
# penalty is one of a few parameters. Inputs that are always 0 leave fewer.
_NEGLIGIBLE, _COLLAPSED = 1e-12, 0.99


def importance_of(fisher: DiagonalFisher | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the importance by parameter name, in floating point.

    Args:
        fisher: A fitted Fisher, or the mapping itself.

    Returns:
        The mapping, not empty.

    Raises:
        TypeError: Neither of the two.
        ValueError: Not fitted, or empty.
    """
    if isinstance(fisher, DiagonalFisher):
        if fisher.n_samples == 0:
            raise ValueError("the DiagonalFisher is not fitted; call fit(batches) first")
        return fisher.importance
    if not isinstance(fisher, Mapping):
        remedy = "fit one: DiagonalFisher(model).fit(batches)"
        if hasattr(type(fisher), "factors") or hasattr(type(fisher), "covariance"):
            remedy = "a KroneckerPenalty takes that"
        raise TypeError(
            "fisher must be a DiagonalFisher or a mapping from parameter name to tensor, "
            f"got {type(fisher).__name__}; {remedy}"
        )
    if not fisher:
        raise ValueError("fisher is empty: there is nothing to penalise")
    return fisher


def estimator_of(fisher: DiagonalFisher | Mapping[str, Tensor]) -> str | None:
    """Return the name of the estimator, or None of a mapping."""
    return fisher.estimator if isinstance(fisher, DiagonalFisher) else None


def merged_estimator(
    old: str | None, fisher: DiagonalFisher | Mapping[str, Tensor], decay: float = 1.0
) -> str | None:
    """Return whose importances a sum holds, None for several estimators.

    Args:
        old: Of the sum so far.
        fisher: What was added.
        decay: How much of the old sum was kept.
    """
    new = estimator_of(fisher)
    return new if decay == 0 or new == old else None


def check_importance(importance: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Refuse an importance that is not finite, not >= 0 or not of its parameter's shape.

    Warn of one that has collapsed: almost all entries negligible, as of a model that is certain.

    Args:
        importance: Omega by parameter name.
        parameters: These parameters by name.

    Raises:
        ValueError: As :func:`check_tensor` says.
    """
    for name, param in parameters.items():
        check_tensor(f"the importance of {name!r}", importance[name], param, minimum=0.0)
    total = sum(omega.numel() for omega in importance.values())
    small = sum(int((omega < _NEGLIGIBLE).sum()) for omega in importance.values())
    if small >= _COLLAPSED * total > 0:
        warnings.warn(
            f"the importance has collapsed: {small} of {total} entries are below {_NEGLIGIBLE}, so "
            "the penalty holds next to nothing. The empirical Fisher vanishes where the model is "
            "right: use estimator='sketch' or 'logit_reversal', or fit before the loss reaches 0",
            stacklevel=3,
        )


def layer_factors(
    strengths: Mapping[str, float] | None, names: Collection[str]
) -> dict[str, float]:
    """Resolve factors given by name or pattern to one for each parameter.

    Args:
        strengths: Finite factors >= 0 by parameter name or shell pattern.
        names: The parameters.

    Returns:
        For each name the factor given for it, else that of the first pattern it matches, else 1.

    Raises:
        TypeError: Not a mapping, or a factor is not a number.
        ValueError: A factor is negative or not finite, or a key matches nothing.
    """
    if strengths is None:
        strengths = {}
    if not isinstance(strengths, Mapping):
        raise TypeError(
            "layer_strengths must be a mapping from name or pattern to number, "
            f"got {type(strengths).__name__}"
        )
    for key, factor in strengths.items():
        if isinstance(factor, bool) or not isinstance(factor, Real):
            raise TypeError(f"layer_strengths[{key!r}] must be a number, got {factor!r}")
        checked_strength(factor, f"layer_strengths[{key!r}]")
        if key not in names and not any(fnmatchcase(name, key) for name in names):
            raise ValueError(
                f"layer_strengths[{key!r}] matches none of the penalised parameters {list(names)}"
            )
    return {name: factor_of(strengths, name) for name in names}


def factor_of(strengths: Mapping[str, float], name: str) -> float:
    """Return the factor of one parameter.

    Args:
        strengths: Factors by parameter name or shell pattern.
        name: The parameter's.

    Returns:
        What is given for the name, else for the first pattern that it matches, else 1.
    """
    if name not in strengths:
        name = next((pattern for pattern in strengths if fnmatchcase(name, pattern)), name)
    return float(strengths.get(name, 1.0))


def embedded(name: str, old: Tensor, grown: Tensor) -> Tensor:
    """Return zeros of the shape of ``grown`` with ``old`` as their leading block.

    Args:
        name: Of the parameter, for messages.
        old: Any tensor.
        grown: Of at least its size in every dimension.

    Returns:
        A tensor of the dtype of ``old`` on the device of ``grown``.

    Raises:
        ValueError: ``grown`` does not hold ``old``.
    """
    same = old.ndim == grown.ndim
    if not same or any(n > m for n, m in zip(old.shape, grown.shape, strict=True)):
        raise ValueError(
            f"{name!r} has shape {tuple(grown.shape)}, which does not hold its old "
            f"{tuple(old.shape)}; leave the parameter out, or compute its Fisher again"
        )
    result = torch.zeros_like(grown, dtype=old.dtype)
    result[tuple(slice(n) for n in old.shape)] = old
    return result
