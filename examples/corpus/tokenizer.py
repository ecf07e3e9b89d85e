"""What a tokenizer has to offer, and the one that needs no training: bytes."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["BYTES", "ByteTokenizer", "TokenArray", "Tokenizer", "token_dtype"]

TokenArray = npt.NDArray[Any]  # one-dimensional, of `token_dtype`

BYTES = '{"type": "bytes"}\n'  # the whole file of a byte tokenizer


class Tokenizer(Protocol):
    """Text to tokens and back, without loss: every byte belongs to exactly one token."""

    @property
    def name(self) -> str:
        """For records: ``"bytes"`` or ``"bpe"``."""

    @property
    def vocab_size(self) -> int:
        """V: tokens are 0, ..., V - 1."""

    @property
    def separator(self) -> int | None:
        """Token before every document, or ``None``; no text encodes to it."""

    @property
    def token_bytes(self) -> Tensor:
        """(V,) int64: bytes that each token stands for, 0 for special ones."""

    @property
    def sha256(self) -> str:
        """Digest of all that decides which tokens a text has."""

    def encode(self, text: bytes | str) -> TokenArray:
        """Tokens of a text, without any special ones."""

    def encode_all(self, texts: Sequence[bytes]) -> list[TokenArray]:
        """The same of several texts, on all cores where that helps."""

    def decode(self, tokens: Sequence[int] | TokenArray | Tensor) -> bytes:
        """The bytes that tokens stand for; special ones stand for none."""

    def save(self, path: Path) -> None:
        """Write it to a file that `corpus.choice.load_tokenizer` reads."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest little-endian unsigned type for tokens below ``vocab_size``.

    Example:
        >>> [token_dtype(size).str for size in (256, 257, 65536, 65537)]
        ['|u1', '<u2', '<u2', '<u4']
    """
    for code, limit in (("<u1", 1 << 8), ("<u2", 1 << 16)):
        if vocab_size <= limit:
            return np.dtype(code)
    return np.dtype("<u4")


class ByteTokenizer:
    r"""A token a byte. There is no separator, so that every target is a byte of the text.

    Example:
        >>> ByteTokenizer().encode("né").tolist()
        [110, 195, 169]
        >>> ByteTokenizer().decode([110, 195, 169])
        b'n\xc3\xa9'
    """

    name = "bytes"
    vocab_size = 256
    separator = None
    sha256 = hashlib.sha256(BYTES.encode()).hexdigest()

    @property
    def token_bytes(self) -> Tensor:
        """All ones."""
        return torch.ones(self.vocab_size, dtype=torch.int64)

    def encode(self, text: bytes | str) -> TokenArray:
        """The bytes of a text, UTF-8 if it is a ``str``."""
        content = text.encode() if isinstance(text, str) else text
        return np.frombuffer(bytearray(content), dtype=np.uint8)  # writable, as torch wants it

    def encode_all(self, texts: Sequence[bytes]) -> list[TokenArray]:
        """The bytes of several texts."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Sequence[int] | TokenArray | Tensor) -> bytes:
        """The tokens as bytes."""
        return bytes(np.asarray(tokens).tolist())

    def save(self, path: Path) -> None:
        """Write a file that says that tokens are bytes."""
        path.write_text(BYTES, encoding="utf-8")
