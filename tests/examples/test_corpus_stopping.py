"""Reading a text can be stopped between blocks, and what has no end is not begun with."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from filelock import FileLock

from common.errors import RunInterruptedError, UsageError
from common.program import StopRequest
from corpus import prepare_corpus, text_files, token_cache, tokenizer
from corpus.pieces import Piece, Source
from corpus.sources import open_source

TEXT = b"some words and more of them\n" * 400


def table(path: Path) -> None:
    path.write_bytes(b'{"text": "some words and more of them"}\n' * 400)


def folder(path: Path) -> None:
    path.mkdir()
    for index in range(30):
        (path / f"{index}.txt").write_bytes(TEXT)


SOURCES: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "text.txt": (lambda path: path.write_bytes(TEXT), None),
    "rows.jsonl": (table, "text"),
    "folder": (folder, None),
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_first_signal_stops_while_a_text_is_hashed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, column = SOURCES[name]
    make(tmp_path / name)
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", 1 << 10)
    blocks = 0
    with StopRequest() as stop:

        def between() -> None:
            nonlocal blocks
            blocks += 1
            if blocks == 2:
                signal.raise_signal(signal.SIGINT)
            stop.check()

        with pytest.raises(RunInterruptedError):
            prepare_corpus(
                str(tmp_path / name),
                column=column,
                cache=tmp_path / "cache",
                sequence_len=16,
                between=between,
            )
    assert blocks == 2
    assert not (tmp_path / "cache").exists()


def test_who_waits_for_a_cache_of_another_may_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "_POLL_SECONDS", 0.01)
    (tmp_path / "text.txt").write_bytes(TEXT)

    calls = 0

    def stopping() -> None:
        nonlocal calls
        calls += 1
        if calls > 1:  # the first is of the one block that the text has
            raise RunInterruptedError(2)

    def prepare(between: Callable[[], None]) -> None:
        source = str(tmp_path / "text.txt")
        prepare_corpus(source, cache=tmp_path / "cache", sequence_len=16, between=between)

    prepare(lambda: None)
    (built,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    built.rename(tmp_path / "gone")
    with FileLock(tmp_path / "cache" / f".{built.name}.lock"), pytest.raises(RunInterruptedError):
        prepare(stopping)
    assert not built.exists()


@pytest.mark.parametrize("name", ["data", "data.jsonl", "data.csv", "data.parquet"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_regular_file_is_refused(kind: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(UsageError, match=rf"--data .* cannot be read \(it is a {kind}, not a file"):
        open_source(str(path), "text" if path.suffix else None)


def test_a_pipe_in_a_folder_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT)
    os.mkfifo(tmp_path / "b.txt")
    assert open_source(str(tmp_path), None).facts["files_left_out"] == 1


def test_names_that_are_no_utf_8(tmp_path: Path) -> None:
    root = tmp_path / os.fsdecode(b"books\xff")
    root.mkdir()
    for index in range(3):
        (root / os.fsdecode(b"\xfe%d.txt" % index)).write_bytes(TEXT)
    corpus = prepare_corpus(str(root), cache=tmp_path / "cache", sequence_len=16)
    assert len(corpus.train) + len(corpus.validation) == 3 * len(TEXT)
    assert corpus.facts["source"] == r"books\xff"
    again = prepare_corpus(str(root), cache=tmp_path / "cache", sequence_len=16)
    assert again.sha256 == corpus.sha256
    file = tmp_path / os.fsdecode(b"\xfe.txt")
    file.write_bytes(TEXT)
    assert open_source(str(file), None).facts["source"] == r"\xfe.txt"


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b", "x" * 300])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(UsageError, match=r"--data .* cannot be read"):
        open_source(name, None)


def test_tokenizers_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/tokenizer.json").symlink_to("/dev/zero")
    (tmp_path / "text.txt").write_bytes(TEXT)
    for name in ("tokenizer.json", ".", "folder"):
        with pytest.raises(UsageError, match="cannot be read"):
            prepare_corpus(
                str(tmp_path / "text.txt"),
                tokenizer=str(tmp_path / name),
                cache=tmp_path / "cache",
                sequence_len=16,
            )


def test_training_a_tokenizer_may_be_stopped_after_the_text_was_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokenizer, "_POLL_SECONDS", 0.01)
    read = Event()

    def pieces() -> Iterator[Piece]:
        generator = np.random.default_rng(0)
        for _ in range(200):
            words = generator.integers(97, 123, (1000, 5), dtype=np.uint8)
            yield Piece("train", True, b" ".join(map(bytes, words)))
        read.set()

    def between() -> None:
        if read.is_set():
            raise RunInterruptedError(2)

    with pytest.raises(RunInterruptedError):
        tokenizer.train_bpe(Source("text", {}, {}, pieces), between, vocab_size=4096)


def test_what_goes_wrong_in_the_thread_is_raised(tmp_path: Path) -> None:
    def pieces() -> Iterator[Piece]:
        yield Piece("train", True, b"words")
        raise UsageError("the source is gone")

    with pytest.raises(UsageError, match="the source is gone"):
        tokenizer.train_bpe(Source("text", {}, {}, pieces), vocab_size=4096)
