"""What is asked of parameter groups and of clipping them, beyond what torch asks."""

from typing import Any

from torch import Tensor

from ars.penalty import check_strength

__all__ = ["check_max_grad_norm", "complete_group", "has_gradient", "is_trial"]


def check_max_grad_norm(norm: Any) -> None:
    """Raise unless gradients can be clipped to this norm, or it is None.

    Args:
        norm: The norm.

    Raises:
        TypeError: It is not a number.
        ValueError: It is not > 0.
    """
    if norm is None:
        return
    if not isinstance(norm, (int, float)) or isinstance(norm, bool):
        raise TypeError(f"max_grad_norm must be a number or None, got {norm!r}: use float(...)")
    if not norm > 0:
        raise ValueError(f"max_grad_norm must be > 0, or None not to clip, got {norm}")


def complete_group(group: Any) -> None:
    """Check what torch does not check of a new group, and give it a penalty strength.

    Of a parameter that is in it twice torch only warns; our kernels would race for it.

    Args:
        group: The group; an iterator in it becomes a list.

    Raises:
        TypeError: It is not a dictionary, or its strength not a number.
        ValueError: It lists a parameter twice, or its strength is out of its range.
    """
    if not isinstance(group, dict):
        raise TypeError(f"param_group must be a dict, but got {type(group)}")
    if group.setdefault("penalty_strength", None) is not None:
        check_strength("penalty_strength", group["penalty_strength"])
    if isinstance(group["params"], (Tensor, set)):
        return
    group["params"] = list(group["params"])  # which may be an iterator
    first: dict[int, int] = {}
    for i, entry in enumerate(group["params"]):
        name, param = entry if isinstance(entry, tuple) else (f"parameter {i}", entry)
        if id(param) in first:
            raise ValueError(
                f"a parameter group with duplicate parameters: {name} is the same tensor as "
                f"parameter {first[id(param)]}; list every parameter once, as "
                "Module.parameters() does"
            )
        first[id(param)] = i


def is_trial(groups: list[dict[str, Any]]) -> bool:
    """Whether a step is only to make the state: all learning rates and all gradients are 0.

    ``torch.distributed.checkpoint`` takes one before it saves or loads. To be asked only while
    there is no state: reading gradients waits for the device, where every known learning rate is 0.

    Args:
        groups: The parameter groups.
    """
    for group in groups:
        lr = group["lr"].detach() if isinstance(group["lr"], Tensor) else group["lr"]
        # A base optimizer's may be no number, such as Adafactor's None; then it is not 0.
        if (isinstance(lr, Tensor) and lr.device.type != "cpu") or lr != 0:
            return False
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    return bool(grads) and not any(grad.is_sparse or bool(grad.any()) for grad in grads)


def has_gradient(groups: list[dict[str, Any]]) -> bool:
    """Whether a parameter has a gradient.

    Args:
        groups: The parameter groups.
    """
    return any(param.grad is not None for group in groups for param in group["params"])
