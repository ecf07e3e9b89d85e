"""What the penalties have in common: what they accept, the parameters they hold, their states."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ars.penalty import check_strength
from ars.regularizers.fisher.diagonal import DiagonalFisher
from ars.regularizers.fisher.estimators import accumulation_dtype
from ars.sharded import (
    is_placed_like,
    is_sharded,
    is_true_everywhere,
    part_of,
    place_like,
    reshard,
)

__all__ = [
    "PenaltyBase",
    "check_label",
    "check_names",
    "check_option",
    "check_state",
    "check_tensor",
    "check_unmoved",
    "checked_decay",
    "checked_strength",
    "copy_like",
    "estimator_of",
    "importance_of",
    "live_parameters",
    "parameters_in_state",
    "sharded_since",
    "without_wrappers",
]

# What wrappers put before the names of parameters.
WRAPPERS = ("module.", "_orig_mod.")


class PenaltyBase:
    """Gives a penalty its ``strength`` and its ``version``.

    Attributes:
        version: Another number whenever the penalty has got or lost a tensor: an optimizer that
            holds it then asks for its terms again.
    """

    version = 0

    @property
    def strength(self) -> float | Tensor:
        """The strength, in [0, 1e38]; a 0-d tensor is read at every step, where it is."""
        return self._strength

    @strength.setter
    def strength(self, value: float | Tensor) -> None:
        self._strength = checked_strength(value)


def checked_strength(value: float | Tensor, what: str = "strength") -> float | Tensor:
    """Return a strength as a float, or the 0-d tensor that holds it.

    Args:
        value: A number in [0, 1e38], or a 0-d floating-point tensor. A tensor on the CPU is checked
            like a number; one on a device is not read, which would wait for the device.
        what: What to call it in an error.

    Returns:
        The number, or the tensor itself, detached: what is written to it later holds.

    Raises:
        TypeError: Neither of the two.
        ValueError: Out of range.
    """
    if isinstance(value, Tensor):
        if value.ndim or not value.is_floating_point():
            raise TypeError(
                f"{what} must be a number or a 0-d floating-point tensor, got {value.dtype} of "
                f"shape {tuple(value.shape)}"
            )
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what} must be a number, got {type(value).__name__}; use float({what})")
    elif not isinstance(value, int):
        value = float(value)
    check_strength(what, value)
    return value.detach() if isinstance(value, Tensor) else float(value)


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


def checked_decay(decay: float) -> float:
    """Return ``decay``, or raise ValueError if it is not a number in [0, 1]."""  # noqa: DOC501
    if isinstance(decay, bool) or not isinstance(decay, Real) or not 0 <= decay <= 1:
        raise ValueError(f"decay must be a number in [0, 1], got {decay!r}")
    return float(decay)


def check_names(names: Mapping[str, Any], model: nn.Module, source: str) -> None:
    """Refuse a name that is not the first name of a parameter of ``model``.

    Args:
        names: Mapping whose keys are checked.
        model: The model.
        source: What the names come from, for messages.

    Raises:
        ValueError: The model has no such parameter, or has it under an earlier name.
    """
    parameters = dict(model.named_parameters())
    aliases = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        if name in parameters:
            continue
        if name in aliases:
            first = next(n for n, p in parameters.items() if p is aliases[name])
            raise ValueError(
                f"{name!r} is tied to {first!r}; give the importance of both uses as {first!r}"
            )
        remedy = "use the names of model.named_parameters()"
        if any(wrapper in name or f"{wrapper}{name}" in aliases for wrapper in WRAPPERS):
            remedy = (
                "measure and penalise one and the same module: the wrapped one, or the .module of "
                "DistributedDataParallel and the ._orig_mod of torch.compile everywhere"
            )
        raise ValueError(
            f"{source} names {name!r}, which is not a parameter of {type(model).__name__}; {remedy}"
        )


def without_wrappers(state: Any, model: nn.Module | None) -> Any:
    """Return a state by the names of the model, where it was kept by those of a wrapper around it.

    Penalties of version 0.1.0 kept ``_orig_mod.weight`` of what ``torch.compile`` returns.

    Args:
        state: A penalty's, or a mapping from names to importances or factors; anything else is
            returned as it is.
        model: Without wrappers; None of a penalty that was pickled by a version that had none.
    """
    if model is None or not isinstance(state, Mapping):
        return state
    known = dict(model.named_parameters(remove_duplicate=False))

    def plain(key: Any) -> Any:
        name = key if isinstance(key, str) else ""
        while name not in known and name.startswith(WRAPPERS):
            name = name.partition(".")[2]
        return name if name in known else key

    return {plain(key): without_wrappers(value, model) for key, value in state.items()}


def sharded_since(
    model: nn.Module | None, held: Mapping[str, tuple[nn.Parameter, Tensor]]
) -> dict[str, nn.Parameter]:
    """Return the parameters that have been distributed, or in another way, since they were seen.

    ``fully_shard`` and ``parallelize_module`` put DTensors in the place of parameters.

    Args:
        model: The model; None of a penalty that was pickled by a version that did not keep it.
        held: The parameters that a penalty holds, each with what it keeps beside it, by name.

    Returns:
        Those that the model has now, by name.
    """
    if model is None:
        return {}
    if not all(is_sharded(param) for param, _ in held.values()):
        reshard(model)  # after a forward pass FSDP2 may have left whole parameters in place
    live = dict(model.named_parameters())
    return {
        name: live[name]
        for name, (param, kept) in held.items()
        if name in live
        and is_sharded(live[name])
        and live[name].shape == param.shape
        and not (live[name] is param and is_placed_like(kept, param))
    }


def live_parameters(model: nn.Module, held: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Return the model's parameters as they are now, which a penalty built earlier may not know.

    Args:
        model: The model.
        held: What the penalty holds, by name; the model may have lost it since.

    Returns:
        The parameters by name, in the model's order.

    Raises:
        ValueError: The model has another parameter than the penalty under one name.
    """
    reshard(model)
    live = dict(model.named_parameters())
    for name, param in held.items():
        if live.get(name, param) is not param:
            raise ValueError(
                f"{name!r} is another parameter of {type(model).__name__} than when this penalty "
                "was built; build a new penalty, or take EWC.grown(model) for a larger one"
            )
    return live


