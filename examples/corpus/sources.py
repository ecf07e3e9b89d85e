"""Which text: what ``--data`` and ``--column`` name."""

from pathlib import Path

from corpus.files import text_source
from corpus.folder import folder_source
from corpus.hub import PREFIX, hub_source
from corpus.library import library_source
from corpus.pieces import Source
from corpus.tables import is_table, table_source
from trainer.errors import UsageError

__all__ = ["open_source"]


def open_source(name: str | None, column: str | None) -> Source:
    """The source that ``--data`` names.

    Args:
        name: ``None`` for the built-in text; ``hf:NAME[:CONFIG][@COMMIT]`` for a data set of the
            Hugging Face hub; or a path: of a folder, of a table (``.csv``, ``.tsv``, ``.parquet``,
            ``.jsonl``, ``.ndjson``), or of any other file, which is one text.
        column: holds the text of a table.

    Raises:
        UsageError: there is no such source.
    """
    label = f"--data {name}"
    if name is not None and name.startswith(PREFIX):
        return hub_source(name[len(PREFIX) :], column, label)
    path = None if name is None else Path(name)
    if path is not None and path.is_dir():
        return folder_source(path, column, label)
    if path is not None and is_table(path):
        return table_source(path, column, label)
    if column is not None:
        what = "the built-in text" if path is None else label
        raise UsageError(f"--column {column} is for tables, and {what} is none: leave it out")
    return library_source() if path is None else text_source(path, label)
