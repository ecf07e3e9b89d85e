"""What a state dict must hold before anything of it is loaded, and the way back if it cannot be."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, optim

from ars.controller import ARSController
from ars.penalty import check_strength, parameter_names
from ars.step.state import PRODUCTS, PRODUCTS_STEP, SHAPED

__all__ = ["check_state_dict", "take_controller", "unchanged_on_error"]

# What the state of a parameter that has been stepped consists of, in torch's optimizers.
_ENTRIES: dict[tuple[type, ...], tuple[str, ...]] = {
    (optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam): ("step", "exp_avg", "exp_avg_sq"),
    (optim.Adamax,): ("step", "exp_avg", "exp_inf"),
    (optim.Adadelta,): ("step", "square_avg", "acc_delta"),
    (optim.Adagrad,): ("step", "sum"),
    (optim.RMSprop,): ("step", "square_avg"),
    (optim.Rprop,): ("step", "prev", "step_size"),
}
# Hyperparameters by name: what each number must be, and how that is said.
_Rule = tuple[Callable[[float], bool], str]
_AT_LEAST_0: _Rule = (lambda x: 0 <= x <= 1e38, "in [0, 1e38]")
_RULES: dict[str, _Rule] = {
    "lr": _AT_LEAST_0,
    "eps": _AT_LEAST_0,
    "weight_decay": _AT_LEAST_0,
    "momentum": _AT_LEAST_0,
    "betas": (lambda x: 0 <= x < 1, "in [0, 1)"),
}
# What belongs to the entries too, if a group says so.
_OPTIONAL = (
    ((optim.Adam, optim.AdamW), "amsgrad", "max_exp_avg_sq"),
    ((optim.RMSprop,), "centered", "grad_avg"),
    ((optim.RMSprop,), "momentum", "momentum_buffer"),
)
_ANY: _Rule = (lambda x: abs(x) <= 1e38 or math.isinf(x), "a number of float32")


@contextlib.contextmanager
def unchanged_on_error(
    optimizer: optim.Optimizer, controller: ARSController | None
) -> Iterator[None]:
    """Put an optimizer back as it was if loading fails, also in a hook.

    Args:
        optimizer: The optimizer; torch gives it new groups and states, and keeps the old ones.
        controller: Its controller, which is loaded in place.
    """
    before = optimizer.__dict__.copy()
    memory = {} if controller is None else controller.state_dict()
    copies = {name: tensor.clone() for name, tensor in memory.items()}
    try:
        yield
    except BaseException:
        optimizer.__dict__.clear()
        optimizer.__dict__.update(before)
        for name, tensor in memory.items():
            tensor.copy_(copies[name])
        raise


def take_controller(state_dict: dict[str, Any]) -> None:
    """Take a controller out of the groups of a state dict, and put it beside them.

    ``torch.distributed.checkpoint`` keeps it there alone, and leaves empty dicts in the place of
    what another optimizer's state does not have; these are dropped. What is no state dict is left.

    Args:
        state_dict: The state dict, changed; its groups and states are not.
    """
    groups, states = state_dict.get("param_groups"), state_dict.get("state")
    if isinstance(groups, list) and all(isinstance(group, Mapping) for group in groups):
        found = [group["controller"] for group in groups if group.get("controller")]
        state_dict["param_groups"] = [
            {name: value for name, value in group.items() if name != "controller"}
            for group in groups
        ]
        if found and state_dict.get("controller") is None:
            state_dict["controller"] = found[0]
    if isinstance(states, Mapping):
        state_dict["state"] = {
            key: _without_empty(entry) if isinstance(entry, Mapping) else entry
            for key, entry in states.items()
        }


def _without_empty(entry: Mapping[str, Any]) -> dict[str, Any]:
    empty = [what for what, value in entry.items() if isinstance(value, Mapping) and not value]
    return {what: value for what, value in entry.items() if what not in empty}


def check_state_dict(
    optimizer: optim.Optimizer, saved: Any, *, entries: bool = True, products: bool | None = None
) -> None:
    """Raise unless a state dict can be loaded, as far as torch does not look itself.

    Moments may hold any numbers: those of a run that has diverged can be loaded.

    Args:
        optimizer: Who loads it.
        saved: The state dict.
        entries: Whether to look at the parameters' states, which only torch's own optimizers keep
            as is known here: GaLore has moments of another shape than the parameter's.
        products: Whether the products of the betas will be used. None is for an optimizer of
            torch's, which does not start by itself what its state lacks.

    Raises:
        TypeError: It is, or has, something of another type.
        ValueError: Something is missing, out of its range or of another shape.
    """
    if not isinstance(saved, Mapping):
        raise TypeError(f"a state dict must be a dict, got {type(saved).__name__}")
    for name, kind in (("state", Mapping), ("param_groups", list)):
        if name not in saved:
            raise ValueError(f"this state dict has no {name!r}: pass what state_dict() returned")
        if not isinstance(saved[name], kind):
            raise TypeError(f"{name!r} of the state dict is a {type(saved[name]).__name__}")
    groups, saved_groups = optimizer.param_groups, saved["param_groups"]
    for index, group in enumerate(saved_groups):
        _check_group(optimizer, index, group)
    keys = [key for group in saved_groups for key in group["params"]]
    if len(set(keys)) < len(keys):
        raise ValueError("a parameter stands twice in the groups of this state dict")
    sizes = [len(group["params"]) for group in groups]
    if sizes != [len(group["params"]) for group in saved_groups]:
        return  # torch says so
    strangers = [key for key in saved["state"] if isinstance(key, int) and key not in set(keys)]
    if strangers:
        raise ValueError(
            f"the states {strangers[:3]} of this state dict belong to no parameter of its groups"
        )
    if not entries:
        return
    names = parameter_names(groups)
    for group, saved_group in zip(groups, saved_groups, strict=True):
        wanted = next((w for kinds, w in _ENTRIES.items() if isinstance(optimizer, kinds)), ())
        for kinds, flag, name in _OPTIONAL if products is None else ():
            if isinstance(optimizer, kinds) and saved_group.get(flag):
                wanted += (name,)
        for param, key in zip(group["params"], saved_group["params"], strict=True):
            entry = saved["state"].get(key, {})
            _check_entry(wanted, names[param], param, entry)
            if products and not param.is_meta:
                _check_products(names[param], entry)


def _check_group(optimizer: optim.Optimizer, index: int, group: Any) -> None:
    """Raise unless a saved group has its hyperparameters, in their ranges.

    Raises:
        TypeError: It or a hyperparameter has another type.
        ValueError: A hyperparameter is missing or out of its range.
    """
    where = f"group {index} of the state dict"
    if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
        raise TypeError(f"{where} is no dict with a list of params")
    for key in group["params"]:
        if not isinstance(key, (int, str)):
            raise TypeError(f"{where} names a parameter by {key!r}: a number or a name is wanted")
    present = optimizer.param_groups[min(index, len(optimizer.param_groups) - 1)]
    for name, default in optimizer.defaults.items():
        is_flag = default is None or isinstance(default, bool)  # which older versions did not save
        if name not in group:
            if name in present and not is_flag:
                raise ValueError(f"{where} has no {name!r}: pass what state_dict() returned")
        elif isinstance(default, bool) or name in ("foreach", "fused"):
            may_be_none = name in ("foreach", "fused")
            if not isinstance(group[name], bool) and not (may_be_none and group[name] is None):
                raise TypeError(f"{name} in {where} must be a bool, got {group[name]!r}")
        elif not is_flag:
            rule = _RULES.get(name, _ANY)
            _check_hyperparameter(f"{name} in {where}", group[name], present.get(name), rule)
    if group.get("penalty_strength") is not None:
        check_strength(f"penalty_strength in {where}", group["penalty_strength"])


def _check_hyperparameter(name: str, value: Any, present: Any, rule: _Rule) -> None:
    """Raise unless a hyperparameter, or each of a pair, is one number in its range.

    Raises:
        TypeError: It is something else.
        ValueError: It is out of its range.
    """
    if isinstance(present, (tuple, list)):
        if not isinstance(value, (tuple, list)) or len(value) != len(present):
            raise TypeError(f"{name} must be {len(present)} numbers, got {value!r}")
        pairs = list(zip(value, present, strict=True))
    else:
        pairs = [(value, present)]
    # What is no number now, None or an object of another package's, may be anything.
    values = [v for v, p in pairs if isinstance(p, (int, float, Tensor))]
    for number in values:
        if not rule[0](_number(name, number)):
            raise ValueError(f"{name} must be {rule[1]}, got {value!r}")


def _number(name: str, value: Any) -> float:
    """Return a number, or the one element of a tensor.

    Raises:
        TypeError: It is no real number.
        ValueError: The tensor has more elements, or none.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number, has shape {tuple(value.shape)}")
        if value.is_complex() or value.dtype == torch.bool or value.layout != torch.strided:
            raise TypeError(f"{name} must be a real number, is {value.dtype}, {value.layout}")
        if value.is_meta:
            raise ValueError(f"{name} is on the meta device, where there are no numbers")
        return float(value.detach())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def _check_entry(wanted: tuple[str, ...], name: str, param: Tensor, entry: Any) -> None:
    """Raise unless the saved state of a parameter is whole and has its shape.

    Raises:
        TypeError: Something in it has another type.
        ValueError: Something is missing, or of another shape.
    """
    if not isinstance(entry, Mapping):
        raise TypeError(f"the saved state of {name} is a {type(entry).__name__}, must be a dict")
    missing = [what for what in wanted if what not in entry]
    if entry and missing:
        raise ValueError(
            f"the saved state of {name} lacks {missing[0]!r}: load the state of the same kind of "
            "optimizer, or leave this parameter's entry out of it to start it afresh"
        )
    if "step" in entry and not (param.is_meta and isinstance(entry["step"], Tensor)):
        step = _number(f"the saved step of {name}", entry["step"])
        if not (0 <= step <= 2**53 and step == int(step)):
            raise ValueError(f"the saved step of {name} must be a count of steps, got {step}")
    for what in (key for key in entry if key in SHAPED):
        if what == "momentum_buffer" and entry[what] is None:  # SGD without momentum
            continue
        _check_shaped(f"{what} of {name}", param, entry[what], moment=what != "param_remainder")


