"""The standard library and single files as bytes: which go where, and that none is lost."""

from pathlib import Path

import pytest
import torch
from corpus_helpers import ids

from common.errors import UsageError
from corpus import Corpus, batch, pieces, prepare_corpus, validation_windows
from corpus.pieces import SPLITS, split_of
from corpus.sources import library_source


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    for i in range(60):
        path = root / f"module_{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# module {i}\n")
    (root / "empty.py").touch()
    for left_out in (
        "test/a.py",
        "json/tests/b.py",
        "site-packages/c.py",
        "encodings/d.py",
        "_sysconfigdata_x.py",
        "config-3/e.py",
        "readme.txt",
    ):
        (root / left_out).parent.mkdir(parents=True, exist_ok=True)
        (root / left_out).write_text("LEFT OUT")
    return root


def texts(library: Path) -> dict[str, bytes]:
    pieces = list(library_source(library).pieces())
    return {s: b"".join(p.content for p in pieces if p.split == s) for s in SPLITS}


def test_the_library_is_split_by_file(library: Path) -> None:
    found = texts(library)
    # Written down, so that a change of the rule shows: it would mix up the splits of old runs.
    assert found["validation"] == b"# module 14\n# module 42\n"
    others = sorted(f"{i}" for i in range(60) if i not in (14, 42))
    assert found["train"].decode() == "".join(f"# module {i}\n" for i in others)


def test_a_new_file_moves_no_other(library: Path) -> None:
    before = texts(library)
    (library / "another.py").write_text("# one more\n")
    after = texts(library)
    assert {s: t.replace(b"# one more\n", b"") for s, t in after.items()} == before
    assert after != before


def test_the_identity_covers_names_and_bytes(library: Path) -> None:
    seen = [library_source(library).identity]
    assert library_source(library).identity == seen[0]
    (library / "module_0.py").write_text("# modulE 0\n")
    seen.append(library_source(library).identity)
    (library / "module_0.py").rename(library / "module_00.py")
    seen.append(library_source(library).identity)
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])


def test_a_library_without_source_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--data FILE"):
        library_source(tmp_path)


@pytest.fixture(scope="module")
def built_in(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return prepare_corpus(None, cache=tmp_path_factory.mktemp("cache"), sequence_len=256)


def test_the_installed_library_is_large_and_plain(built_in: Corpus) -> None:
    assert len(built_in.train) > 2_000_000
    assert len(built_in.validation) > 50_000
    assert built_in.vocab_size == 256
    assert torch.equal(built_in.token_bytes, torch.ones(256, dtype=torch.int64))
    assert not any(str(value).startswith("/") for value in built_in.facts.values())


def test_its_tokens_are_the_bytes_of_its_files(built_in: Corpus) -> None:
    parts: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    source = library_source()
    names = [file["name"] for file in source.identity["files"]]
    assert names == sorted(names)
    for name, path in zip(names, source.files, strict=True):
        parts[split_of(name)].append(path.read_bytes())
    assert bytes(ids(built_in.train)) == b"".join(parts["train"])
    assert bytes(ids(built_in.validation)) == b"".join(parts["validation"])
    facts = built_in.facts
    assert facts["train_documents"] == sum(map(bool, parts["train"]))
    assert facts["train_bytes"] == facts["train_tokens"] == len(built_in.train)
    assert facts["validation_bytes"] == len(built_in.validation)


def test_a_file_keeps_its_last_tenth_for_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_PIECE_BYTES", 100)
    path = tmp_path / "text.bin"
    path.write_bytes(bytes(range(1, 256)) * 4)
    corpus = prepare_corpus(str(path), cache=tmp_path / "cache", sequence_len=32)
    assert bytes(ids(corpus.train) + ids(corpus.validation)) == path.read_bytes()
    assert len(corpus.validation) == 102
    assert corpus.facts["source"] == "text.bin"
    assert corpus.facts["train_documents"] == corpus.facts["validation_documents"] == 1


@pytest.mark.parametrize("length", [8, 33, 256])
def test_the_shortest_accepted_file_gives_a_batch_and_a_window(tmp_path: Path, length: int) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"x" * (10 * (length + 1) - 1))
    with pytest.raises(UsageError, match="longer file or a smaller --sequence-len"):
        prepare_corpus(str(path), cache=tmp_path / "cache", sequence_len=length)
    path.write_bytes(b"x" * (10 * (length + 1)))
    corpus = prepare_corpus(str(path), cache=tmp_path / "cache", sequence_len=length)
    assert validation_windows(corpus.validation, length, 5).shape == (1, length + 1)
    inputs, _ = batch(corpus.train, stream="s", step=0, batch_size=2, sequence_len=length)
    assert inputs.shape == (2, length)
