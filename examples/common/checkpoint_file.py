"""Checkpoints that are whole or absent, and that notice damage.

A file is written beside its destination, flushed to the disk and then renamed over it, so a kill
at any moment leaves the old file or the new one. A digest of the whole content travels inside.
Files hold only tensors, numbers, strings and containers of these: loading runs no code.
"""

import hashlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ars.atomic import replacing
from common.errors import DamagedError, UsageError
from common.plain_files import open_file

__all__ = ["load_checkpoint", "save_checkpoint"]

_DIGEST = "sha256"
_NO_MEMORY = "can't allocate memory"  # torch raises a plain RuntimeError


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` and its digest to ``path`` in one atomic step.

    Args:
        path: destination; its folder exists.
        content: nested dicts, lists and tuples of tensors, numbers, strings, bools and ``None``.
    """
    archive = io.BytesIO()  # so that a full disk is an OSError of ours and not one of torch's own
    torch.save({**content, _DIGEST: _digest(content)}, archive)
    with replacing(path) as unfinished:
        unfinished.write_bytes(archive.getbuffer())


def load_checkpoint(path: Path, *, remedy: str) -> dict[str, Any]:
    """Read a checkpoint back, on the CPU.

    Args:
        path: a file that `save_checkpoint` wrote.
        remedy: what the user should do if it is damaged; ends the error message.

    Raises:
        DamagedError: the file is damaged.
        UsageError: it cannot be read, which says nothing about what is in it.
    """
    try:
        with open_file(path) as file:
            content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        whole = content.pop(_DIGEST) == _digest(content)
    except Exception as error:  # a damaged archive can raise nearly anything while it is parsed
        if isinstance(error, (OSError, MemoryError)) or _NO_MEMORY in str(error):
            reason = (error.strerror or error) if isinstance(error, OSError) else "out of memory"
            raise UsageError(
                f"{path} cannot be read ({reason}) and was left as it is: "
                "mend that and run the same command again"
            ) from None
        reason = f"{type(error).__name__} while reading it"
        raise DamagedError(f"{path} is damaged ({reason}): {remedy}") from None
    if not whole:
        raise DamagedError(f"{path} is damaged (its checksum does not match): {remedy}")
    return content


def _digest(content: Any) -> str:
    state = hashlib.sha256()
    _update(state, content)
    return state.hexdigest()


def _update(state: "hashlib._Hash", value: Any) -> None:
    if isinstance(value, Tensor):
        state.update(f"tensor {value.dtype} {tuple(value.shape)}".encode())
        # Bytes, not values: the digest then covers every dtype, and NaN equals itself.
        state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, dict):
        state.update(f"dict {len(value)}".encode())
        for key, item in value.items():
            state.update(f"key {key!r}".encode())
            _update(state, item)
    elif isinstance(value, (list, tuple)):
        state.update(f"{type(value).__name__} {len(value)}".encode())
        for item in value:
            _update(state, item)
    else:
        state.update(f"{type(value).__name__} {value!r}".encode())
