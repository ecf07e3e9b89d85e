"""The built-in text: the source of Python's own standard library.

Every installation has it, no download is needed, and its text is ordinary. Tests, installed
packages and machine-made tables are left out.
"""

import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from common.errors import UsageError
from corpus.files import fingerprint, go_on, reading, text_document
from corpus.pieces import SPLITS, Piece, Source, split_of

__all__ = ["library_source"]

_LABEL = "the standard library"
_EXCLUDED_FOLDERS = {
    "__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests",
    "encodings", "pydoc_data",  # generated tables: near copies of one another
}  # fmt: skip
_EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")  # differ from machine to machine


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
