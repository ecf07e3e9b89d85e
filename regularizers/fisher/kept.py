"""What is kept of a diagonal: finite numbers in the dtype asked for, as sharded as the model.

A state holds the importance by parameter name, whole wherever it is sharded, and what it is of. It
goes by the names of the model inside of any wrapper of torch's.
"""

import warnings
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
from ars.regularizers.storage import Quantized, dequantize, quantize
from ars.sharded import is_sharded, place_as, whole

__all__ = [
    "STORED",
    "Kept",
    "Measured",
    "check_can_keep",
    "checked_finite",
    "kept",
    "measured_in",
    "state_of",
    "warn_of_zeros",
]

Kept: TypeAlias = dict[str, Tensor] | dict[str, Quantized]
# What an importance may be stored in, beside the dtype it was summed in.
STORED = (torch.float32, torch.bfloat16, torch.uint8)
_SUMMED = (torch.float32, torch.float64)
_DTYPES = {None: None} | {str(dtype).removeprefix("torch."): dtype for dtype in STORED}


def check_can_keep(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Refuse scales of a sharded importance.

    Args:
        model: The model.
        dtype: What its importance is to be kept in.

    Raises:
        ValueError: It is uint8, and a parameter is sharded.
    """
    for name, p in model.named_parameters():
        if dtype == torch.uint8 and is_sharded(p):
            raise ValueError(
                f"parameter {name!r} is sharded, and the scales of dtype=torch.uint8 are of "
                "blocks of the whole: leave dtype None or take torch.bfloat16, and let "
                "EWC(storage='compact') compress each process's part"
            )


def kept(
    importance: dict[str, Tensor], dtype: torch.dtype | None, sharded: Mapping[str, nn.Parameter]
) -> Kept:
    """Return what is kept of an importance, which is emptied.

    Args:
        importance: By parameter name, in the dtype that it was summed in.
        dtype: What to keep it in; None for that.
        sharded: The DTensors among the parameters.
    """
    if dtype == torch.uint8:
        return {name: quantize(tensor) for name, tensor in importance.items()}
    return {
        # Popped, so that no more than one is there in both ways.
        name: _placed(tensor.to(dtype or tensor.dtype), sharded.get(name))
        for name, tensor in ((n, importance.pop(n)) for n in list(importance))
    }


def _placed(tensor: Tensor, like: nn.Parameter | None) -> Tensor:
    return tensor if like is None else place_as(tensor, like)


def checked_finite(importance: Mapping[str, Tensor]) -> None:
    """Refuse an importance that is not finite.

    Args:
        importance: By parameter name.

    Raises:
        ValueError: It is not; names the first such parameter.
    """
    for name, tensor in importance.items():
        if not _is_true(tensor.isfinite().all()):
            raise ValueError(
                f"the importance of {name!r} is not finite; check that the model's logits and "
                "gradients are finite (float16 overflows: use bfloat16 or float32)"
            )


def warn_of_zeros(importance: Mapping[str, Tensor], *, stacklevel: int) -> None:
    """Say which parameters a penalty would not protect at all.

    Args:
        importance: By parameter name.
        stacklevel: Of the warning, seen from the caller.
    """
    names = [name for name, tensor in importance.items() if not _is_true(tensor.any())]
    if names:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        warnings.warn(
            f"the importance of {', '.join(map(repr, names[:8]))}{more} is 0 throughout, so a "
            "penalty will not protect them: every sample's gradient is 0 there, as of A of a LoRA "
            "while B is 0. Fit after training, or freeze what is not used",
            stacklevel=stacklevel + 1,
        )


def _is_true(flag: Tensor) -> bool:
    return bool(flag if type(flag) is Tensor else whole(flag))


def state_of(kept: Kept) -> dict[str, Any]:
    """Return the tensors of a state: whole ones, a collective operation where they are sharded.

    Args:
        kept: What :func:`kept` returned.
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
    check_can_keep(model, dtype)
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
