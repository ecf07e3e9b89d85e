"""A tokenised text on disk: built once, whole or absent, and found again by what it was made of.

A cache is a folder named after the digest of everything that decides its content: the bytes of
the source, the tokenizer, the format. It is written beside its place and renamed, so a kill leaves
a folder that the next run removes and never half a cache. Its files of tokens are written once with
their digests, and checked before they are used.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from common.errors import UsageError, understanding
from common.plain_files import read_json
from corpus.pieces import SPLITS, Piece, Source
from corpus.text_files import fingerprint
from corpus.tokenizer import TokenArray, Tokenizer, TokenizerChoice, load_tokenizer, token_dtype
from corpus.tokens import Tokens

__all__ = ["CHECKED_BYTES", "damaged", "open_cache"]

_FORMAT = 1
_POLL_SECONDS = 0.5
_GROUP_BYTES = 1 << 20  # text handed to the tokenizer at a time
_MANIFEST = "manifest.json"
_TOKENIZER = "tokenizer.json"
CHECKED_BYTES = 10**9  # digests of more than this are not compared on every opening

Opened = tuple[dict[str, Tokens], Tokenizer, dict[str, Any]]


def open_cache(
    source: Source,
    choice: TokenizerChoice,
    cache: Path,
    *,
    shard_tokens: int,
    progress: Callable[[int, int | None], None],
    between: Callable[[], None],
) -> Opened:
    """Tokenise a source unless that has been done before, and map the result into memory.

    Processes that want the same cache at the same time wait for the one that builds it. Sizes of
    the files are always compared, their digests only where all files together have at most 1 GB.

    Args:
        source: the text.
        choice: its tokenizer.
        cache: folder of all caches; created if absent.
        shard_tokens: tokens a file at most.
        progress: called with the bytes of text done and the bytes of all files (``None`` if
            unknown); may raise to stop.
        between: called while digests are compared and others are waited for; may raise to stop.

    Returns:
        Tokens of each split, the tokenizer, and the manifest.

    Raises:
        UsageError: the source cannot be read, or the cache cannot be written or is damaged.
    """
    made_of = {
        "format": _FORMAT,
        "source": source.identity,
        "tokenizer": choice.identity,
        "shard_tokens": shard_tokens,
    }
    key = _digest(made_of)
    folder = cache / key[:32]
    if not folder.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with _alone(cache / f".{folder.name}.lock", between):
                if not folder.exists():
                    _build(source, choice, folder, key, shard_tokens, progress, between)
        except OSError as error:
            raise UsageError(
                f"the token cache {cache} cannot be written ({error.strerror or error}): "
                "free space or name another folder"
            ) from None
    return _open(folder, key, between)


@contextmanager
def _alone(path: Path, between: Callable[[], None]) -> Iterator[None]:
    """Hold a lock that others hold for as long as they read a text: who waits may stop."""
    lock = FileLock(path)
    while not lock.is_locked:
        try:
            lock.acquire(timeout=_POLL_SECONDS)
        except Timeout:
            between()
    try:
        yield
    finally:
        lock.release()


def _build(
    source: Source,
    choice: TokenizerChoice,
    folder: Path,
    key: str,
    shard_tokens: int,
    progress: Callable[[int, int | None], None],
    between: Callable[[], None],
) -> None:
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    if unfinished.exists():  # of a run that was killed: whoever holds the lock is alone here
        shutil.rmtree(unfinished)
    unfinished.mkdir()
    try:
        before = _state(source)
        tokenizer = choice.make(
            replace(source, pieces=partial(_watched, source, progress)), between
        )
        manifest = {
            "format": _FORMAT,
            "key": key,
            "source": source.facts,
            "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256},
            **_write(source, tokenizer, unfinished, shard_tokens, progress),
        }
        if _state(source) != before:
            raise UsageError(f"{source.label} was changed while it was read: run again")
        manifest["sha256"] = _content_digest(manifest)
        tokenizer.save(unfinished / _TOKENIZER)
        with open(unfinished / _MANIFEST, "w", encoding="utf-8") as file:
            file.write(json.dumps(manifest, indent=2, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _watched(source: Source, progress: Callable[[int, int | None], None]) -> Iterator[Piece]:
    """Pieces for training a tokenizer: none is done yet, but it may be stopped."""
    for piece in source.pieces():
        progress(0, source.size)
        yield piece


def _write(
    source: Source,
    tokenizer: Tokenizer,
    folder: Path,
    shard_tokens: int,
    progress: Callable[[int, int | None], None],
) -> dict[str, Any]:
    dtype = token_dtype(tokenizer.vocab_size)
    counts = {split: {"bytes": 0, "documents": 0} for split in SPLITS}
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(ShardWriter(folder, split, dtype, shard_tokens))
            for split in SPLITS
        }
        for group in _groups(source.pieces()):
            for piece, tokens in zip(group, _encoded(group, tokenizer, source), strict=True):
                count, writer = counts[piece.split], writers[piece.split]
                count["bytes"] += len(piece.content)
                count["documents"] += piece.begins
                if piece.begins and tokenizer.separator is not None:
                    writer.append(np.array([tokenizer.separator], dtype=dtype))
                writer.append(tokens)
            progress(sum(count["bytes"] for count in counts.values()), source.size)
        splits = {
            split: {"shards": writer.finish(), "tokens": writer.tokens, **counts[split]}
            for split, writer in writers.items()
        }
    return {"dtype": dtype.str, "splits": splits}


def _encoded(group: list[Piece], tokenizer: Tokenizer, source: Source) -> list[TokenArray]:
    try:
        return tokenizer.encode_all([piece.content for piece in group])
    except ValueError as error:
        raise UsageError(
            f"--tokenizer cannot be used for {source.label}, {error}: use bytes or bpe:N"
        ) from None


def _groups(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    size = 0
    for piece in chain(pieces, (None,)):
        if group and (piece is None or size >= _GROUP_BYTES):
            yield group
            group, size = [], 0
        if piece is not None:
            group.append(piece)
            size += len(piece.content)


def _open(folder: Path, key: str, between: Callable[[], None]) -> Opened:
    path = folder / _MANIFEST
    try:
        manifest = read_json(path, remedy="")
        with understanding(str(path), ""):
            whole = manifest["key"] == key and manifest["sha256"] == _content_digest(manifest)
    except UsageError:
        whole = False
    if not whole:
        raise UsageError(damaged(path, "it is no manifest of this cache"))
    try:
        tokenizer = load_tokenizer(folder / _TOKENIZER)
    except UsageError:
        tokenizer = None
    if tokenizer is None or tokenizer.sha256 != manifest["tokenizer"]["sha256"]:
        raise UsageError(damaged(folder / _TOKENIZER, "it is another tokenizer"))
    dtype = np.dtype(manifest["dtype"])
    count = sum(split["tokens"] for split in manifest["splits"].values())
    check = count * dtype.itemsize <= CHECKED_BYTES
    splits = {
        name: open_shards(folder, split["shards"], dtype, check=check, between=between)
        for name, split in manifest["splits"].items()
    }
    return splits, tokenizer, manifest


def _state(source: Source) -> list[tuple[int, int]]:
    return [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, source.files)]


def _content_digest(manifest: dict[str, Any]) -> str:
    """Digest of the tokens and of what they mean; the source's name is no part of it."""
    return _digest({name: manifest[name] for name in ("tokenizer", "dtype", "splits")})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


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