def parameters_in_state(
    state: Mapping[str, Any], part: str, model: nn.Module, held: dict[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Return what a penalty holds and what else of the model a state has, such as a later head.

    Args:
        state: The state, not checked yet.
        part: Its mapping from parameter name to tensor.
        model: The model.
        held: What the penalty holds, by name.

    Returns:
        The parameters by name, in the model's order, then those that the model has no more.
    """
    found = state.get(part) if isinstance(state, Mapping) else None
    if not isinstance(found, Mapping):
        return held
    live = live_parameters(model, held)
    return {name: p for name, p in live.items() if name in found or name in held} | held


def check_tensor(what: str, tensor: Tensor, param: Tensor, minimum: float = -math.inf) -> None:
    """Refuse what cannot be stored beside ``param``.

    Args:
        what: Its name, for messages.
        tensor: The tensor: the parameter's shape, finite in the dtype penalties are computed in.
        param: The parameter.
        minimum: The smallest value allowed.

    Raises:
        TypeError: Not a tensor, or not floating point.
        ValueError: Another shape, not finite, or too small.
    """
    if not isinstance(tensor, Tensor):
        kind = type(tensor).__name__
        ways = {"Quantized": "; expand it by dequantize(*it)", "ndarray": "; torch.from_numpy(it)"}
        raise TypeError(f"{what} must be a tensor, got {kind}{ways.get(kind, '')}")
    if not tensor.is_floating_point():
        raise TypeError(
            f"{what} must be floating point, got {tensor.dtype}; convert it with .float()"
        )
    if tensor.shape != param.shape:
        raise ValueError(
            f"{what} has shape {tuple(tensor.shape)}, but the parameter has {tuple(param.shape)}; "
            "compute it on this model, as it is now"
        )
    stored = part_of(tensor).detach().to(accumulation_dtype(param.dtype))
    if not is_true_everywhere(stored.isfinite().all(), tensor):
        raise ValueError(
            f"{what} holds a value that is not finite in {stored.dtype}; "
            "look for an overflow where it was computed"
        )
    if not is_true_everywhere((stored >= minimum).all(), tensor):
        raise ValueError(f"{what} holds a negative value; importances are mean squares, so >= 0")


def check_unmoved(name: str, param: Tensor, kept: Tensor, *, same_dtype: bool = False) -> None:
    """Refuse a parameter that was moved, converted or reshaped since a penalty was built of it.

    Args:
        name: Of the parameter.
        param: The parameter.
        kept: Beside it from then on, in the dtype penalties are computed in.
        same_dtype: Whether that must be so still.

    Raises:
        ValueError: It was.
    """
    if param.shape != kept.shape or param.device != kept.device:
        what = f"{tuple(param.shape)} on {param.device}", f"{tuple(kept.shape)} on {kept.device}"
    elif same_dtype and accumulation_dtype(param.dtype) != kept.dtype:
        what = f"of {param.dtype}", f"of {kept.dtype}"
    elif not is_placed_like(param, kept):
        what = "distributed in one way", "in another"
    else:
        return
    raise ValueError(
        f"{name!r} is {what[0]}, and what the penalty keeps beside it {what[1]}; move and convert "
        "the model first, then build the penalty; load_state_dict brings the old one's state"
    )


def check_state(
    kind: str,
    state: Mapping[str, Any],
    expected: set[str],
    parts: set[str],
    held: Mapping[str, Any],
) -> None:
    """Refuse a state that is not of this kind, or not of these parameters.

    Args:
        kind: Whose state it should be, with its article, for messages.
        state: The state.
        expected: Its keys.
        parts: Those keys whose values are mappings from parameter name to tensor.
        held: Mapping whose keys are the parameters that the penalty holds.

    Raises:
        TypeError: A part is not a mapping.
        ValueError: Keys that are missing or too many; the message names the first.
    """
    if not isinstance(state, Mapping) or set(state) != expected:
        got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            f"{kind} state is a mapping with keys {sorted(expected)}, got {got}; load it into a "
            "penalty of the same kind, built with the same options"
        )
    remedy = "load it into a penalty of the same kind, built for the same model and parameters"
    for part in sorted(parts):
        if not isinstance(state[part], Mapping):
            raise TypeError(
                f"the state's {part} must be a mapping by parameter name, "
                f"got {type(state[part]).__name__}"
            )
        for name in held:
            if name not in state[part]:
                raise ValueError(
                    f"the state's {part} lacks {name!r}, which this penalty holds; {remedy}"
                )
        for name in state[part]:
            if name not in held:
                raise ValueError(
                    f"the state's {part} has {name!r}, which this penalty does not hold; {remedy}"
                )


def check_label(name: str, found: object) -> None:
    """Raise TypeError unless what a state records of its Fisher is a name or None."""  # noqa: DOC501
    if not isinstance(found, str | None):
        raise TypeError(f"the state's {name} must be a name, got {found!r}")


def check_option(name: str, found: object, own: object) -> None:
    """Refuse a state in which an option that cannot be loaded is another than the penalty's.

    Args:
        name: Of the option.
        found: In the state.
        own: In the penalty.

    Raises:
        ValueError: They differ.
    """
    if found != own:
        raise ValueError(
            f"the state has {name}={found!r}, this penalty {own!r}; build it with {name}={found!r}"
        )


def copy_like(param: Tensor, tensor: Tensor) -> Tensor:
    """Copy, placed as ``param`` and with its strides, in the dtype penalties are computed in."""
    copy = torch.empty_like(param, dtype=accumulation_dtype(param.dtype))
    part_of(copy).copy_(part_of(place_like(tensor.detach(), param)))
    return copy
