"""The corpus: deterministic, split by file, addressed by step."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UsageError
from corpus import Tokens, validation_windows
from stress.scenarios import load_file, load_standard_library, random_windows


def text_of(tokens: Tokens) -> bytes:
    return bytes(tokens.windows(torch.tensor([0]), len(tokens))[0].tolist())


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    for i in range(60):
        path = root / f"module_{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# module {i}\n")
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


def test_the_library_is_split_by_file(library: Path) -> None:
    corpus = load_standard_library(library)
    train, validation = text_of(corpus.train).decode(), text_of(corpus.validation).decode()
    names = {f"module_{i}.py" for i in range(60)}
    held_out = set(corpus.facts["validation_files"])
    assert held_out < names
    assert held_out
    assert "LEFT OUT" not in train + validation
    for name in names:
        line = f"# module {name[7:-3]}\n"
        assert (line in validation) == (name in held_out)
        assert (line in train) == (name not in held_out)
    assert corpus.facts["train_files"] == 60 - len(held_out)
    assert corpus.facts["train_bytes"] == len(train) == len(corpus.train)
    assert corpus.facts["validation_bytes"] == len(validation) == len(corpus.validation)


def test_a_new_file_moves_no_other(library: Path) -> None:
    before = load_standard_library(library)
    held_out = before.facts["validation_files"]
    (library / "another.py").write_text("# one more\n")
    after = load_standard_library(library)
    assert [n for n in after.facts["validation_files"] if n != "another.py"] == held_out
    assert after.sha256 != before.sha256


def test_the_digest_covers_names_and_bytes(library: Path) -> None:
    first = load_standard_library(library).sha256
    assert load_standard_library(library).sha256 == first
    (library / "module_0.py").write_text("# modulE 0\n")
    second = load_standard_library(library).sha256
    (library / "module_0.py").rename(library / "module_00.py")
    assert len({first, second, load_standard_library(library).sha256}) == 3


def test_a_library_without_source_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--data FILE"):
        load_standard_library(tmp_path)


def test_the_installed_library_is_large_and_plain() -> None:
    corpus = load_standard_library()
    assert len(corpus.train) > 2_000_000
    assert len(corpus.validation) > 50_000
    assert not any(name.startswith("test/") for name in corpus.facts["validation_files"])
    assert not any(str(value).startswith("/") for value in corpus.facts.values())


def test_a_file_keeps_its_last_tenth_for_validation(tmp_path: Path) -> None:
    path = tmp_path / "text.bin"
    content = bytes(range(1, 256)) * 4
    path.write_bytes(content)
    corpus = load_file(path, 32)
    assert text_of(corpus.train) + text_of(corpus.validation) == content
    assert len(corpus.validation) == 102
    assert corpus.facts["source"] == "text.bin"


@pytest.mark.parametrize("length", [8, 33, 256])
def test_the_shortest_accepted_file_gives_a_batch_and_a_window(tmp_path: Path, length: int) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"x" * (10 * (length + 1) - 1))
    with pytest.raises(UsageError, match="longer file or a smaller --size"):
        load_file(path, length)
    path.write_bytes(b"x" * (10 * (length + 1)))
    corpus = load_file(path, length)
    assert validation_windows(corpus.validation, length, 5).shape == (1, length + 1)
    assert random_windows(corpus.train, "s", 0, 2, length + 1).shape == (2, length + 1)


def test_windows_depend_on_stream_and_step_alone() -> None:
    data = Tokens([np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)])

    def at(stream: str, step: int) -> torch.Tensor:
        return random_windows(data, stream, step, 4, 17)

    first = at("train 0", 3)
    torch.manual_seed(99)
    at("train 0", 4)
    assert torch.equal(at("train 0", 3), first)
    assert not torch.equal(at("train 0", 4), first)
    assert not torch.equal(at("train 1", 3), first)


def test_windows_are_of_the_text_and_every_start_is_reached() -> None:
    data = Tokens([np.arange(10, dtype=np.uint8)])
    starts = set()
    for step in range(100):
        windows = random_windows(data, "s", step, 4, 8)
        assert windows.dtype == torch.int64
        assert torch.equal(windows, windows[:, :1] + torch.arange(8))
        starts.update(windows[:, 0].tolist())
    assert starts == {0, 1, 2}  # the last start has its last byte at the last of the text
