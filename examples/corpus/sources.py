"""Which text: what ``--data`` and ``--column`` name.

A text file; a table; a folder, every text file and every row of every table below which is a
document; a data set of the Hugging Face hub, streamed by the ``datasets`` library if installed;
and, where none is named, the source of Python's own standard library, which every installation has.
"""

import importlib
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.errors import UsageError
from common.plain_files import open_file, printable
from corpus.pieces import SPLITS, Piece, Source, document, read_pieces, split_of, splits_of
from corpus.table_files import (
    TABLES,
    check_column,
    check_listed,
    is_table,
    table_rows,
    table_source,
    texts,
)
from corpus.text_files import (
    PACKED,
    check_text,
    fingerprint,
    go_on,
    kind_of,
    reading,
    text_document,
)

__all__ = ["TEXTS", "library_source", "open_source", "text_source"]

TEXTS = (
    ".txt", ".text", ".md", ".rst", ".tex", ".html",
    ".py", ".c", ".h", ".cc", ".cpp", ".go", ".java", ".js", ".rs", ".ts",
)  # fmt: skip
_LABEL = "the standard library"
_EXCLUDED_FOLDERS = {
    "__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests",
    "encodings", "pydoc_data",  # generated tables: near copies of one another
}  # fmt: skip
_EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")  # differ from machine to machine
PREFIX = "hf:"
_COLUMN = "text"  # of openwebtext, fineweb-edu and most others
_REMEDY = "check the name and the network, or download it and name the files"


def open_source(
    name: str | None, column: str | None, between: Callable[[], None] = go_on
) -> Source:
    """The source that ``--data`` names.

    Args:
        name: ``None`` for the built-in text; ``hf:NAME[:CONFIG][@COMMIT]`` for a data set of the
            Hugging Face hub; or a path: of a folder, of a table (``.csv``, ``.tsv``, ``.parquet``,
            ``.jsonl``, ``.ndjson``), or of any other file, which is one text.
        column: holds the text of a table.
        between: called after every block that is read to know it by; may raise to stop.

    Raises:
        UsageError: there is no such source.
    """
    label = f"--data {name}"
    if name is not None and name.startswith(PREFIX):
        return hub_source(name[len(PREFIX) :], column, label)
    path = None if name is None else Path(name)
    with reading(label):
        is_folder = path is not None and path.is_dir()
    if path is not None and is_folder:
        return folder_source(path, column, label, between)
    if path is not None and is_table(path):
        return table_source(path, column, label, between)
    if column is not None:
        what = "the built-in text" if path is None else label
        raise UsageError(f"--column {column} is for tables, and {what} is none: leave it out")
    if path is None:
        return library_source(between=between)
    return text_source(path, label, between)


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


def folder_source(
    root: Path, column: str | None, label: str, between: Callable[[], None] = go_on
) -> Source:
    """All supported files below a folder, by path, but for hidden and empty ones and dead links.

    Args:
        root: the folder.
        column: of its tables, if there are any.
        label: names it in error messages.
        between: called after every block that is read to know it by; may raise to stop.

    Raises:
        UsageError: there is no supported file, one cannot be read, is packed or no text, or a
            table has no such column.
    """
    with reading(label):
        chosen, others = _files(root, between)
        _check_texts(chosen, others, label, between)
        if not chosen:
            supported = ", ".join((*TEXTS, *TABLES))
            raise UsageError(f"{label} is a folder without text, which is: {supported}")
        identities = [fingerprint(name, path, between) for name, path in chosen.items()]
    tables = {name for name, path in chosen.items() if is_table(path)}
    labels = {name: f"{label.rstrip('/')}/{name}" for name in chosen}
    if column is not None and not tables:
        raise UsageError(f"--column {column} is for tables, and {label} has none: leave it out")
    for name in sorted(tables):
        check_column(chosen[name], column, labels[name])

    # Rows are many, and are not known before they are read.
    splits = {name: split_of(name) for name in chosen} if tables else splits_of(chosen)

    def pieces() -> Iterator[Piece]:
        for name, path in chosen.items():
            if name not in tables:
                yield from text_document(splits[name], path, labels[name])
                continue
            assert column is not None
            for row, content in table_rows(path, column, labels[name]):
                yield from document(split_of(f"{name}:{row}"), content)

    return Source(
        label=label,
        identity={"kind": "folder", "column": column, "files": identities},
        facts={
            "source": printable(root.resolve().name),
            "kind": "folder",
            "column": column,
            "files": len(chosen),
            "files_left_out": len(others),
        },
        pieces=pieces,
        files=tuple(chosen.values()),
        size=sum(identity["bytes"] for identity in identities),
    )


def _check_texts(
    chosen: dict[str, Path], others: list[str], label: str, between: Callable[[], None]
) -> None:
    """Refuse a folder some of whose files are meant to be text and are not."""
    found = [
        (name, "packed", "unpack it or take it away")
        for name in others
        if name.lower().endswith(PACKED) and _is_supported(Path(name).with_suffix(""))
    ]
    for name, path in chosen.items():
        between()
        kind = None if path.suffix.lower() == ".parquet" else kind_of(path)
        if kind is not None:
            found.append((name, *kind))
    if found:
        name, what, remedy = found[0]
        more = f" ({len(found)} such files)" if len(found) > 1 else ""
        raise UsageError(f"{label.rstrip('/')}/{name} is {what}, not text{more}: {remedy}")


