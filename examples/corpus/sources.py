"""Which text: what ``--data`` and ``--column`` name."""

from pathlib import Path

from corpus.files import text_source
from corpus.library import library_source
from corpus.pieces import Source
from trainer.errors import UsageError

__all__ = ["open_source"]


def open_source(name: str | None, column: str | None) -> Source:
    """The source that ``--data`` names.

    Args:
        name: path of a file; ``None`` for the built-in text.
        column: of a table.

    Raises:
        UsageError: there is no such source.
    """
    if name is None:
        return library_source()
    path = Path(name)
    if path.is_dir():
        raise UsageError(f"--data {name} is a directory: name one text file")
    return text_source(path, f"--data {name}")
