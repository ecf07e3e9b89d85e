"""Bytes to train on: where they come from, how they are split, and which ones a step sees.

The default corpus is the source of Python's own standard library: every installation has it, no
download is needed, and its text is ordinary. Tests, installed packages and machine-made tables
are left out. A file belongs to the validation split by the hash of its name alone, so no file is
on both sides and adding a file moves no other.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.errors import UsageError

__all__ = ["Corpus", "batch", "load_file", "load_standard_library", "validation_windows"]

_VALIDATION_ONE_IN = 20
_EXCLUDED_FOLDERS = {
    "__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests",
    "encodings", "pydoc_data",  # generated tables: near copies of one another
}  # fmt: skip
_EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")  # differ from machine to machine


@dataclass(frozen=True)
class Corpus:
    """A training and a validation text.

    Args:
        train: (N,) uint8.
        validation: (M,) uint8.
        sha256: digest of the file names and bytes of both splits.
        facts: what to record about the source (JSON values; no path of this machine).
    """

    train: Tensor
    validation: Tensor
    sha256: str
    facts: dict[str, Any]


def load_standard_library(root: Path | None = None) -> Corpus:
    """Read the Python files of the standard library.

    Args:
        root: folder to read; ``None`` asks ``sysconfig`` where the standard library lies.

    Raises:
        UsageError: the folder holds no Python source (some distributions ship only byte code).
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    train: list[tuple[str, bytes]] = []
    validation: list[tuple[str, bytes]] = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        parts = name.split("/")
        if _EXCLUDED_FOLDERS.intersection(parts[:-1]) or parts[0].startswith(_EXCLUDED_PREFIXES):
            continue
        bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        split = validation if bucket % _VALIDATION_ONE_IN == 0 else train
        split.append((name, path.read_bytes()))
    if not train or not validation:
        raise UsageError(
            "the standard library of this Python has no source files to train on: "
            "name a text file with --data FILE"
        )
    facts = {
        "source": "the Python standard library",
        "train_files": len(train),
        "validation_files": [name for name, _ in validation],
    }
    return _corpus(train, validation, facts)


def load_file(path: Path, sequence_len: int) -> Corpus:
    """Read one file and keep its last tenth for validation.

    Args:
        path: any file; its bytes are the tokens.
        sequence_len: bytes a sequence; each split must hold at least one sequence and its target.

    Raises:
        UsageError: the file is missing, unreadable, a folder, empty or too short.
    """
    if path.is_dir():
        raise UsageError(f"--data {path} is a directory: name one text file")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"--data {path} does not exist: check the path") from None
    except OSError as error:
        raise UsageError(f"--data {path} cannot be read ({error.strerror}): name another") from None
    needed = 10 * (sequence_len + 1)
    if len(content) < needed:
        what = "is empty" if not content else f"has {len(content)} bytes"
        raise UsageError(
            f"--data {path} {what}, but --sequence-len {sequence_len} needs at least {needed}: "
            "give a longer file or a smaller --sequence-len"
        )
    cut = len(content) - len(content) // 10
    facts = {"source": path.name, "train_files": 1, "validation_files": [path.name]}
    return _corpus([("train", content[:cut])], [("validation", content[cut:])], facts)


def _corpus(
    train: list[tuple[str, bytes]], validation: list[tuple[str, bytes]], facts: dict[str, Any]
) -> Corpus:
    digest = hashlib.sha256()
    for label, split in (("train", train), ("validation", validation)):
        for name, content in split:
            # Lengths are hashed too, so that no two different corpora share one byte stream.
            digest.update(f"{label} {name} {len(content)}\n".encode())
            digest.update(content)
    texts = [b"".join(content for _, content in split) for split in (train, validation)]
    facts = {**facts, "train_bytes": len(texts[0]), "validation_bytes": len(texts[1])}
    tensors = [torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in texts]
    return Corpus(tensors[0], tensors[1], digest.hexdigest(), facts)


def batch(
    data: Tensor, *, stream: str, step: int, batch_size: int, sequence_len: int
) -> tuple[Tensor, Tensor]:
    """The batch of one step: a pure function of the stream and the step, so a cursor is one number.

    Args:
        data: (N,) uint8.
        stream: names the sequence of batches, such as ``"train 0"`` for seed 0.
        step: index in that sequence.
        batch_size: B.
        sequence_len: T.

    Returns:
        Inputs and targets, each (B, T) int64; the targets are the inputs moved on by one byte.
    """
    digest = hashlib.sha256(f"{stream} {step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    starts = torch.randint(0, data.numel() - sequence_len, (batch_size,), generator=generator)
    windows = data[starts[:, None] + torch.arange(sequence_len + 1)].long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def validation_windows(data: Tensor, sequence_len: int, most: int) -> Tensor:
    """Evenly spread windows that do not share a target byte.

    Args:
        data: (M,) uint8.
        sequence_len: T.
        most: how many windows at most.

    Returns:
        (n, T + 1) int64 with n = min(most, (M - 1) // T).
    """
    available = (data.numel() - 1) // sequence_len
    count = min(most, available)
    chosen = torch.arange(count) * available // count
    return data[chosen[:, None] * sequence_len + torch.arange(sequence_len + 1)].long()
