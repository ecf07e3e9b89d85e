"""Which text: what ``--data`` and ``--column`` name."""

from collections.abc import Callable
from pathlib import Path

from common.errors import UsageError
from corpus.files import go_on, reading, text_source
from corpus.folder import folder_source
from corpus.hub import PREFIX, hub_source
from corpus.library import library_source
from corpus.pieces import Source
from corpus.tables import is_table, table_source

__all__ = ["open_source"]


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
