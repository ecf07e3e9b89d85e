"""Data sets of the Hugging Face hub by name, streamed by the ``datasets`` library if installed."""

import importlib
import re
from collections.abc import Iterator
from typing import Any

from common.errors import UsageError
from corpus.pieces import Piece, Source, document, split_of
from corpus.tables import check_listed, texts

__all__ = ["PREFIX", "hub_source"]

PREFIX = "hf:"
_COLUMN = "text"  # of openwebtext, fineweb-edu and most others
_REMEDY = "check the name and the network, or download it and name the files"


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
