"""Bytes to train on, whole in memory, and windows of them drawn at random.

Which files of the standard library, and which of them are for validation, is what
`corpus.library` says. Tokens, shards and epochs, which the trainer has, would be no use here.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corpus.kinds import check_text
from corpus.library import library_source
from corpus.pieces import split_of
from trainer.errors import UsageError

__all__ = ["Corpus", "batch", "load_file", "load_standard_library", "validation_windows"]


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
        root: folder to read; ``None`` for where the standard library lies.

    Raises:
        UsageError: the folder holds no Python source (some distributions ship only byte code).
    """
    source = library_source(root)
    texts: dict[str, list[tuple[str, bytes]]] = {"train": [], "validation": []}
    for identity, path in zip(source.identity["files"], source.files, strict=True):
        texts[split_of(identity["name"])].append((identity["name"], path.read_bytes()))
    facts = {
        "source": source.facts["source"],
        "train_files": len(texts["train"]),
        "validation_files": [name for name, _ in texts["validation"]],
    }
    return _corpus(texts["train"], texts["validation"], facts)


def load_file(path: Path, sequence_len: int) -> Corpus:
    """Read one file and keep its last tenth for validation.

    Args:
        path: any file of text; its bytes are the tokens.
        sequence_len: bytes a sequence; each split must hold at least one sequence and its target.

    Raises:
        UsageError: the file is missing, unreadable, a folder, no text, empty or too short.
    """
    if path.is_dir():
        raise UsageError(f"--data {path} is a directory: name one text file")
    try:
        check_text(path, f"--data {path}")
        content = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"--data {path} does not exist: check the path") from None
    except OSError as error:
        raise UsageError(f"--data {path} cannot be read ({error.strerror}): name another") from None
    needed = 10 * (sequence_len + 1)
    if len(content) < needed:
        what = "is empty" if not content else f"has {len(content)} bytes"
        raise UsageError(
            f"--data {path} {what}, but sequences of {sequence_len} need at least {needed}: "
            "give a longer file or a smaller --size"
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
