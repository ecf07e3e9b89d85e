"""A folder: every text file and every row of every table below it is a document."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from common.errors import UsageError
from common.plain_files import printable
from corpus.files import fingerprint, go_on, reading, text_document
from corpus.kinds import PACKED, kind_of
from corpus.pieces import Piece, Source, document, split_of, splits_of
from corpus.tables import TABLES, check_column, is_table, table_rows

__all__ = ["TEXTS", "folder_source"]

TEXTS = (
    ".txt", ".text", ".md", ".rst", ".tex", ".html",
    ".py", ".c", ".h", ".cc", ".cpp", ".go", ".java", ".js", ".rs", ".ts",
)  # fmt: skip


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
