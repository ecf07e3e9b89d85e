"""Rows of a parameter removed and added, with the moments and the gradient that belong to them."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ars import reference
from ars.state import SHAPED_STATE

__all__ = ["change_rows_"]


def change_rows_(
    param: Tensor, name: str, state: dict[str, Any], keep: Tensor | None, added: Tensor | None
) -> None:
    """Give a parameter other rows, in place; see :meth:`ars.ARSAdam.change_rows`.

    Args:
        param: The parameter.
        name: What to call it in an error.
        state: Its optimizer state, perhaps empty.
        keep: Indices or a mask of the rows that stay, None for all.
        added: Rows that are put after them, or None.

    Raises:
        TypeError: ``keep`` or ``added`` has another dtype.
        ValueError: A shape or an index does not fit; nothing has been changed then.
    """
    if param.dim() == 0 or is_traceable_wrapper_subclass(param):
        raise ValueError(
            f"{name} has no rows of its own to change: it is a {type(param).__name__} of shape "
            f"{tuple(param.shape)}"
        )
    data = param.detach()
    if added is None:
        added = data[:0]
    _check_added(name, data, added)
    index = _index(name, data, keep)
    added = added.detach().to(data.device)
    rest: Tensor | None = None
    if "param_remainder" in state:  # the master weights are what is added, not its rounding
        added, rest = reference.split_master(added.float())

    def changed(tensor: Tensor, new: Tensor | None = None) -> Tensor:
        if new is None:
            new = tensor.new_zeros((len(added), *tensor.shape[1:]))
        return torch.cat([tensor.detach().index_select(0, index), new.to(tensor.dtype)])

    entries = {
        key: changed(value, rest if key == "param_remainder" else None)
        for key, value in state.items()
        if key in SHAPED_STATE
    }
    grad = None if param.grad is None else changed(param.grad)
    new = changed(data, added)
    param.grad = None  # torch compares the shapes of both
    param.data = new
    param.grad = grad
    state.update(entries)


def _check_added(name: str, data: Tensor, added: Tensor) -> None:
    """Raise unless rows can be added.

    Raises:
        TypeError: They are complex, and the parameter is not.
        ValueError: They have another shape.
    """
    if added.dim() != data.dim() or added.shape[1:] != data.shape[1:]:
        raise ValueError(
            f"rows to add to {name} must have shape (n{', ...' * (data.dim() > 1)}) like its "
            f"{tuple(data.shape)}, got {tuple(added.shape)}"
        )
    if added.is_complex() and not data.is_complex():
        raise TypeError(f"{name} is {data.dtype}, the rows to add {added.dtype}: pass real ones")


def _index(name: str, data: Tensor, keep: Tensor | None) -> Tensor:
    """Return the indices of the rows that stay.

    Raises:
        TypeError: ``keep`` has another dtype.
        ValueError: It does not fit.
    """
    rows = len(data)
    if keep is None:
        return torch.arange(rows, device=data.device)
    if keep.dtype == torch.bool:
        if keep.shape != (rows,):
            raise ValueError(
                f"the mask of the rows of {name} to keep has shape {tuple(keep.shape)}, must have "
                f"({rows},)"
            )
        return keep.to(data.device).nonzero().squeeze(1)
    if keep.dtype != torch.int64:
        raise TypeError(
            f"the rows of {name} to keep must be int64 indices or a bool mask, got {keep.dtype}"
        )
    if keep.dim() != 1 or (keep.numel() and not 0 <= int(keep.min()) <= int(keep.max()) < rows):
        raise ValueError(
            f"the rows of {name} to keep must be a list of indices from 0 to {rows - 1}, got "
            f"{keep.tolist()}"
        )
    return keep.to(data.device)
