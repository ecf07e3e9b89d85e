"""What the tests of the programs' command lines share, beside the fixtures of conftest.py."""

from collections.abc import Callable
from pathlib import Path

Main = Callable[[list[str]], object]
Refused = Callable[[Main, list[str]], str]  # the fixture `refused`


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Files and folders below one -> what is in them."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }
