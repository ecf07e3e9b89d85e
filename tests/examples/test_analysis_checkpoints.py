"""Checkpoints of runs with bytes and with a BPE, evaluated with their own tokenizers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from analysis import checkpoints
from analysis.bundle import MINI_BUNDLE, load_bundle
from analysis.checkpoints import beginning_token, evaluate_checkpoint, load_model
from ars.models import GPT, miniseries_config
from common.checkpoint_file import save_checkpoint
from common.errors import UsageError
from corpus.pieces import Piece, Source
from corpus.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    text = b"the owl hoots and the wolf howls; the sky is blue, the grass is green\n" * 20
    source = Source("text", {}, {}, lambda: iter([Piece("train", True, text)]), (), len(text))
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(source, vocab_size=280).save(path)
    return load_tokenizer(path)


def run_of(folder: Path, tokenizer: Tokenizer | None, vocab_size: int, depth: int = 1) -> Path:
    """A run's folder with one finished model."""
    model = GPT(miniseries_config(depth, vocab_size=vocab_size), torch.Generator().manual_seed(0))
    path = folder / "checkpoints" / f"d{depth}-scratch.pt"
    path.parent.mkdir(parents=True)
    save_checkpoint(path, {"step": 1, "model": model.state_dict(), "record": None})
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer.json")
    return path


def test_the_tokenizer_of_the_run_is_used(tmp_path: Path, bpe: Tokenizer) -> None:
    model, tokenizer = load_model(run_of(tmp_path, bpe, bpe.vocab_size), 32)
    assert tokenizer.sha256 == bpe.sha256
    assert (model.config.vocab_size, model.config.sequence_len) == (280, 32)
    assert beginning_token(tokenizer) == tokenizer.separator == 0
    assert beginning_token(ByteTokenizer()) == ord("\n")


def test_a_model_of_bytes_needs_no_tokenizer(tmp_path: Path) -> None:
    model, tokenizer = load_model(run_of(tmp_path, None, 256, depth=2), 16)
    assert (tokenizer.name, model.config.n_layer) == ("bytes", 2)
    assert load_model(run_of(tmp_path / "b", ByteTokenizer(), 256), 16)[1].name == "bytes"


def test_the_longest_input_is_the_trainings(tmp_path: Path) -> None:
    path = run_of(tmp_path, None, 256)
    with pytest.raises(UsageError, match=r"has no config\.json .* give --sequence-len"):
        load_model(path, None)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"settings": {"sequence_len": 24}}))
    assert load_model(path, None)[0].config.sequence_len == 24
    tasks = load_bundle(MINI_BUNDLE)[:1]
    own, given = (
        evaluate_checkpoint(path, tasks, sequence_len=length, max_per_task=4)
        for length in (None, 24)
    )
    assert own == given


def test_tokenizers_of_other_runs_are_refused(tmp_path: Path, bpe: Tokenizer) -> None:
    path = run_of(tmp_path / "a", None, 280)
    with pytest.raises(UsageError, match=r"has 280 tokens and no tokenizer\.json"):
        load_model(path, 16)
    path = run_of(tmp_path / "b", bpe, 300)
    with pytest.raises(UsageError, match=r"has 300 tokens, but the tokenizer of .* has 280"):
        load_model(path, 16)


def test_tasks_are_read_by_the_tokenizer_after_its_separator(
    tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    whole = checkpoints.evaluate

    def evaluate(model: Any, tasks: Any, tokenize: Any, **settings: Any) -> Any:
        seen.update(settings, tokens=tokenize("the owl"))
        return whole(model, tasks, tokenize, **settings)

    monkeypatch.setattr(checkpoints, "evaluate", evaluate)
    path = run_of(tmp_path, bpe, bpe.vocab_size)
    result = evaluate_checkpoint(path, load_bundle(MINI_BUNDLE), sequence_len=48, max_per_task=4)
    assert seen["bos"] == 0
    assert seen["max_tokens"] == 48
    assert bpe.decode(seen["tokens"]) == b"the owl"
    assert len(seen["tokens"]) < len("the owl")
    content = json.loads(json.dumps(result.to_dict()))
    assert [task["items"] for task in content["tasks"]] == [4, 4, 4]
    assert content["core_v1"] is content["core_v2"] is None
    assert "22 of 22 tasks are missing" in content["why_not_core"]


def test_every_item_advances_the_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    def bar(**settings: Any) -> Any:
        bars.append(tqdm(**settings))
        return bars[-1]

    monkeypatch.setattr(checkpoints, "tqdm", bar)
    path = run_of(tmp_path, ByteTokenizer(), 256)
    tasks = load_bundle(MINI_BUNDLE)
    for most, items in ((4, 12), (None, sum(len(task.items) for task in tasks))):
        evaluate_checkpoint(path, tasks, sequence_len=32, max_per_task=most)
        assert (bars[-1].n, bars[-1].total) == (items, items)


def test_a_task_that_is_missing_makes_it_no_core(tmp_path: Path) -> None:
    tasks = [replace(task, label="squad") for task in load_bundle(MINI_BUNDLE)[:1]]
    path = run_of(tmp_path, ByteTokenizer(), 256)
    result = evaluate_checkpoint(path, tasks, sequence_len=32, max_per_task=4)
    assert len(result.missing) == 21
    with pytest.raises(ValueError, match="21 of 22 tasks are missing"):
        result.core(1)
