"""Penalties in safetensors files: no pickle, checked before anything is believed.

The tensors are those of ``state_dict()``, named by their place in it (``anchor/0.weight``). The
metadata holds four strings: ``format``; ``kind``, the class; ``state``, JSON of the whole state in
which each tensor is replaced by its name, shape, dtype and CRC-32; and ``crc32`` of ``state``. For
an EWC that state includes the Fisher's estimator.
"""

import ctypes
import json
import os
import zlib
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from ars.atomic import replacing

__all__ = ["load_penalty", "save_penalty"]

_FORMAT = "ars-triton penalty 1"
_TENSOR_KEY = "tensor"  # the key that tells the record of a tensor from a part of a state


class Stateful(Protocol):
    """What can be saved: a :class:`DiagonalFisher`, and every penalty but :class:`Distillation`."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers, strings and None, in mappings."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state that fits, or raise and change nothing."""
        ...


def save_penalty(penalty: Stateful, path: str | os.PathLike[str]) -> None:
    """Write a penalty's state to a safetensors file.

    The file appears whole or not at all: it is written beside ``path``, flushed to the disk, and
    renamed. A symbolic link is followed; a file that was there hands on its mode.

    Args:
        penalty: An :class:`EWC`, a :class:`SubspacePenalty`, a fitted :class:`DiagonalFisher` or
            any other with ``state_dict``.
        path: The file, replaced if there is one; only a regular file is.

    Raises:
        ImportError: safetensors is not installed.
        OSError: The file cannot be written; one that was there is as it was.
        RuntimeError: ``penalty`` is a Fisher that is not fitted.
        TypeError: ``penalty`` has no state, or one with something neither a tensor nor JSON.

    Example:
        >>> import tempfile, torch
        >>> from ars.regularizers import EWC, load_penalty, save_penalty
        >>> model = torch.nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/ewc.safetensors"
        ...     save_penalty(EWC(model, {"weight": torch.ones(1, 2)}, strength=5.0), path)
        ...     penalty = EWC(model, {"weight": torch.zeros(1, 2) + 9.0})
        ...     load_penalty(penalty, path)
        >>> penalty.strength, penalty.importance
        (5.0, {'weight': tensor([[1., 1.]])})
    """
    library = _safetensors()
    _check_stateful(penalty)
    tensors: dict[str, Tensor] = {}
    record = json.dumps(_recorded(penalty.state_dict(), "", tensors), allow_nan=False)
    metadata = {
        "format": _FORMAT,
        "kind": type(penalty).__name__,
        "state": record,
        "crc32": _text_checksum(record),
    }
    try:
        with replacing(path) as unfinished:
            library.torch.save_file(tensors, unfinished, metadata)
    except library.SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def load_penalty(penalty: Stateful, path: str | os.PathLike[str]) -> None:
    """Load a file of :func:`save_penalty` into a penalty of the same kind and model.

    Args:
        penalty: Built for the model as for a ``load_state_dict``; a :class:`DiagonalFisher` need
            not be fitted.
        path: The file.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: There is no such file.
        TypeError: ``penalty`` has no state, or an entry of the file the wrong type.
        ValueError: The file is damaged, of another kind of penalty, or of another model; names the
            first difference. Nothing has changed then.
    """
    library = _safetensors()
    _check_stateful(penalty)
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no file {os.fspath(path)!r}")
    if not os.path.isfile(path):  # a named pipe would be waited for
        raise ValueError(f"{path} is no regular file: name a file of save_penalty")
    try:
        with library.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except library.SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is not a file of save_penalty: its format is {metadata.get('format')!r}, "
            f"expected {_FORMAT!r}"
        )
    if not {"kind", "state", "crc32"} <= metadata.keys() or (
        metadata["crc32"] != _text_checksum(metadata["state"])
    ):
        raise ValueError(f"{path} is damaged: its record is not what was saved; use another copy")
    if metadata["kind"] != type(penalty).__name__:
        raise ValueError(
            f"{path} holds the state of {metadata['kind']}, not of {type(penalty).__name__}; "
            f"load it into a {metadata['kind']}"
        )
    try:
        state = _restored(json.loads(metadata["state"]), tensors)
    except (ValueError, KeyError, RecursionError) as error:
        lacking = "it lacks " if isinstance(error, KeyError) else ""
        raise ValueError(f"{path}: its record is no state ({lacking}{error})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: its record is no state, but {type(state).__name__}")
    try:
        penalty.load_state_dict(state)
    except TypeError as error:
        raise TypeError(f"{path}: {error}") from error
    except (ValueError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "files of penalties need the safetensors library: "
            "pip install 'ars-triton[safetensors]', or torch.save(penalty.state_dict(), path)"
        ) from error
    return safetensors


def _check_stateful(penalty: object) -> None:
    if isinstance(penalty, type):
        raise TypeError(f"{penalty.__name__} is the class: build a penalty of it first")
    if isinstance(penalty, (nn.Module, Optimizer)) and not hasattr(penalty, "terms"):
        raise TypeError(f"{type(penalty).__name__} is no penalty: torch.save its state_dict()")
    if not hasattr(penalty, "state_dict") or not hasattr(penalty, "load_state_dict"):
        remedy = "the penalty comes first, then the path"
        if hasattr(type(penalty), "importance") or hasattr(type(penalty), "factors"):
            remedy = "save the penalty that is made of it"
        raise TypeError(f"{type(penalty).__name__} has no state_dict and load_state_dict; {remedy}")


def _recorded(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """Return ``value`` as JSON can hold it, its tensors moved to ``tensors``."""  # noqa: DOC501
    if isinstance(value, Mapping):
        return {k: _recorded(v, f"{place}/{k}" if place else k, tensors) for k, v in value.items()}
    if isinstance(value, Tensor):
        tensors[place] = tensor = value.detach().cpu().contiguous()
        return {
            _TENSOR_KEY: place,
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype),
            "crc32": _checksum(tensor),
        }
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{place!r} of the state has type {type(value).__name__}: no tensor, no JSON")


def _restored(record: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the state of a record, once each tensor is what was saved."""  # noqa: DOC501
    if not isinstance(record, dict):
        return record
    if not isinstance(name := record.get(_TENSOR_KEY), str):
        return {key: _restored(value, tensors) for key, value in record.items()}
    if name not in tensors:
        raise ValueError(f"the file is damaged: it lacks {name!r}, which its record has")
    tensor = tensors[name]
    found = [list(tensor.shape), str(tensor.dtype), _checksum(tensor)]
    if found != [record["shape"], record["dtype"], record["crc32"]]:
        raise ValueError(f"the file is damaged: {name!r} is not what was saved; use another copy")
    return tensor


def _text_checksum(record: str) -> str:
    return str(zlib.crc32(record.encode()))


def _checksum(tensor: Tensor) -> int:
    """CRC-32 of a contiguous CPU tensor's bytes, read where they are."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return 0
    return zlib.crc32((ctypes.c_char * size).from_address(tensor.data_ptr()))