def _is_supported(path: Path) -> bool:
    return path.suffix.lower() in TEXTS or is_table(path)


def _files(root: Path, between: Callable[[], None]) -> tuple[dict[str, Path], list[str]]:
    """Supported files by their relative path, sorted, and the paths of all others."""

    def refuse(error: OSError) -> None:
        raise error  # os.walk would pass over a folder that it may not enter

    found: dict[str, Path] = {}
    others: list[str] = []
    for parent, folders, files in os.walk(root, onerror=refuse):
        between()
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in files:
            path = Path(parent, file)
            name = path.relative_to(root).as_posix()
            if (
                _is_supported(path)
                and not file.startswith(".")
                and path.is_file()
                and path.stat().st_size > 0
            ):
                found[name] = path
            else:
                others.append(name)
    return dict(sorted(found.items())), sorted(others)


def library_source(root: Path | None = None, between: Callable[[], None] = go_on) -> Source:
    """The Python files of the standard library, each a document.

    Args:
        root: folder to read; ``None`` asks ``sysconfig`` where the standard library lies.
        between: called after every block that is read to know it by; may raise to stop.

    Raises:
        UsageError: the folder holds no Python source (some distributions ship only byte code).
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    chosen: dict[str, Path] = {}
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        parts = name.split("/")
        if _EXCLUDED_FOLDERS.intersection(parts[:-1]) or parts[0].startswith(_EXCLUDED_PREFIXES):
            continue
        chosen[name] = path
    if {split_of(name) for name in chosen} != set(SPLITS):
        raise UsageError(
            "the standard library of this Python has no source files to train on: "
            "name a text file with --data FILE"
        )
    with reading(_LABEL):
        identities = [fingerprint(name, path, between) for name, path in chosen.items()]

    def pieces() -> Iterator[Piece]:
        for name, path in chosen.items():
            yield from text_document(split_of(name), path, _LABEL)

    return Source(
        label=_LABEL,
        identity={"kind": "folder", "files": identities},
        facts={"source": "the Python standard library", "kind": "folder"},
        pieces=pieces,
        files=tuple(chosen.values()),
        size=sum(identity["bytes"] for identity in identities),
    )


def hub_source(name: str, column: str | None, label: str) -> Source:
    """The training split of a data set, each row of which is a document.

    Args:
        name: ``NAME[:CONFIG][@COMMIT]``, such as ``HuggingFaceFW/fineweb-edu:sample-10BT``. The
            tokens are kept by the commit: with it (40 hexadecimal digits), those on disk are
            found without a network.
        column: holds the text; ``None`` for ``text``.
        label: names it in error messages.

    Raises:
        UsageError: ``datasets`` is not installed, or the hub has no such data set, or none can be
            reached.
    """
    path, _, commit = name.partition("@")
    repository, _, config = path.partition(":")
    column = _COLUMN if column is None else column
    if not repository:
        raise UsageError(
            f"{label} names no data set: use hf:HuggingFaceFW/fineweb-edu:sample-10BT, for example"
        )
    if commit and not re.fullmatch("[0-9a-f]{40}", commit):
        raise UsageError(f"{label} has an incomplete commit: give all of its 40 digits, or none")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise UsageError(
            f"{label} needs the datasets library: run pip install datasets, or name a local file"
        ) from None
    if not commit:
        commit = _newest_commit(repository, label)

    def pieces() -> Iterator[Piece]:
        values = _values(datasets, repository, config or None, commit, column, label)
        for row, content in texts(values, column, label):
            yield from document(split_of(f"{row}"), content)

    identity = {"kind": "hub", "name": repository, "config": config, "commit": commit}
    return Source(label, {**identity, "column": column}, _facts(name, column, commit), pieces)


def _facts(name: str, column: str, commit: str) -> dict[str, Any]:
    return {"source": f"{PREFIX}{name}", "kind": "hub", "column": column, "commit": commit}


def _newest_commit(repository: str, label: str) -> str:
    hub = importlib.import_module("huggingface_hub")  # the tokenizers library requires it
    try:
        return str(hub.HfApi().dataset_info(repository).sha)
    except Exception as error:  # of the network, of the hub's answer, or of the name's form
        raise UsageError(f"{label} was not found ({type(error).__name__}): {_REMEDY}") from None


def _values(
    datasets: Any, repository: str, config: str | None, commit: str, column: str, label: str
) -> Iterator[Any]:
    try:
        rows = datasets.load_dataset(
            repository, config, split="train", streaming=True, revision=commit
        )
        for values in rows:
            check_listed(column, values, label)
            yield values[column]
    except UsageError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{label} cannot be read ({type(error).__name__}: {reason}): {_REMEDY}"
        ) from None
