"""Token caches: whole or absent, found again by content alone, and never used when damaged."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from corpus_helpers import content, ids, prepare
from small_series import KilledError

from common.errors import UsageError
from corpus import Corpus, prepare_corpus, token_cache
from corpus.tokenizer import ByteTokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(b"".join(b"%05d " % i for i in range(1000)))
    return path


def folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir())


def watched(source: Path, folder: Path, tokenizer: str = "bytes") -> tuple[Corpus, int]:
    """The corpus, and how much was tokenised for it."""
    calls = [0]
    corpus = prepare_corpus(
        str(source),
        tokenizer=tokenizer,
        cache=folder,
        sequence_len=8,
        progress=lambda done, size: calls.append(done),
    )
    return corpus, calls[-1]


def test_a_text_is_tokenised_once(text: Path, tmp_path: Path) -> None:
    for tokenizer in ("bytes", "bpe:280"):
        first, done = watched(text, tmp_path / "cache", tokenizer)
        assert done == text.stat().st_size
        second, done = watched(text, tmp_path / "cache", tokenizer)
        assert done == 0
        assert second.sha256 == first.sha256
        assert second.facts == first.facts
        assert ids(second.train) == ids(first.train)
    assert len(folders(tmp_path / "cache")) == 2


def test_the_manifest_says_what_it_is_and_names_no_path(text: Path, tmp_path: Path) -> None:
    corpus, _ = watched(text, tmp_path / "cache")
    (folder,) = folders(tmp_path / "cache")
    written = (folder / "manifest.json").read_text()
    assert str(tmp_path) not in written
    manifest = json.loads(written)
    assert manifest["format"] == 1
    assert manifest["dtype"] == "|u1"
    assert manifest["sha256"] == corpus.sha256
    assert manifest["splits"]["train"]["tokens"] == len(corpus.train) == 5400
    assert manifest["splits"]["validation"]["bytes"] == 600


def test_another_text_under_the_same_name_is_not_mistaken(text: Path, tmp_path: Path) -> None:
    before, _ = watched(text, tmp_path / "cache")
    stat = text.stat()
    text.write_bytes(text.read_bytes().replace(b"00007", b"70000"))
    os.utime(text, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (text.stat().st_size, text.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    after, done = watched(text, tmp_path / "cache")
    assert done > 0
    assert content(after)["train"].count(b"70000") == 1
    assert after.sha256 != before.sha256


def test_another_column_is_another_text(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("a,b\n" + "".join(f"{i},{-i}\n" for i in range(100)))
    texts = [content(prepare(path, tmp_path / "cache", column))["train"] for column in "ab"]
    assert texts[0] != texts[1]


@pytest.mark.parametrize(("tokenizer", "shard_tokens"), [("bytes", 13), ("bpe:300", 100)])
def test_shards_hold_the_same_tokens_whatever_their_size(
    text: Path, tmp_path: Path, tokenizer: str, shard_tokens: int
) -> None:
    whole = prepare(text, tmp_path / "whole", tokenizer=tokenizer)
    cut = prepare_corpus(
        str(text),
        tokenizer=tokenizer,
        cache=tmp_path / "cut",
        sequence_len=8,
        shard_tokens=shard_tokens,
    )
    assert ids(cut.train) == ids(whole.train)
    assert ids(cut.validation) == ids(whole.validation)
    files = sorted((tmp_path / "cut").rglob("train-*.bin"))
    assert len(files) == -(-len(whole.train) // shard_tokens)
    sizes = [path.stat().st_size for path in files]
    assert len(set(sizes[:-1])) == 1
    assert files[0].stat().st_size == shard_tokens * (1 if cut.vocab_size == 256 else 2)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def flip(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda folder: flip(folder / "train-00000.bin"),
    "a flipped bit in the validation split": lambda folder: flip(folder / "validation-00000.bin"),
    "a shard cut off": lambda folder: os.truncate(folder / "train-00000.bin", 10),
    "a missing shard": lambda folder: (folder / "train-00000.bin").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "an empty manifest": lambda folder: (folder / "manifest.json").write_text(""),
    "another manifest": lambda folder: (folder / "manifest.json").write_text("[]"),
    "a changed number": lambda folder: rewrite(folder, lambda m: m["splits"].pop("validation")),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "a tokenizer cut off": lambda folder: os.truncate(folder / "tokenizer.json", 99),
    "another tokenizer": lambda folder: ByteTokenizer().save(folder / "tokenizer.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_refused_until_it_is_deleted(
    text: Path, tmp_path: Path, damage: str
) -> None:
    before, _ = watched(text, tmp_path / "cache", "bpe:280")
    (folder,) = folders(tmp_path / "cache")
    DAMAGE[damage](folder)
    with pytest.raises(UsageError, match=r"is damaged \(.*\): delete the folder .* and run again"):
        watched(text, tmp_path / "cache", "bpe:280")
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    after, done = watched(text, tmp_path / "cache", "bpe:280")
    assert done > 0
    assert after.sha256 == before.sha256


def test_of_a_large_cache_the_sizes_alone_are_checked(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched(text, tmp_path / "cache")
    (folder,) = folders(tmp_path / "cache")
    flip(folder / "train-00000.bin")
    monkeypatch.setattr(token_cache, "CHECKED_BYTES", 5999)
    watched(text, tmp_path / "cache")
    os.truncate(folder / "train-00000.bin", 5399)
    with pytest.raises(UsageError, match="it has 5399 bytes instead of 5400"):
        watched(text, tmp_path / "cache")


def test_a_stopped_run_leaves_nothing(text: Path, tmp_path: Path) -> None:
    def stop(done: int, size: int | None) -> None:
        assert done == size == 6000
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(str(text), cache=tmp_path / "cache", sequence_len=8, progress=stop)
    assert folders(tmp_path / "cache") == []


def test_training_a_tokenizer_can_be_stopped(text: Path, tmp_path: Path) -> None:
    def stop(done: int, size: int | None) -> None:
        assert done == 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(
            str(text),
            tokenizer="bpe:280",
            cache=tmp_path / "cache",
            sequence_len=8,
            progress=stop,
        )
    assert folders(tmp_path / "cache") == []


def test_a_text_that_changes_meanwhile_is_refused(text: Path, tmp_path: Path) -> None:
    def change(done: int, size: int | None) -> None:
        text.write_bytes(text.read_bytes() + b"more")

    with pytest.raises(UsageError, match="was changed while it was read: run again"):
        prepare_corpus(str(text), cache=tmp_path / "cache", sequence_len=8, progress=change)
    assert folders(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written_names_the_remedy(text: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(
        UsageError, match=r"cannot be written .*: free space or name another folder"
    ):
        watched(text, tmp_path / "cache")


PREPARE = """
import sys, time
from pathlib import Path
from corpus import prepare_corpus
def progress(done, size):
    if done >= int(sys.argv[3]):
        print("half", flush=True)
        time.sleep(1000)
