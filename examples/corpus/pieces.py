"""What a source of text is: a deterministic stream of pieces, each small enough to hold.

A document is one piece or several. A piece ends where tokenizers end a token anyway, so that a
document read in pieces has the tokens of the whole.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["SPLITS", "Piece", "Source", "document", "read_pieces", "split_of", "splits_of"]

SPLITS = ("train", "validation")
_VALIDATION_ONE_IN = 20
_PIECE_BYTES = 1 << 18
_WHITESPACE = b" \t\n\r\v\f"


@dataclass(frozen=True)
class Piece:
    """A part of a document.

    Args:
        split: ``"train"`` or ``"validation"``.
        begins: whether it is the first of its document.
        content: at least one byte.
    """

    split: str
    begins: bool
    content: bytes


@dataclass(frozen=True)
class Source:
    """Text to tokenise.

    Args:
        label: names it in error messages, with the option that chose it.
        identity: JSON values that change whenever a byte of the text or its order does.
        facts: what to record about it (JSON values; no path of this machine).
        pieces: starts a new pass; every pass is the same.
        files: what is read; they may not change meanwhile.
        size: bytes of ``files``; ``None`` where they are not known beforehand.
    """

    label: str
    identity: dict[str, Any]
    facts: dict[str, Any]
    pieces: Callable[[], Iterator[Piece]]
    files: tuple[Path, ...] = ()
    size: int | None = None


def split_of(document_id: str) -> str:
    """The split of one of many documents: by its name alone, so a new one moves no other.

    Args:
        document_id: file name or row number.

    Example:
        >>> [row for row in range(60) if split_of(f"{row}") == "validation"]
        [0, 9, 10, 33, 40, 44, 59]
    """
    return SPLITS[_hash(document_id) % _VALIDATION_ONE_IN == 0]


def splits_of(document_ids: Iterable[str]) -> dict[str, str]:
    """The splits of documents all of whose names are known.

    Args:
        document_ids: if `split_of` puts none of them, two at least, in the validation split, the
            one with the smallest hash goes there: a folder of some books can be used as well.

    Example:
        >>> splits_of(["a", "b", "c"])
        {'a': 'train', 'b': 'train', 'c': 'validation'}
    """
    splits = {document_id: split_of(document_id) for document_id in document_ids}
    if "validation" not in splits.values() and len(splits) > 1:
        splits[min(splits, key=_hash)] = "validation"
    return splits


def _hash(document_id: str) -> int:
    content = document_id.encode("utf-8", "surrogateescape")  # a file's name may be no UTF-8
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")


def document(split: str, content: bytes | BinaryIO) -> Iterator[Piece]:
    """The pieces of one document; none if it is empty."""
    stream = io.BytesIO(content) if isinstance(content, bytes) else content
    begins = True
    for part in read_pieces(stream):
        yield Piece(split, begins, part)
        begins = False


def read_pieces(stream: BinaryIO, length: int | None = None) -> Iterator[bytes]:
    """Read a stream in pieces that end before a space, or at least between two characters.

    Args:
        stream: read from where it stands.
        length: bytes to read; ``None`` reads to the end.
    """
    rest = b""
    while True:
        wanted = _PIECE_BYTES if length is None else min(_PIECE_BYTES, length)
        block = stream.read(wanted) if wanted else b""
        if not block:
            break
        length = None if length is None else length - len(block)
        rest += block
        if len(rest) > _PIECE_BYTES:
            cut = _cut(rest)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _cut(content: bytes) -> int:
    # No pre-tokenizer in use joins a word with the space behind it, but several join a space with
    # the word or the spaces behind it.
    middle = len(content) // 2
    space = content.rfind(b" ", middle)
    while space > 0 and content[space - 1] in _WHITESPACE:
        space = content.rfind(b" ", middle, space)
    if space > 0:
        return space
    end = len(content) - 1
    while end > len(content) - 4 and content[end] & 0xC0 == 0x80:  # inside of a character
        end -= 1
    return end