def _check_shaped(name: str, param: Tensor, value: Any, *, moment: bool) -> None:
    """Raise unless what was saved is an array like the parameter.

    Raises:
        TypeError: It is no array of such numbers.
        ValueError: It has another shape.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} was saved as a {type(value).__name__}, must be a tensor")
    if value.is_meta and not param.is_meta:
        raise ValueError(f"{name} was saved on the meta device, where there are no numbers")
    if value.shape != param.shape:
        raise ValueError(
            f"{name} was saved with shape {tuple(value.shape)}, the parameter has "
            f"{tuple(param.shape)}: load the state of the same model, or leave this parameter's "
            "entry out of it to start it afresh"
        )
    kinds = (value.is_floating_point(), value.is_complex())
    if value.layout != torch.strided or (
        moment and kinds != (not param.is_complex(), param.is_complex())
    ):
        raise TypeError(
            f"{name} was saved as {value.dtype} with layout {value.layout}, the parameter is "
            f"{param.dtype}: load the state of the same model"
        )


def _check_products(name: str, entry: Mapping[str, Any]) -> None:
    """Raise unless saved products of betas, if there are any, are some.

    Raises:
        TypeError: They are no floating-point tensor.
        ValueError: They have another shape, or are out of their range.
    """
    if PRODUCTS not in entry:
        return
    products = entry[PRODUCTS]
    if (
        not isinstance(products, Tensor)
        or not products.is_floating_point()
        or products.layout != torch.strided
    ):
        raise TypeError(f"{PRODUCTS} of {name} must be a floating-point tensor, got {products!r}")
    if products.shape != (2,):
        raise ValueError(
            f"{PRODUCTS} of {name} was saved with shape {tuple(products.shape)}, must be (2,)"
        )
    if products.is_meta:
        raise ValueError(f"{PRODUCTS} of {name} is on the meta device, without numbers")
    if not bool(((products >= 0) & (products <= 1)).all()):
        raise ValueError(f"{PRODUCTS} of {name} must be in [0, 1], got {products.tolist()}")
    if PRODUCTS_STEP in entry and math.isnan(
        _number(f"{PRODUCTS_STEP} of {name}", entry[PRODUCTS_STEP])
    ):
        raise ValueError(f"{PRODUCTS_STEP} of {name} is no number")
