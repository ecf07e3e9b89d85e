"""What the optimizer asks of a penalty: plain tensors, so that it can read them in its own pass."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ars.reference import SCALED, Scalar, decode_importance
from ars.sharded import is_placed_like, is_sharded, is_true_everywhere, part_of, place_like

__all__ = [
    "Penalty",
    "Term",
    "check_group_strengths",
    "check_strength",
    "parameter_names",
    "read_settings",
    "read_terms",
    "refresh_",
    "what_to_pass",
]  # fmt: skip

LARGEST_STRENGTH = 1e38  # of which the double is a float32 too


class Term(NamedTuple):
    """What pulls at one parameter: a quadratic pull towards an anchor, another gradient, or both.

    Args:
        anchor: Of the parameter's shape, floating point.
        importance: Of the parameter's shape, floating point or uint8.
        scale: Of a uint8 importance, one float32 for every 64 elements.
        pull: Of the parameter's shape, filled by the penalty before every step.
    """

    anchor: Tensor | None = None
    importance: Tensor | None = None
    scale: Tensor | None = None
    pull: Tensor | None = None


class Penalty(Protocol):
    r"""A quadratic penalty :math:`\frac{\lambda}{2} \sum \Omega (\theta - \theta^*)^2`.

    Any object with these members will do; :class:`ars.regularizers.EWC` is one. The optimizer calls
    :meth:`terms` once, and reads ``strength`` and ``mode`` at every step. In a step in which any
    parameter has a gradient it pulls at all of them, but frozen ones.

    A penalty that is not elementwise has two members more. ``gradients()``, called once, returns
    pairs (parameter, buffer), the buffer of the parameter's shape, float32 (float64 for a float64
    parameter). ``refresh()``, called at the start of every step, fills the buffers with the
    penalty's whole gradient at the parameters as they are, strength included, and returns its
    value, 0-d, without waiting for a device. The step adds the buffers to the gradient after
    unscaling and clipping. ``terms()`` may then return nothing.

    A penalty that may get or lose tensors later has a ``version``, which is another number then:
    the optimizer asks for all of them again. One with ``named_parameters()``, pairs (name,
    parameter), is told by these names what does not fit.

    A parameter that is frozen and not in the optimizer is left out, as nothing moves it.
    """

    @property
    def strength(self) -> Scalar:
        """Lambda, in [0, 1e38]; a 0-d tensor on the device is read there."""
        ...

    @property
    def mode(self) -> Literal["coupled", "proximal"]:
        """``coupled``: its gradient joins the task's. ``proximal``: its own step after Adam's."""
        ...

    def terms(self) -> Iterable[tuple[Tensor, ...]]:
        """Triples (parameter, anchor, importance), or with the scale of a uint8 importance.

        The importance of element i of the flattened parameter is then
        ``scale[i // 64] * (importance[i] / 255) ** 2``.
        """
        ...


def parameter_names(groups: list[dict[str, Any]]) -> dict[Tensor, str]:
    """Return what to call each parameter of an optimizer's groups in an error."""
    names = {}
    for g, group in enumerate(groups):
        known = group.get("param_names", [])
        for i, param in enumerate(group["params"]):
            names[param] = known[i] if i < len(known) else f"parameter {i} of group {g}"
    return names


def check_strength(what: str, strength: Any) -> None:
    """Raise unless a strength is a number in [0, 1e38]; a tensor on another device is not read.

    Args:
        what: What to call it in an error.
        strength: The strength.

    Raises:
        TypeError: It is neither a number nor a tensor.
        ValueError: It is out of its range, or not one number.
    """
    if isinstance(strength, Tensor):
        if strength.numel() != 1 or not strength.is_floating_point():
            raise ValueError(
                f"{what} must be one floating-point number, is {strength.dtype} of shape "
                f"{tuple(strength.shape)}"
            )
        if strength.device.type != "cpu":
            return
    elif not isinstance(strength, (int, float)) or isinstance(strength, bool):
        raise TypeError(f"{what} must be a number or a 0-d tensor, got {type(strength).__name__}")
    if not 0 <= strength <= LARGEST_STRENGTH:
        number = strength.item() if isinstance(strength, Tensor) else strength
        raise ValueError(
            f"{what} must be finite and >= 0, got {number!r:.40}"
            if not 0 <= number < math.inf
            else f"{what} must be at most {LARGEST_STRENGTH:g}, as the step is computed in "
            f"float32, got {number!r:.40}"
        )


def read_settings(penalty: Penalty | None) -> tuple[Scalar, bool]:
    """Return a penalty's strength, and whether it is proximal.

    Args:
        penalty: The penalty, or None.

    Raises:
        TypeError: The strength is not a number.
        ValueError: The strength is out of its range, or the mode unknown.
    """
    if penalty is None:
        return 0.0, False
    if penalty.mode not in ("coupled", "proximal"):
        raise ValueError(f"penalty mode must be 'coupled' or 'proximal', got {penalty.mode!r}")
    check_strength("penalty strength", penalty.strength)
    return penalty.strength, penalty.mode == "proximal"


def read_terms(penalty: Penalty, names: dict[Tensor, str]) -> dict[Tensor, Term]:
    """Ask a penalty for its terms and check them against the parameters being optimized.

    Args:
        penalty: The penalty.
        names: What to call each parameter of the optimizer in an error.

    Returns:
        The term of each penalised parameter.

    Raises:
        TypeError: ``penalty`` lacks a member of :class:`Penalty`, or its strength is not a number.
        ValueError: Its mode, its strength, or a term does not fit; names the parameter.
    """
    for member in ("strength", "mode", "terms"):
        if isinstance(penalty, type) or not hasattr(penalty, member):
            kind = penalty.__name__ if isinstance(penalty, type) else type(penalty).__name__
            raise TypeError(f"penalty {kind} has no {member!r}: {what_to_pass(penalty)}")
    read_settings(penalty)
    rows = list(penalty.terms())
    buffers = list(penalty.gradients()) if hasattr(penalty, "gradients") else []
    held = [row[0] for row in (*rows, *buffers)]
    _check_are_optimized(penalty, held, names)
    terms: dict[Tensor, Term] = {}
    for param, anchor, importance, *rest in rows:
        if param not in names:
            continue
        name = names[param]
        if param in terms:
            raise ValueError(f"the penalty has two terms for {name}: merge them into one")
        _check_anchor(name, param, anchor)
        _check_importance(name, param, importance, *rest)
        terms[param] = _placed(param, anchor.detach(), importance.detach(), *rest)
    if hasattr(penalty, "gradients"):
        if not hasattr(penalty, "refresh"):
            raise TypeError(
                f"penalty {type(penalty).__name__} has gradients() but no refresh() to fill them: "
                "see ars.penalty.Penalty"
            )
        for param, buffer in buffers:
            if param not in names:
                continue
            name = names[param]
            term = terms.get(param, Term())
            if term.pull is not None:
                raise ValueError(f"the penalty has two gradients for {name}: add them up")
            _check_pull(name, param, buffer)
            terms[param] = term._replace(pull=buffer.detach())
    return terms


def _placed(param: Tensor, anchor: Tensor, importance: Tensor, *rest: Tensor) -> Term:
    """Return a term placed as its parameter is, where it was computed before that was sharded."""
    scale = rest[0].detach() if rest else None
    if scale is not None and not is_placed_like(importance, param):
        importance, scale = decode_importance(importance, scale), None  # its blocks would be cut
    return Term(place_like(anchor, param), place_like(importance, param), scale)


def what_to_pass(penalty: Any) -> str:
    """Say what to do with something that is not a penalty, by what it has.

    Args:
        penalty: What was passed for one.
    """
    cls = type(penalty)  # of which is asked, as a Fisher that is not fitted has no importance
    kind = cls.__name__
    if isinstance(penalty, type):
        return f"that is the class, so build one: {penalty.__name__}(...)"
    if isinstance(penalty, (list, tuple, set)):
        return (
            "an optimizer takes one penalty. Pass one of them, and add the others to the loss by "
            "ars.regularizers.CombinedLoss(...); an EWC together with a SubspacePenalty or a "
            "KroneckerPenalty is a ProgressiveInheritance"
        )
    if hasattr(cls, "factors") or hasattr(cls, "covariance"):
        return f"pass KroneckerPenalty(model, ...) of this {kind}"
    if hasattr(cls, "importance") or isinstance(penalty, Mapping):
        return f"pass EWC(model, ...) of this {kind}"
    if hasattr(penalty, "penalty") and hasattr(penalty, "strength"):
        return "pass the penalty that it adapts, its .penalty"
    if hasattr(penalty, "value") or hasattr(penalty, "parts"):
        return "an optimizer cannot apply it, so add it to the loss"
    if isinstance(penalty, torch.nn.Module) or callable(penalty):
        return "a loss is no penalty: add it to the task's loss, or see ars.penalty.Penalty"
    return "see ars.penalty.Penalty"


def _check_are_optimized(penalty: Any, held: list[Tensor], names: dict[Tensor, str]) -> None:
    """Raise unless all that a penalty pulls at is optimized, but for what is frozen.

    Raises:
        ValueError: Something is not; names it.
    """
    absent = [param for param in dict.fromkeys(held) if param not in names]
    if not absent:
        return
    known: dict[Tensor, str] = {}
    if hasattr(penalty, "named_parameters"):
        known = {param: repr(name) for name, param in penalty.named_parameters()}
    moving = next((param for param in absent if param.requires_grad), absent[0])
    name = known.get(moving, f"a parameter of shape {tuple(moving.shape)}")
    if len(absent) == len(set(held)):
        raise ValueError(
            f"the penalty pulls at {name} and belongs to no parameter of this optimizer: build it "
            "from the model that is optimized, not from a copy, after the model is where it stays; "
            "where all that it holds was frozen, leave it out"
        )
    if moving.requires_grad:
        raise ValueError(
            f"the penalty pulls at {name}, which is no parameter of this optimizer: give it to the "
            "optimizer (add_param_group), leave it out of the penalty, or freeze it by "
            "requires_grad_(False), and it stays where it is"
        )


def _check_place(what: str, name: str, param: Tensor, tensor: Tensor) -> None:
    if tensor.shape != param.shape:
        raise ValueError(
            f"{what} of {name} has shape {tuple(tensor.shape)}, the parameter "
            f"{tuple(param.shape)}: was the penalty made for another model?"
        )
    if tensor.device != param.device:
        raise ValueError(
            f"{what} of {name} is on {tensor.device}, the parameter on "
            f"{param.device}: move the model first, then build the penalty"
        )
    if tensor.is_meta:
        raise ValueError(
            f"{what} of {name} is on the meta device, where it has no values: give the model its "
            "data first, then build the penalty"
        )


def _check_anchor(name: str, param: Tensor, anchor: Tensor) -> None:
    _check_place("anchor", name, param, anchor)
    if param.is_complex():
        raise ValueError(
            f"{name} is complex, and only real parameters can have a term: leave it out of the "
            "penalty, or make the parameter a real one and view it as complex in the model"
        )
    if not anchor.is_floating_point():
        raise ValueError(f"anchor of {name} must be floating, is {anchor.dtype}")
    if not is_true_everywhere(part_of(anchor).isfinite().all(), anchor):
        raise ValueError(
            f"anchor of {name} holds a value that is not finite: anchor a model that has converged"
        )


def _check_importance(name: str, param: Tensor, importance: Tensor, *rest: Tensor) -> None:
    _check_place("importance", name, param, importance)
    values = part_of(importance)
    if rest:
        (values,) = rest
        _check_scale(name, part_of(param), part_of(importance), values)
    elif not importance.is_floating_point():
        raise ValueError(
            f"importance of {name} must be floating, is {importance.dtype}; "
            "uint8 needs a scale beside it"
        )
    if not is_true_everywhere(values.isfinite().all(), importance):
        raise ValueError(
            f"importance of {name} holds a value that is not finite: look for an overflow where "
            "it was computed"
        )
    if not is_true_everywhere((values >= 0).all(), importance):
        raise ValueError(
            f"importance of {name} holds a negative value: importances are mean squares, so >= 0"
        )


def _check_scale(name: str, param: Tensor, importance: Tensor, scale: Tensor) -> None:
    blocks = math.ceil(param.numel() / SCALED)
    if importance.dtype != torch.uint8:
        raise ValueError(
            f"importance of {name} has a scale beside it, so must be uint8, is {importance.dtype}"
        )
    if scale.dtype != torch.float32 or scale.shape != (blocks,) or scale.device != param.device:
        raise ValueError(
            f"scale of {name} must be float32 of shape ({blocks},) on {param.device}, is "
            f"{scale.dtype} of shape {tuple(scale.shape)} on {scale.device}"
        )
    if not (param.is_contiguous() and importance.is_contiguous() and scale.is_contiguous()):
        raise ValueError(
            f"{name}, its uint8 importance and their scale must be contiguous: 64 elements that "
            "follow each other share a scale"
        )


def _check_pull(name: str, param: Tensor, buffer: Tensor) -> None:
    _check_place("the penalty's pull", name, param, buffer)
    if not is_placed_like(buffer, param):
        raise ValueError(
            f"the penalty's pull of {name} is not distributed as the parameter is, and what the "
            "penalty fills cannot be cut: make it by torch.zeros_like(parameter)"
        )
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    if buffer.dtype != dtype or param.is_complex():
        raise ValueError(
            f"the penalty's pull of {name} must be {dtype} and the parameter real: is "
            f"{buffer.dtype}, the parameter {param.dtype}; convert the model first, then build the "
            "penalty"
        )


def check_group_strengths(penalty: Penalty | None, groups: list[dict[str, Any]]) -> None:
    """Raise if a group has a strength of its own, and the penalty gradients that do not know it.

    Args:
        penalty: The penalty, if there is one.
        groups: The optimizer's parameter groups.

    Raises:
        ValueError: That is so.
    """
    if hasattr(penalty, "gradients") and any(g["penalty_strength"] is not None for g in groups):
        raise ValueError(
            f"the gradients of a {type(penalty).__name__} have its own strength in them: "
            "set penalty_strength to None in every group"
        )


def refresh_(penalty: Penalty | None) -> Tensor | None:
    """Let a penalty that has buffers fill them, and return the value that is theirs.

    Args:
        penalty: The penalty, if there is one.

    Returns:
        The value, 0-d, or None without buffers.
    """
    if penalty is None or not hasattr(penalty, "gradients"):
        return None
    with torch.no_grad():
        value: Any = penalty.refresh()  # type: ignore[attr-defined]
        whole: Tensor = value.full_tensor() if is_sharded(value) else value
    return whole
