"""Checkpoints: whole or absent, and never trusted when damaged."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from common.checkpoint_file import load_checkpoint, save_checkpoint
from common.errors import DamagedError, UsageError
from common.plain_files import write_atomically


@pytest.fixture
def content() -> dict[str, Any]:
    return {
        "step": 3,
        "model": {"w": torch.randn(5, 7), "nan": torch.tensor(float("nan"))},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "betas": (0.9, 0.95)},
        "empty": torch.empty(0),
        "bf16": torch.randn(3).bfloat16(),
        "record": None,
        "words": ["a", True],
    }


def test_what_is_saved_comes_back(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, content)
    loaded = load_checkpoint(path, remedy="x")
    assert loaded.keys() == content.keys()
    assert torch.equal(loaded["model"]["w"], content["model"]["w"])
    assert torch.equal(loaded["bf16"], content["bf16"])
    assert loaded["optimizer"]["betas"] == (0.9, 0.95)
    assert loaded["words"] == ["a", True]
    assert os.listdir(tmp_path) == ["a.pt"]
    assert torch.load(path, weights_only=True)["step"] == 3


def test_a_save_that_fails_leaves_the_old_file(
    tmp_path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, content)

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, no_space)
            with pytest.raises(OSError, match="No space left"):
                save_checkpoint(path, {**content, "step": 4})
        assert load_checkpoint(path, remedy="x")["step"] == 3
    save_checkpoint(path, {**content, "step": 4})
    assert load_checkpoint(path, remedy="x")["step"] == 4


@pytest.mark.parametrize("keep", [0, 1, 100, -1, -1000])
def test_a_cut_file_is_refused(tmp_path: Path, content: dict[str, Any], keep: int) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, content)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match=r"a\.pt is damaged .*: delete it$"):
        load_checkpoint(path, remedy="delete it")


def test_a_changed_value_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, content)
    stored = content["model"]["w"].numpy().tobytes()
    whole = path.read_bytes()
    at = whole.index(stored)
    path.write_bytes(whole[: at + 9] + bytes([whole[at + 9] ^ 1]) + whole[at + 10 :])
    with pytest.raises(UsageError, match=r"a\.pt is damaged .*: delete it$"):
        load_checkpoint(path, remedy="delete it")


@pytest.mark.parametrize(
    "change",
    [
        {"step": 4},
        {"step": 3.0},
        {"words": ["a", 1]},
        {"words": ("a", True)},
        {"empty": torch.empty(0, 1)},
        {"extra": None},
        {"model": {"v": torch.zeros(1)}},
    ],
    ids=str,
)
def test_the_digest_sees_every_change(
    tmp_path: Path, content: dict[str, Any], change: dict[str, Any]
) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, content)
    digest = torch.load(path, weights_only=True)["sha256"]
    torch.save({**content, **change, "sha256": digest}, path)
    with pytest.raises(UsageError, match="checksum"):
        load_checkpoint(path, remedy="delete it")


def test_a_file_that_runs_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"sha256": "", "path": Path("x")}, path)  # needs a class to be imported
    with pytest.raises(UsageError, match="damaged"):
        load_checkpoint(path, remedy="delete it")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
    ],
    ids=repr,
)
def test_a_file_that_cannot_be_read_is_not_called_damaged(
    tmp_path: Path,
    content: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    reason: str,
) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, content)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(UsageError, match=rf"a\.pt cannot be read \({reason}\)") as raised:
        load_checkpoint(path, remedy="delete it")
    assert not isinstance(raised.value, DamagedError)


def test_text_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "t.md"
    write_atomically(path, "é\n")
    write_atomically(path, "é\né\n")
    assert path.read_bytes() == "é\né\n".encode()
    assert os.listdir(tmp_path) == ["t.md"]
