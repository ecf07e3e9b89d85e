"""The state of an EWC penalty, checked before anything of it is believed."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from torch import Tensor

from ars.regularizers.checks import (
    check_label,
    check_option,
    check_state,
    check_tensor,
    checked_choice,
    checked_strength,
)
from ars.regularizers.importance import layer_factors
from ars.regularizers.storage import dequantize

__all__ = ["EWCState", "Mode", "Storage", "checked_ewc_state"]

Mode: TypeAlias = Literal["coupled", "proximal"]
Storage: TypeAlias = Literal["full", "bfloat16", "compact"]


class EWCState(NamedTuple):
    """What a state holds.

    Args:
        strength: Lambda.
        mode: How the penalty enters the step.
        estimator: Of the Fisher, None where unknown.
        constant: What the value of several tasks lacks.
        factors: Of lambda, by parameter name; further tasks are weighted by them.
        tensors: Importance in floating point, and anchor, by parameter name.
    """

    strength: float | Tensor
    mode: Mode
    estimator: str | None
    constant: float
    factors: dict[str, float]
    tensors: dict[str, tuple[Tensor, Tensor]]


def checked_ewc_state(
    state: Mapping[str, Any], parameters: Mapping[str, Tensor], storage: Storage
) -> EWCState:
    """Take a state apart.

    Args:
        state: What ``EWC.state_dict`` returned.
        parameters: Of the penalty that it is for, by name.
        storage: That penalty's.

    Raises:
        TypeError: An entry has the wrong type.
        ValueError: The state is of another model or storage, or holds an invalid value; the message
            names the first difference.
    """
    if isinstance(state, Mapping) and "storage" in state:  # on it depends what else there is
        check_option("storage", state["storage"], storage)
    parts = {"anchor", "importance", "layer_strengths"}
    parts |= {"scale"} if storage == "compact" else set()
    options = {"strength", "mode", "estimator", "constant", "storage"}
    check_state("an EWC", state, options | parts, parts, parameters)
    check_label("estimator", state["estimator"])
    tensors = {}
    for name, p in parameters.items():
        anchor, omega = state["anchor"][name], state["importance"][name]
        if storage == "compact":
            omega = dequantize(omega, state["scale"][name])
        check_tensor(f"the state's anchor of {name!r}", anchor, p)
        check_tensor(f"the state's importance of {name!r}", omega, p, minimum=0.0)
        tensors[name] = omega, anchor
    return EWCState(
        strength=checked_strength(state["strength"]),
        mode=checked_choice("mode", state["mode"], get_args(Mode)),
        estimator=state["estimator"],
        constant=float(checked_strength(state["constant"], "the state's constant")),
        factors=layer_factors(state["layer_strengths"], parameters),
        tensors=tensors,
    )
