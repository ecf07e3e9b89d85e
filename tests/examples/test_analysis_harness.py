"""The adapter to lm-evaluation-harness, on a stand-in for its base class."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from analysis.harness import Scorer, harness_model
from ars.models import GPT, GPTConfig, miniseries_config
from corpus.tokenizer import ByteTokenizer
from trainer.checkpoint import save_checkpoint
from trainer.errors import UsageError

LONGEST = 12


@pytest.fixture(scope="module")
def model() -> GPT:
    """Random weights large enough for predictions to differ."""
    config = GPTConfig(vocab_size=256, sequence_len=LONGEST, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config, torch.Generator().manual_seed(0)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model


@pytest.fixture
def scorer(model: GPT) -> Scorer:
    return Scorer(model, ByteTokenizer(), batch_size=3)


def alone(model: GPT, tokens: list[int], scored: int) -> tuple[float, bool]:
    """Log-probability of the last tokens, one at a time, each given what fits before it."""
    total, greedy = 0.0, True
    for i in range(len(tokens) - scored, len(tokens)):
        with torch.no_grad():
            logits = model(torch.tensor([tokens[max(0, i - LONGEST) : i]]))[0, -1].float()
        total += float(logits.log_softmax(-1)[tokens[i]])
        greedy &= int(logits.argmax()) == tokens[i]
    return total, greedy


def test_scores_are_those_of_each_text_alone(model: GPT, scorer: Scorer) -> None:
    pairs = [(b"ab", b"c"), (b"", b"hello"), (b"abcdef", b"ghijk"), (b"x", b"y"), (b"\nq", b"rs")]
    found = scorer.score([(list(context), list(ending)) for context, ending in pairs])
    for (context, ending), answer in zip(pairs, found, strict=True):
        start = b"" if context.startswith(b"\n") else b"\n"
        tokens = list(start + context + ending)
        expected = alone(model, tokens, len(ending))
        assert answer == (pytest.approx(expected[0], abs=1e-4), expected[1])
    assert scorer.score([([1], [])]) == [(0.0, True)]


def test_the_greedy_ending_is_called_greedy(model: GPT, scorer: Scorer) -> None:
    with torch.no_grad():
        first = int(model(torch.tensor([list(b"\nab")]))[0, -1].argmax())
    assert scorer.score([(list(b"ab"), [first])])[0][1]
    assert not scorer.score([(list(b"ab"), [(first + 1) % 256])])[0][1]


def test_a_context_that_does_not_fit_loses_its_beginning(model: GPT, scorer: Scorer) -> None:
    context, ending = list(b"0123456789" * 3), list(b"abc")
    (answer,) = scorer.score([(context, ending)])
    # The window that ends before the last token: as much of the context as fits.
    window = [*context, *ending][-1 - LONGEST :]
    with torch.no_grad():
        logits = model(torch.tensor([window[:-1]]))[0].float().log_softmax(-1)
    expected = sum(float(logits[LONGEST - 3 + k, token]) for k, token in enumerate(ending))
    assert answer[0] == pytest.approx(expected, abs=1e-4)
    # What was cut off says nothing.
    assert scorer.score([(list(b"zzz") + context, ending)])[0][0] == pytest.approx(answer[0])


def test_a_text_longer_than_the_model_reads_is_scored_once_a_token(
    model: GPT, scorer: Scorer
) -> None:
    text = list(b"the quick brown fox jumps over")
    (answer,) = scorer.score([([], text)])
    expected, tokens = 0.0, [ord("\n"), *text]
    for begin in range(1, len(tokens), LONGEST):
        end = min(begin + LONGEST, len(tokens))
        window = tokens[max(0, end - 1 - LONGEST) : end]
        with torch.no_grad():
            logits = model(torch.tensor([window[:-1]]))[0].float().log_softmax(-1)
        expected += sum(
            float(logits[len(window) - 1 - (end - i), tokens[i]]) for i in range(begin, end)
        )
    assert answer[0] == pytest.approx(expected, abs=1e-3)
    sizes = [len(targets) for _, targets in scorer._windows([], text)]
    assert sizes == [12, 12, 6]
    assert all(len(inputs) <= LONGEST for inputs, _ in scorer._windows([], text))


def test_generation_goes_on_until_a_stop_text_or_enough(
    model: GPT, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = b"blue sky\nmore"

    def follow(rows: Any) -> torch.Tensor:
        logits = torch.zeros(len(rows), max(map(len, rows)), 256)
        for k, row in enumerate(rows):
            written = len(row) - len(b"\nq:")
            logits[k, len(row) - 1, script[written] if 0 <= written < len(script) else 126] = 9.0
        return logits

    monkeypatch.setattr(scorer, "_logits", follow)
    requests: list[tuple[str, dict[str, Any]]] = [
        ("q:", {"until": ["\n", "sky!"], "max_gen_toks": 20}),
        ("q:", {"until": "sk", "max_gen_toks": 20}),
        ("q:", {"until": [], "max_gen_toks": 4}),
        ("q:", {"until": ["ue sky"], "max_gen_toks": 4}),
    ]
    assert scorer.generate(requests) == ["blue sky", "blue ", "blue", "blue"]


def test_drawing_is_asked_for_and_repeats(scorer: Scorer) -> None:
    settings = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12}
    first, again = (scorer.generate([("abc", settings)]) for _ in range(2))
    assert first == again
    assert first != scorer.generate([("abc", {"max_gen_toks": 12})])


class TemplateLM:
    """What the adapter uses of the harness's class of this name."""

    def __init__(self) -> None:
        self.kept: list[tuple[Any, ...]] = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *entry: self.kept.append(entry))

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id  # type: ignore[attr-defined,no-any-return]


def test_the_adapter_answers_the_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["lm_eval.api.model"], "TemplateLM", TemplateLM, raising=False)
    path = tmp_path / "checkpoints" / "d1-scratch.pt"
    path.parent.mkdir()
    weights = GPT(miniseries_config(1), torch.Generator().manual_seed(0)).state_dict()
    save_checkpoint(path, {"model": weights})
    lm = harness_model(path, sequence_len=32, batch_size=2)
    assert isinstance(lm, TemplateLM)
    assert (lm.eot_token_id, lm.prefix_token_id, lm.backend) == (10, 10, "causal")
    assert lm.tok_encode("né") == [110, 195, 169]
    assert lm.tokenizer_name.startswith("bytes-")
    pairs = [(("a", "b"), [97], [98]), (("", "c"), [10], [99])]
    scores = lm._loglikelihood_tokens(pairs, disable_tqdm=True)
    # The weights are fresh, so that every byte is about as likely as any other.
    assert [score for score, _ in scores] == pytest.approx([-5.545] * 2, abs=0.2)
    request = SimpleNamespace(args=("x" * 50,))
    assert lm.loglikelihood_rolling([request]) == pytest.approx([-5.545 * 50], rel=0.05)
    (text,) = lm.generate_until([SimpleNamespace(args=("a", {"until": ["\n"], "max_gen_toks": 3}))])
    assert isinstance(text, str)
    assert [entry[0] for entry in lm.kept] == [
        "loglikelihood", "loglikelihood", "loglikelihood_rolling", "generate_until",
    ]  # fmt: skip


def test_a_missing_harness_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"the module lm_eval\S* is missing: pip install lm_eval"):
        harness_model(tmp_path / "x.pt", sequence_len=8)
