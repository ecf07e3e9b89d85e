"""Samples: which tokens are drawn, from which model, and what is wrong with a checkpoint."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from program_helpers import Refused
from small_series import Series

import miniseries
from ars.models import GPT, miniseries_config
from common.checkpoint_file import save_checkpoint
from common.errors import UsageError
from corpus import prepare_corpus
from trainer.sample import continue_tokens


@pytest.fixture(scope="module")
def trained(series: Series, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    series(folder)
    return folder


@pytest.fixture
def checkpoint(trained: Path) -> Path:
    return trained / "checkpoints/d2-scratch+ars.pt"


@pytest.fixture
def model() -> GPT:
    config = miniseries_config(1, vocab_size=11, sequence_len=6)
    model = GPT(config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.lm_head.weight.mul_(300)  # sharp enough for the likeliest token to matter
    return model


def sampled(checkpoint: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert miniseries.main(["sample", "--checkpoint", str(checkpoint), *words]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_greedy_is_the_likeliest_token_given_what_the_model_can_read(model: GPT) -> None:
    found = continue_tokens(model, [1, 2], tokens=8, temperature=0)
    text = [1, 2]
    for _ in range(8):
        with torch.no_grad():
            logits = model(torch.tensor([text[-6:]]))[0, -1]
        text.append(int(logits.argmax()))
    assert found.tolist() == [text[2:]]


def test_frequencies_are_those_of_the_model(model: GPT) -> None:
    with torch.no_grad():
        logits = model(torch.tensor([[3]]))[0, -1]
    for temperature in (0.5, 2.0):
        found = continue_tokens(model, [3], tokens=1, temperature=temperature, count=4000)
        shares = torch.bincount(found.flatten(), minlength=11) / 4000
        # Five standard deviations of a share of 4000 draws, at most.
        assert (shares - (logits / temperature).softmax(0)).abs().max() < 5 * (0.25 / 4000) ** 0.5


def test_top_k_leaves_out_the_others(model: GPT) -> None:
    with torch.no_grad():
        best = model(torch.tensor([[3]]))[0, -1].topk(2).indices.tolist()
    found = continue_tokens(model, [3], tokens=1, temperature=50.0, top_k=2, count=100)
    assert set(found.flatten().tolist()) == set(best)
    one = continue_tokens(model, [3], tokens=5, temperature=1.0, top_k=1)
    assert torch.equal(one, continue_tokens(model, [3], tokens=5, temperature=0))
    all_of_them = continue_tokens(model, [3], tokens=5, temperature=1.0, top_k=99)
    assert torch.equal(all_of_them, continue_tokens(model, [3], tokens=5, temperature=1.0))


def test_a_seed_repeats_and_samples_differ(model: GPT) -> None:
    def draw(seed: int, count: int) -> list[list[int]]:
        found = continue_tokens(model, [3], tokens=12, temperature=3.0, seed=seed, count=count)
        return [[int(token) for token in row] for row in found]

    assert draw(0, 3) == draw(0, 3)
    assert draw(0, 2) == draw(0, 3)[:2]
    assert len({tuple(row) for row in [*draw(0, 3), *draw(1, 3)]}) == 6


def test_a_trained_run(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "abc ", "--tokens", "20"]
    once = sampled(checkpoint, capsys, *words)
    assert once.startswith("abc ")
    assert once == sampled(checkpoint, capsys, *words)
    assert once != sampled(checkpoint, capsys, *words, "--seed", "1")
    greedy = sampled(checkpoint, capsys, *words, "--temperature", "0")
    assert greedy == sampled(checkpoint, capsys, *words, "--temperature", "0", "--seed", "9")
    three = sampled(checkpoint, capsys, *words, "--count", "3")
    assert three.startswith(f"--- sample 1 of 3\n{once}")
    assert three.count("abc ") == 3
    assert sampled(checkpoint, capsys, "--tokens", "3", "--prompt=é").startswith("é")


def test_a_state_in_the_middle_of_training_can_be_sampled(
    trained: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(trained / name, tmp_path)
    state = tmp_path / "checkpoints/d2-scratch+ars/00000003.pt"
    state.parent.mkdir(parents=True)
    shutil.copy(checkpoint, state)
    words = ["--prompt", "abc ", "--tokens", "5"]
    assert sampled(state, capsys, *words) == sampled(checkpoint, capsys, *words)


def test_a_document_ends_at_the_separator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "text.txt"
    source.write_text("the cat sat on the mat and the rat sat on the cat. " * 200)
    corpus = prepare_corpus(str(source), tokenizer="bpe:270", cache=tmp_path / "c", sequence_len=8)
    tokenizer = corpus.tokenizer
    assert tokenizer.separator is not None
    tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "config.json").write_text(json.dumps({"settings": {"sequence_len": 8}}))
    config = miniseries_config(1, vocab_size=tokenizer.vocab_size, sequence_len=8)
    model = GPT(config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        # Far enough from even for the context to matter, near enough to draw the separator.
        model.lm_head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    path = tmp_path / "checkpoints/d1-scratch.pt"
    path.parent.mkdir()
    save_checkpoint(path, {"model": model.state_dict(), "record": {}})
    for text in ("the cat", ""):
        prompt = tokenizer.encode(text).tolist()
        start = [tokenizer.separator, *prompt]
        drawn = continue_tokens(model, start, tokens=400, temperature=0.8).tolist()[0]
        assert 0 < drawn.index(tokenizer.separator) < 400
        expected = tokenizer.decode(prompt + drawn[: drawn.index(tokenizer.separator)])
        out = sampled(path, capsys, "--prompt", text, "--tokens", "400")
        assert out == expected.decode("utf-8", errors="replace") + "\n"


@pytest.fixture
def damaged(trained: Path, checkpoint: Path, tmp_path: Path) -> Path:
    """A folder with a whole run and broken copies of it."""
    for name in ("run", "other", "no-config", "bad-config"):
        folder = tmp_path / name / "checkpoints"
        folder.mkdir(parents=True)
        shutil.copy(checkpoint, folder / "model.pt")
        for file in ("config.json", "tokenizer.json"):
            shutil.copy(trained / file, tmp_path / name)
    (tmp_path / "no-config/config.json").unlink()
    (tmp_path / "bad-config/config.json").write_text("{}")
    content = (tmp_path / "run/checkpoints/model.pt").read_bytes()
    (tmp_path / "run/checkpoints/cut.pt").write_bytes(content[:1000])
    save_checkpoint(tmp_path / "run/checkpoints/empty.pt", {"model": None})
    model = GPT(miniseries_config(1, vocab_size=300, sequence_len=8))
    save_checkpoint(tmp_path / "run/checkpoints/vocabulary.pt", {"model": model.state_dict()})
    weights = {"wte.weight": torch.zeros(256, 5), "blocks.0.x": torch.zeros(1)}
    save_checkpoint(tmp_path / "run/checkpoints/shape.pt", {"model": weights})
    weights = {"wte.weight": torch.zeros(256, 64)}
    save_checkpoint(tmp_path / "run/checkpoints/nothing.pt", {"model": weights})
    weights = model_weights()
    weights["wte.weight"][0, 0] = float("nan")
    save_checkpoint(tmp_path / "run/checkpoints/diverged.pt", {"model": weights})
    for name, change in WRONG.items():
        weights = model_weights()
        change(weights)
        save_checkpoint(tmp_path / f"run/checkpoints/{name}.pt", {"model": weights})
    os.mkfifo(tmp_path / "run/checkpoints/pipe.pt")
    return tmp_path


def model_weights() -> dict[Any, Any]:
    return GPT(miniseries_config(1, vocab_size=256, sequence_len=8)).state_dict()


WRONG: dict[str, Callable[[dict[Any, Any]], object]] = {
    "no-tensor": lambda w: w.update({"wte.weight": [[1.0]]}),
    "number": lambda w: w.update({"wte.weight": torch.tensor(1.0)}),
    "integers": lambda w: w.update({"lm_head.weight": w["lm_head.weight"].long()}),
    "text": lambda w: w.update({"lm_head.weight": "x"}),
    "key": lambda w: w.update({7: torch.zeros(1)}),
    "missing": lambda w: w.pop("lm_head.weight"),
    "more": lambda w: w.update({"x": torch.zeros(1)}),
    "deeper": lambda w: w.update({"blocks.9.x": torch.zeros(1)}),
}


@pytest.mark.parametrize(
    ("name", "words", "says"),
    [
        ("run/checkpoints/none.pt", [], "does not exist"),
        ("run/checkpoints", [], "does not exist"),
        ("run/checkpoints/cut.pt", [], "is damaged"),
        ("run/config.json", [], "is damaged"),
        ("run/checkpoints/empty.pt", [], "holds no model"),
        ("run/checkpoints/vocabulary.pt", [], "has 300 tokens, but the tokenizer"),
        ("run/checkpoints/shape.pt", [], "another kind of model"),
        ("run/checkpoints/nothing.pt", [], "another kind of model"),
        ("run/checkpoints/diverged.pt", [], "holds a model that diverged"),
        ("run/checkpoints/pipe.pt", [], "is no file"),
        *((f"run/checkpoints/{name}.pt", [], "model") for name in WRONG),
        ("run/checkpoints/model.pt\0", [], "does not exist"),
        ("x" * 300, [], "does not exist"),
        ("no-config/checkpoints/model.pt", [], "is not in the folder of a run"),
        ("bad-config/checkpoints/model.pt", [], "config.json is damaged"),
        ("run/checkpoints/model.pt", ["--device", "cuda:99"], "use --device cpu"),
        ("run/checkpoints/model.pt", ["--device", "tpu"], "use cpu, cuda or cuda:N"),
        ("run/checkpoints/model.pt", ["--temperature", "-1"], "from 0"),
        ("run/checkpoints/model.pt", ["--tokens", "0"], "whole number from 1"),
        ("run/checkpoints/model.pt", ["--top-k", "0"], "whole number from 1"),
        ("run/checkpoints/model.pt", ["--temprature", "1"], "did you mean --temperature?"),
    ],
)
def test_a_mistake_is_one_line(
    damaged: Path, name: str, words: list[str], says: str, refused: Refused
) -> None:
    assert says in refused(miniseries.main, ["sample", "--checkpoint", str(damaged / name), *words])


def test_any_temperature_gives_tokens(model: GPT) -> None:
    for temperature in (1e-320, 1e-45, 1e-12, 100.0):
        found = continue_tokens(model, [1], tokens=3, temperature=temperature)
        likeliest = continue_tokens(model, [1], tokens=3, temperature=0)
        assert temperature == 100.0 or torch.equal(found, likeliest)


def test_a_model_that_gives_no_numbers(model: GPT) -> None:
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    with pytest.raises(UsageError, match="gives no numbers, it diverged"):
        continue_tokens(model, [1], tokens=1, temperature=1.0)


def test_a_checkpoint_has_to_be_named(refused: Refused) -> None:
    assert "--checkpoint is missing" in refused(miniseries.main, ["sample", "--prompt", "x"])
