"""What the optimizer asks of a penalty: plain tensors, so that it can read them in its own pass."""

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

__all__ = ["Penalty", "Term", "parameter_names", "read_terms"]


class Term(NamedTuple):
    """Quadratic pull of one parameter towards an anchor, both of the parameter's shape."""

    anchor: Tensor
    importance: Tensor


class Penalty(Protocol):
    r"""A quadratic penalty :math:`\frac{\lambda}{2} \sum \Omega (\theta - \theta^*)^2`.

    Any object with these members will do; :class:`ars.regularizers.EWC` is one. The optimizer calls
    :meth:`terms` once, and reads ``strength`` at every step.
    """

    @property
    def strength(self) -> float:
        """Lambda, finite and >= 0."""
        ...

    @property
    def mode(self) -> Literal["coupled", "proximal"]:
        """``coupled``: its gradient joins the task's. ``proximal``: its own step after Adam's."""
        ...

    def terms(self) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Triples (parameter, anchor, importance)."""
        ...


def parameter_names(groups: list[dict[str, Any]]) -> dict[Tensor, str]:
    """Return what to call each parameter of an optimizer's groups in an error."""
    names = {}
    for g, group in enumerate(groups):
        known = group.get("param_names", [])
        for i, param in enumerate(group["params"]):
            names[param] = known[i] if i < len(known) else f"parameter {i} of group {g}"
    return names


def read_terms(penalty: Penalty, names: dict[Tensor, str]) -> dict[Tensor, Term]:
    """Ask a penalty for its terms and check them against the parameters being optimized.

    Args:
        penalty: The penalty.
        names: What to call each parameter of the optimizer in an error.

    Returns:
        The term of each penalised parameter.

    Raises:
        TypeError: ``penalty`` lacks a member of :class:`Penalty`.
        ValueError: Its mode, its strength, or a term does not fit; names the parameter.
    """
    for member in ("strength", "mode", "terms"):
        if not hasattr(penalty, member):
            raise TypeError(
                f"penalty {type(penalty).__name__} has no {member!r}: see ars.penalty.Penalty"
            )
    if penalty.mode not in ("coupled", "proximal"):
        raise ValueError(f"penalty mode must be 'coupled' or 'proximal', got {penalty.mode!r}")
    if not 0 <= penalty.strength < math.inf:
        raise ValueError(f"penalty strength must be finite and >= 0, got {penalty.strength!r}")
    terms: dict[Tensor, Term] = {}
    for index, (param, anchor, importance) in enumerate(penalty.terms()):
        if param not in names:
            raise ValueError(
                f"term {index} of the penalty, of shape {tuple(param.shape)}, belongs to no "
                "parameter of this optimizer: build the penalty from the same model"
            )
        if param in terms:
            raise ValueError(f"the penalty has two terms for {names[param]}: merge them into one")
        for what, tensor in (("anchor", anchor), ("importance", importance)):
            if tensor.shape != param.shape:
                raise ValueError(
                    f"{what} of {names[param]} has shape {tuple(tensor.shape)}, the parameter "
                    f"{tuple(param.shape)}: was the penalty made for another model?"
                )
            if tensor.device != param.device:
                raise ValueError(
                    f"{what} of {names[param]} is on {tensor.device}, the parameter on "
                    f"{param.device}: move the model first, then build the penalty"
                )
            if not tensor.is_floating_point():
                raise ValueError(f"{what} of {names[param]} must be floating, is {tensor.dtype}")
        terms[param] = Term(anchor.detach(), importance.detach())
    return terms