corpus = prepare_corpus(
    sys.argv[1], cache=Path(sys.argv[2]), sequence_len=8, shard_tokens=100_000, progress=progress
)
print(corpus.sha256)
"""


def start(text: Path, folder: Path, stop_at: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, text, folder, str(stop_at)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "examples")},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_killed_run_leaves_no_half_cache(text: Path, tmp_path: Path) -> None:
    text.write_bytes(text.read_bytes() * 700)  # 4.2 MB: several groups and shards
    with start(text, tmp_path / "cache", 2_000_000) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        os.kill(process.pid, signal.SIGKILL)
    (unfinished,) = folders(tmp_path / "cache")
    assert unfinished.name.endswith(".unfinished")
    assert len(list(unfinished.glob("train-*.bin"))) > 10
    again, straight = (
        prepare_corpus(str(text), cache=tmp_path / name, sequence_len=8, shard_tokens=100_000)
        for name in ("cache", "other")
    )
    (whole,) = folders(tmp_path / "cache")
    assert not whole.name.endswith(".unfinished")
    assert again.sha256 == straight.sha256
    assert ids(again.train) == ids(straight.train)


def test_a_cache_is_there_in_one_step(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(unfinished: Path, folder: Path) -> None:
        assert unfinished.is_dir()
        assert not folder.exists()
        raise KilledError

    monkeypatch.setattr(token_cache.os, "replace", replace)
    with pytest.raises(KilledError):
        prepare(text, tmp_path / "cache")
    assert folders(tmp_path / "cache") == []


def test_who_wants_a_cache_that_is_being_built_waits_for_it(text: Path, tmp_path: Path) -> None:
    text.write_bytes(text.read_bytes() * 700)
    found: list[Corpus] = []

    def build() -> None:
        found.append(
            prepare_corpus(
                str(text), cache=tmp_path / "cache", sequence_len=8, shard_tokens=100_000
            )
        )

    waiting = threading.Thread(target=build)
    with start(text, tmp_path / "cache", 2_000_000) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        waiting.start()
        waiting.join(1.0)  # alone it would be done in a tenth of this
        (unfinished,) = folders(tmp_path / "cache")
        os.kill(process.pid, signal.SIGKILL)
    assert unfinished.name.endswith(".unfinished")
    waiting.join(100)
    assert len(found) == 1
    assert len(found[0].train) + len(found[0].validation) == text.stat().st_size
