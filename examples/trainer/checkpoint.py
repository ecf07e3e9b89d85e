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

from ars.models import GPT, miniseries_config
from ars.replacing import replacing
from trainer.errors import DamagedError, UsageError
from trainer.reading import open_file, understanding

__all__ = ["DamagedError", "load_checkpoint", "model_of", "save_checkpoint", "write_atomically"]

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


def model_of(content: dict[str, Any], label: str, sequence_len: int) -> GPT:
    """The model of the miniseries in a checkpoint.

    Args:
        content: of the checkpoint.
        label: names it in error messages.
        sequence_len: longest input that the model will read.

    Raises:
        UsageError: it holds no model, another kind of model, or one that diverged.
    """
    remedy = "name a file of a run's checkpoints"
    weights = content.get("model")
    if not isinstance(weights, dict) or not isinstance(weights.get("wte.weight"), Tensor):
        raise UsageError(f"{label} holds no model: {remedy}")
    with understanding(label, remedy, "another kind of model than the miniseries'"):
        depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        vocab_size = weights["wte.weight"].shape[0]
        shape = miniseries_config(depth, vocab_size=vocab_size, sequence_len=sequence_len)
        with torch.device("meta"):  # shapes first: a wrong one may be larger than the memory
            expected = GPT(shape).state_dict()
        for name, value in expected.items():
            found = weights[name]
            if found.shape != value.shape or found.dtype != value.dtype:
                raise ValueError(f"{name} is {found.dtype} of {tuple(found.shape)}")
        model = GPT(shape)
        model.load_state_dict(weights)
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise UsageError(
            f"{label} holds a model that diverged, whose weights are no longer numbers: {remedy}"
        )
    return model


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    with replacing(path) as unfinished:
        unfinished.write_bytes(text.encode())


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
