"""Token files: written once with their digests, and checked before they are used."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common.errors import UsageError
from corpus.files import fingerprint
from corpus.tokenizer import TokenArray
from corpus.tokens import Tokens

__all__ = ["CHECKED_BYTES", "ShardWriter", "damaged", "open_shards"]

CHECKED_BYTES = 10**9  # digests of more than this are not compared on every opening


class ShardWriter:
    """Writes the tokens of one split to ``<split>-00000.bin``, ``<split>-00001.bin``, ...

    A context manager: its end closes the file that `finish` did not come to.

    Args:
        folder: exists.
        split: first part of the file names.
        dtype: of the tokens in the files.
        shard_tokens: tokens a file at most.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self.tokens = 0
        self._folder = folder
        self._split = split
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._done: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._room = 0

    def append(self, tokens: TokenArray) -> None:
        """Write tokens behind those already there."""
        self.tokens += tokens.size
        while tokens.size:
            if self._file is None:
                name = f"{self._split}-{len(self._done):05d}.bin"
                self._file = open(self._folder / name, "wb")  # noqa: SIM115 (see `__exit__`)
                self._digest = hashlib.sha256()
                self._room = self._shard_tokens
            part = tokens[: self._room]
            content = part.astype(self._dtype).tobytes()
            self._file.write(content)
            self._digest.update(content)
            self._room -= part.size
            tokens = tokens[part.size :]
            if not self._room:
                self._end()

    def finish(self) -> list[dict[str, Any]]:
        """Finish the last file; return name, number of tokens and digest of each file."""
        self._end()
        return self._done

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def _end(self) -> None:
        if self._file is None:
            return
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
            name = Path(file.name).name
        self._file = None
        self._done.append(
            {
                "file": name,
                "tokens": self._shard_tokens - self._room,
                "sha256": self._digest.hexdigest(),
            }
        )


def open_shards(
    folder: Path,
    shards: Sequence[dict[str, Any]],
    dtype: np.dtype[Any],
    *,
    check: bool,
    between: Callable[[], None],
) -> Tokens:
    """Map the files of one split into memory.

    Args:
        folder: they lie in.
        shards: what `ShardWriter.finish` returned.
        dtype: of the tokens in the files.
        check: compare the digests too, not the sizes alone.
        between: called after every block of them; may raise to stop.

    Raises:
        UsageError: a file is missing or damaged.
    """
    maps = []
    for shard in shards:
        path = folder / shard["file"]
        size = path.stat().st_size if path.is_file() else -1
        expected = shard["tokens"] * dtype.itemsize
        if size < 0:
            raise UsageError(damaged(path, "it is missing"))
        if size != expected:
            raise UsageError(damaged(path, f"it has {size} bytes instead of {expected}"))
        if check and fingerprint(path.name, path, between)["sha256"] != shard["sha256"]:
            raise UsageError(damaged(path, "its checksum does not match"))
        maps.append(np.memmap(path, dtype=dtype, mode="r"))
    return Tokens(maps)


def damaged(path: Path, reason: str) -> str:
    """The message about a file of a token cache, with the remedy."""
    return f"{path} is damaged ({reason}): delete the folder {path.parent} and run again"
