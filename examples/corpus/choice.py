"""Which tokenizer: ``bytes``."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpus.pieces import Source
from corpus.tokenizer import BYTES, ByteTokenizer, Tokenizer
from trainer.errors import UsageError

__all__ = ["TokenizerChoice", "choose_tokenizer", "load_tokenizer"]


@dataclass(frozen=True)
class TokenizerChoice:
    """A tokenizer that may not have been made yet.

    Args:
        identity: JSON value that, with the source, decides which tokenizer it is.
        make: makes it, given the source.
    """

    identity: Any
    make: Callable[[Source], Tokenizer]


def choose_tokenizer(name: str) -> TokenizerChoice:
    """The tokenizer that ``--tokenizer`` names.

    Args:
        name: ``"bytes"``.

    Raises:
        UsageError: there is none of this name.
    """
    if name != "bytes":
        raise UsageError(f"--tokenizer {name} is unknown: use bytes")
    return TokenizerChoice("bytes", lambda _: ByteTokenizer())


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer that its ``save`` wrote.

    Args:
        path: the file.

    Raises:
        UsageError: the file is missing or holds no tokenizer.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise UsageError(f"{path} holds no tokenizer") from None
    if content != BYTES:
        raise UsageError(f"{path} holds no tokenizer")
    return ByteTokenizer()
