"""Local files: read without surprises, told apart by what they contain."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UsageError
from common.plain_files import open_file, printable
from corpus.kinds import check_text
from corpus.pieces import Piece, Source, document, read_pieces

__all__ = ["fingerprint", "go_on", "reading", "text_document", "text_source"]

_BLOCK_BYTES = 1 << 20


@contextmanager
def reading(label: str) -> Iterator[None]:
    """Report files that cannot be read in one line.

    Args:
        label: names the source in the message.

    Raises:
        UsageError: the operating system refused to open or read a file.
    """
    try:
        yield
    except FileNotFoundError:
        raise UsageError(f"{label} does not exist: check the path") from None
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())[:200]
        raise UsageError(f"{label} cannot be read ({reason}): name another") from None


def go_on() -> None:
    """Do nothing between two blocks: there is nobody who could ask to stop."""


def fingerprint(name: str, path: Path, between: Callable[[], None] = go_on) -> dict[str, Any]:
    """Name, size and digest of a file's content.

    Args:
        name: to record, such as the path inside of a folder.
        path: where the file lies.
        between: called after every block; may raise to stop.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    digest = hashlib.sha256()
    size = 0
    with open_file(path) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            size += len(block)
            between()
    return {"name": name, "bytes": size, "sha256": digest.hexdigest()}


def text_document(split: str, path: Path, label: str) -> Iterator[Piece]:
    """One of many text files: it belongs to one split as a whole."""
    with reading(label), open_file(path) as file:
        yield from document(split, file)


def text_source(path: Path, label: str, between: Callable[[], None] = go_on) -> Source:
    """One text file, whose last tenth is for validation.

    Args:
        path: any file of text; its bytes are trained on as they are.
        label: names it in error messages.
        between: called after every block that is read to know it by; may raise to stop.

    Raises:
        UsageError: it cannot be read, or is no text.
    """
    with reading(label):
        check_text(path, label)
        identity = fingerprint(path.name, path, between)
    size = identity["bytes"]

    def pieces() -> Iterator[Piece]:
        with reading(label), open_file(path) as file:
            for split, length in (("train", size - size // 10), ("validation", size // 10)):
                begins = True
                for content in read_pieces(file, length):
                    yield Piece(split, begins, content)
                    begins = False

    facts = {"source": printable(path.name), "kind": "text"}
    return Source(label, {"kind": "text", "files": [identity]}, facts, pieces, (path,), size)
