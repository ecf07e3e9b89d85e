"""The state of a measured diagonal, as it is saved and loaded.

It holds the importance by parameter name, whole wherever it is sharded, and what it is of. It goes
by the names of the model inside of any wrapper of torch's.
"""

from collections.abc import Mapping
from types import NoneType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ars.regularizers.checks import (
    check_draws,
    check_positive_int,
    checked_choice,
    trainable,
)
from ars.regularizers.fisher.estimators import ESTIMATORS, UNITS, Unit
from ars.regularizers.storage import Quantized, dequantize
from ars.sharded import is_sharded, place_as, whole

__all__ = ["STORED", "Kept", "Measured", "measured_in", "state_of"]

Kept: TypeAlias = dict[str, Tensor] | dict[str, Quantized]
# What an importance may be stored in, beside the dtype it was summed in.
STORED = (torch.float32, torch.bfloat16, torch.uint8)
_SUMMED = (torch.float32, torch.float64)
_DTYPES = {None: None} | {str(dtype).removeprefix("torch."): dtype for dtype in STORED}


def state_of(kept: Kept) -> dict[str, Any]:
    """Return the tensors of a state: whole ones, a collective operation where they are sharded.

    Args:
        kept: The importance, as the DiagonalFisher keeps it.
    """
    state: dict[str, Any] = {"importance": {}, "scale": {}}
    for name, stored in kept.items():
        if isinstance(stored, Quantized):
            state["importance"][name], state["scale"][name] = stored
        else:
            state["importance"][name] = whole(stored)
    return state


class Measured(NamedTuple):
    """What a state says, checked."""

    estimator: str
    unit: Unit
    draws: int
    n_samples: int
    dtype: torch.dtype | None
    importance: Kept


def measured_in(state: Mapping[str, Any], model: nn.Module) -> Measured:
    """Return what a state of a DiagonalFisher holds; tensors are copied, and placed as the model's.

    Args:
        state: With what :func:`state_of` returned.
        model: The model.

    Raises:
        TypeError: An entry has the wrong type.
        ValueError: The state is not of this model, or holds an invalid value; names the first
            difference.
    """
    names = {"estimator", "unit", "draws", "n_samples", "dtype", "importance", "scale"}
    if not isinstance(state, Mapping) or set(state) != names:
        raise ValueError(f"a state of a DiagonalFisher has the entries {sorted(names)}")
    estimator = checked_choice("estimator", state["estimator"], (*ESTIMATORS, "adam"))
    unit = checked_choice("unit", state["unit"], UNITS)
    check_draws(state["draws"], estimator)
    check_positive_int("n_samples", state["n_samples"])
    if not isinstance(state["dtype"], (str, NoneType)) or state["dtype"] not in _DTYPES:
        raise ValueError(f"unknown dtype {state['dtype']!r}; expected one of {list(_DTYPES)}")
    dtype = _DTYPES[state["dtype"]]
    importance = _kept_from(state, model, dtype)
    return Measured(estimator, unit, state["draws"], state["n_samples"], dtype, importance)


def _kept_from(state: Mapping[str, Any], model: nn.Module, dtype: torch.dtype | None) -> Kept:
    """Return copies of a state's importance."""  # noqa: DOC501
    importance, scale = state["importance"], state["scale"]
    for what, part in (("importance", importance), ("scale", scale)):
        if not isinstance(part, Mapping) or not all(isinstance(t, Tensor) for t in part.values()):
            raise TypeError(f"the state's {what!r} must be a mapping of tensors")
    if set(scale) != (set(importance) if dtype == torch.uint8 else set()):
        raise ValueError("the state's 'scale' is not of the importance that it has")
    parameters, found = dict(model.named_parameters()), dict[str, Any]()
    for name in trainable(model):
        if name not in importance:
            raise ValueError(
                f"the state lacks {name!r}, which is trained: it is of another model (load it "
                "before what is new is added, or freeze that meanwhile)"
            )
    for name, tensor in importance.items():
        if name not in parameters:
            raise ValueError(f"the state has {name!r}, which {type(model).__name__} does not have")
        p = parameters[name]
        if tensor.shape != p.shape:
            raise ValueError(
                f"the state's importance of {name!r} has shape {tuple(tensor.shape)}, the "
                f"parameter {tuple(p.shape)}"
            )
        if tensor.dtype not in (_SUMMED if dtype is None else (dtype,)):
            raise ValueError(
                f"the state's importance of {name!r} is {tensor.dtype}, not {dtype or 'a sum'}"
            )
        values = dequantize(tensor, scale[name]) if dtype == torch.uint8 else tensor
        if not bool((values.isfinite() & (values >= 0)).all()):
            raise ValueError(f"the state's importance of {name!r} is negative or not finite")
        if dtype == torch.uint8:
            found[name] = Quantized(*(_copied(t, p) for t in (tensor, scale[name])))
        else:
            found[name] = place_as(_copied(tensor, p), p) if is_sharded(p) else _copied(tensor, p)
    return found


def _copied(tensor: Tensor, p: nn.Parameter) -> Tensor:
    return tensor.detach().to(p.device, copy=True)
