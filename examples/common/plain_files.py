"""Files of text, JSON, YAML and CSV: whatever one holds, what comes of it is a value or one line.

`open_file` raises `OSError` alone and the parsers `ValueError` alone, whatever they are given. The
readers turn both into the program's own errors, see `common.errors.understanding`. A file is
written whole or not at all.
"""

import csv
import errno
import io
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from common.errors import one_line, understanding

__all__ = [
    "open_file", "parse_json", "parse_yaml", "printable", "read_csv", "read_json", "read_text",
    "read_yaml", "write_atomically",
]  # fmt: skip

_DEEPEST = 100  # nested values: what is read is looked through by functions that call themselves
_MOST_BITS = 1023  # of a whole number: larger ones are no floating-point numbers
_MOST_VALUES = 5_000_000  # of a file: YAML can make billions out of a few lines
_MERGE = "tag:yaml.org,2002:merge"
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class _StrictLoader(yaml.SafeLoader):
    """PyYAML takes the last of equal keys without a word; here they are refused, with the line."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:  # others cannot be hashed
                value = self.construct_object(key)
                if value in seen:
                    line = key.start_mark.line + 1
                    raise ValueError(f"{key.value} stands there twice, again in line {line}")
                seen.add(value)
        return node


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} stands there twice")
    return found


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file to read bytes, unless reading it could wait for ever or never end.

    Args:
        path: of a regular file, or a link to one.

    Raises:
        OSError: there is no such file, it is something else (a folder, a pipe, a device), or the
            system does not let it be read.
    """
    try:
        # Not blocking: a pipe would else be waited for before anything can be asked about it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as error:  # a NUL, or what no file system can hold
        raise OSError(errno.EINVAL, f"no file can have this name, {error}") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = next((name for test, name in _KINDS if test(mode)), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a file")
    return open(descriptor, "rb")


def parse_json(text: str | bytes) -> Any:
    """The value that JSON stands for.

    Raises:
        ValueError: it is not JSON, nested too deeply, or has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_no_key_twice)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_yaml(text: str) -> Any:
    """The value that YAML stands for, of plain types.

    Raises:
        ValueError: it is not YAML, has a key twice, or holds what nothing here can use: see
            `_check`.
    """
    try:
        value = yaml.load(text, _StrictLoader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except Exception as error:  # constructors raise nearly anything: !!bool x a KeyError
        raise ValueError(one_line(error)) from None
    _check(value)
    return value


def read_text(path: Path, *, remedy: str, label: str | None = None) -> str:
    """The text of a UTF-8 file.

    Args:
        path: of the file.
        remedy: what the user should do if it cannot be used; ends the error message.
        label: names the file in it; ``None`` for the path.

    Raises:
        DamagedError: it is not UTF-8.
        UsageError: it cannot be read.
    """
    with understanding(label or str(path), remedy, "not UTF-8 text"), open_file(path) as file:
        return file.read().decode()


def read_json(path: Path, *, remedy: str, label: str | None = None) -> Any:
    """The value in a JSON file; arguments and errors of `read_text`."""
    text = read_text(path, remedy=remedy, label=label)
    with understanding(label or str(path), remedy, "not JSON"):
        value = parse_json(text)
        _check(value)
        return value


def read_yaml(path: Path, *, remedy: str, label: str | None = None) -> Any:
    """The value in a YAML file; arguments and errors of `read_text`."""
    text = read_text(path, remedy=remedy, label=label)
    with understanding(label or str(path), remedy, "not YAML"):
        return parse_yaml(text)


def read_csv(path: Path, *, remedy: str, label: str | None = None) -> list[dict[str, str | None]]:
    """The rows of a CSV file by its header, arguments and errors of `read_text`.

    A cell that its row lacks is ``None``.
    """
    text = read_text(path, remedy=remedy, label=label)
    with understanding(label or str(path), remedy, "not CSV"):
        return list(csv.DictReader(io.StringIO(text, newline="")))


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    from ars.atomic import replacing  # not above: it takes torch along, which takes seconds

    with replacing(path) as unfinished:
        unfinished.write_bytes(text.encode())


def printable(name: str) -> str:
    r"""A file's name as text, whatever bytes the system has for it.

    Example:
        >>> printable("n\u00e9"), printable("n\udcff")
        ('né', 'n\\xff')
    """
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _check(content: Any) -> None:
    """Refuse what JSON or YAML can spell, and what is done with their values cannot take.

    Raises:
        ValueError: it is nested too deeply, holds a whole number that is no floating-point number,
            half a character, which nothing can print, or by its aliases too many values.
    """
    count = 0
    waiting = [(content, 0)]
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if depth > _DEEPEST:
            raise ValueError("it is nested too deeply")
        if count > _MOST_VALUES:
            raise ValueError("it holds too many values")
        if isinstance(value, dict):
            waiting += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, (list, tuple, set)):
            waiting += [(part, depth + 1) for part in value]
        elif isinstance(value, str):
            value.encode()
        elif isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise ValueError("it holds a number that is too large")
