"""The corpus: deterministic, split by file, addressed by step."""

from pathlib import Path

import pytest
import torch

from stress.text import batch, load_file, load_standard_library, validation_windows
from trainer.errors import UsageError


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
    train = bytes(corpus.train.tolist()).decode()
    validation = bytes(corpus.validation.tolist()).decode()
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
    assert corpus.facts["train_bytes"] == len(train) == corpus.train.numel()
    assert corpus.facts["validation_bytes"] == len(validation) == corpus.validation.numel()


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
    assert corpus.train.numel() > 2_000_000
    assert corpus.validation.numel() > 50_000
    assert not any(name.startswith("test/") for name in corpus.facts["validation_files"])
    assert not any(str(value).startswith("/") for value in corpus.facts.values())


def test_a_file_keeps_its_last_tenth_for_validation(tmp_path: Path) -> None:
    path = tmp_path / "text.bin"
    content = bytes(range(1, 256)) * 4
    path.write_bytes(content)
    corpus = load_file(path, 32)
    assert bytes(corpus.train.tolist()) + bytes(corpus.validation.tolist()) == content
    assert corpus.validation.numel() == 102
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
    inputs, _ = batch(corpus.train, stream="s", step=0, batch_size=2, sequence_len=length)
    assert inputs.shape == (2, length)


def test_a_batch_depends_on_stream_and_step_alone() -> None:
    data = torch.randint(0, 256, (5000,), dtype=torch.uint8)

    def at(stream: str, step: int) -> torch.Tensor:
        return batch(data, stream=stream, step=step, batch_size=4, sequence_len=16)[0]

    first = at("train 0", 3)
    torch.manual_seed(99)
    at("train 0", 4)
    assert torch.equal(at("train 0", 3), first)
    assert not torch.equal(at("train 0", 4), first)
    assert not torch.equal(at("train 1", 3), first)


def test_targets_are_the_next_bytes_and_every_start_is_reached() -> None:
    data = torch.arange(10, dtype=torch.uint8)
    starts = set()
    for step in range(100):
        inputs, targets = batch(data, stream="s", step=step, batch_size=4, sequence_len=7)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        starts.update(inputs[:, 0].tolist())
    assert starts == {0, 1, 2}  # the last start has its last target at the last byte


def test_windows_are_spread_and_share_no_target() -> None:
    data = torch.arange(101, dtype=torch.uint8)
    every = validation_windows(data, 10, 1000)
    assert every.shape == (10, 11)
    assert torch.equal(every[:, 1:].flatten(), torch.arange(1, 101))
    some = validation_windows(data, 10, 4)
    assert some[:, 0].tolist() == [0, 20, 50, 70]
    assert torch.equal(some[:, 1:], some[:, :-1] + 1)
