"""Local files of text: what one holds, by its content, and reading it without surprises.

Names may lie, and packed bytes train like any others. Files are told apart by what they contain.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UsageError
from common.plain_files import open_file
from corpus.pieces import Piece, document

__all__ = ["PACKED", "check_text", "fingerprint", "go_on", "kind_of", "reading", "text_document"]

PACKED = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".lz4", ".br", ".z", ".zip", ".7z", ".rar", ".tar")
_LOOKED_AT = 1 << 16  # bytes at the beginning, in the middle and at the end
_NUL_ONE_IN = 1000  # bytes of packed data hold one in 256, code and UTF-16 far more; text none
_UNPACK = "unpack it"
_EXPORT = "export its text"
_RENAME = "give it its ending and name its text with --column"
_CONVERT = "convert it to UTF-8, as with iconv"
# Where, what stands there, what that is, and what to do. The longer of two beginnings comes first.
_KINDS = (
    (0, b"\x1f\x8b", "packed with gzip", _UNPACK),
    (0, b"\x1f\x9d", "packed with compress", _UNPACK),
    (0, b"(\xb5/\xfd", "packed with zstd", _UNPACK),
    (0, b"\xfd7zXZ\0", "packed with xz", _UNPACK),
    (0, b"]\0\0", "packed with lzma", _UNPACK),
    (4, b"1AY&SY", "packed with bzip2", _UNPACK),
    (4, b"\x17rE8P\x90", "packed with bzip2", _UNPACK),  # of nothing
    (0, b'\x04"M\x18', "packed with lz4", _UNPACK),
    (0, b"PK\x03\x04", "a zip archive or an office document", "unpack it or export its text"),
    (0, b"PK\x05\x06", "an empty zip archive", _UNPACK),
    (0, b"7z\xbc\xaf'\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"%PDF-", "a PDF document", _EXPORT),
    (0, b"{\\rtf", "an RTF document", _EXPORT),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an office document", _EXPORT),
    (0, b"PAR1", "a parquet table", _RENAME),
    (0, b"ARROW1", "an Arrow table", "convert it to parquet"),
    (0, b"\xff\xfe\0\0", "UTF-32", _CONVERT),
    (0, b"\0\0\xfe\xff", "UTF-32", _CONVERT),
    (0, b"\xff\xfe", "UTF-16", _CONVERT),
    (0, b"\xfe\xff", "UTF-16", _CONVERT),
)
_BLOCK_BYTES = 1 << 20


def check_text(path: Path, label: str) -> None:
    """Refuse a file whose bytes are no text in UTF-8 or another encoding that extends ASCII.

    Args:
        path: of the file.
        label: names it in error messages.

    Raises:
        OSError: it cannot be read.
        UsageError: it is packed, a document or table in a format of its own, UTF-16, or binary.
    """
    found = kind_of(path)
    if found is not None:
        what, remedy = found
        raise UsageError(f"{label} is {what}, not text: {remedy}")


def kind_of(path: Path) -> tuple[str, str] | None:
    """What a file that is no text is, and what to do; ``None`` for text.

    Args:
        path: of the file.

    Raises:
        OSError: it cannot be read.
    """
    with open_file(path) as file:
        head = file.read(_LOOKED_AT)
        for place, mark, what, remedy in _KINDS:
            if head.startswith(mark, place):
                return what, remedy
        size = file.seek(0, 2)
        for place in (0, size // 2, size - _LOOKED_AT):
            file.seek(max(0, place))
            block = file.read(_LOOKED_AT)
            if block.count(0) * _NUL_ONE_IN > len(block):
                return "binary or UTF-16 (it holds NUL bytes)", "name a text in UTF-8"
    return None


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
