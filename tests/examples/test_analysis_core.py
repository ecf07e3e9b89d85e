"""CORE: scoring and aggregation against answers worked out by hand."""

import functools
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from analysis_records import byte_tokens
from torch import Tensor, nn

from analysis.bundle import LANGUAGE_MODELING, MULTIPLE_CHOICE, SCHEMA, Task
from analysis.core import CORE_TASKS, CoreResult, _score, evaluate
from ars.models import GPT, GPTConfig

BOS = ord("\n")


def choice_items(count: int) -> list[dict[str, Any]]:
    return [{"query": f"q{i}", "choices": ["no", f"a{i}", "nope"], "gold": 1} for i in range(count)]


def task(kind: str, shots: int, items: list[dict[str, Any]], label: str = "ours") -> Task:
    return Task(label, kind, shots, " ", 0.0, tuple(items))


class Oracle(nn.Module):
    """Predicts the bytes of ``sentences`` wherever it has read the beginning of one, else "~"."""

    def __init__(self, *sentences: str) -> None:
        super().__init__()
        self.sentences = [s.encode() for s in sentences]
        self.longest = max(map(len, self.sentences), default=1)
        self.following = functools.cache(self._following)
        self.lengths: list[int] = []
        self.modes: list[bool] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.lengths.append(tokens.size(1))
        self.modes.append(self.training)
        logits = torch.zeros(*tokens.shape, 256)
        for row, sequence in enumerate(tokens.tolist()):
            for t in range(len(sequence)):
                read = bytes(sequence[max(0, t + 1 - self.longest) : t + 1])
                logits[row, t, self.following(read)] = 20.0
        return logits

    def _following(self, read: bytes) -> int:
        following = ord("~")
        for sentence in self.sentences:
            for size in range(len(sentence) - 1, 2, -1):
                if read.endswith(sentence[:size]):
                    following = sentence[size]
                    break
        return following


def one(model: nn.Module, ours: Task, **settings: Any) -> CoreResult:
    return evaluate(model, [ours], byte_tokens, bos=BOS, **settings)


def test_the_choice_with_the_least_mean_loss_wins() -> None:
    items = [
        {"query": "the sky is", "choices": ["a very long wrong answer", "blue"], "gold": 1},
        {"query": "the sky is", "choices": ["blue", "green"], "gold": 1},
    ]
    result = one(Oracle("the sky is blue"), task(MULTIPLE_CHOICE, 0, items))
    assert (result.tasks[0].items, result.tasks[0].accuracy) == (2, 0.5)
    # The mean counts, not the sum: 1 wrong byte of 2 loses to 1 wrong byte of 9.
    items = [{"query": "pi is", "choices": ["x3", "3.14159x"], "gold": 1}]
    assert one(Oracle("pi is 3.141592"), task(MULTIPLE_CHOICE, 0, items)).tasks[0].accuracy == 1.0


def test_the_first_of_equal_choices_wins() -> None:
    for gold in (0, 1):
        items = [{"query": "zzz", "choices": ["ab", "cd"], "gold": gold}]
        assert one(Oracle(), task(MULTIPLE_CHOICE, 0, items)).tasks[0].accuracy == 1.0 - gold


@pytest.mark.parametrize("order", [("ab", "abcd"), ("abcd", "ab")])
@pytest.mark.parametrize(("known", "answer"), [("q: ab~", "ab"), ("q: abcd", "abcd")])
def test_a_choice_that_begins_the_other_wins_by_the_model(
    order: tuple[str, str], known: str, answer: str
) -> None:
    """Scored from the last token that they share: "b" against the mean of "b", "c" and "d"."""
    items = [{"query": "q:", "choices": list(order), "gold": order.index(answer)}]
    # Behind the common part every token but the known one costs, so that no two means are equal.
    (result,) = one(Oracle(known, "q:xab"), task(MULTIPLE_CHOICE, 0, items)).tasks
    assert (result.accuracy, result.nested) == (1.0, 1)


class Measured(nn.Module):
    """Fixed logits by the last token alone, so that the losses can be written down."""

    def __init__(self) -> None:
        super().__init__()
        logits = torch.randn(256, 256, generator=torch.Generator().manual_seed(5))
        self.losses = -logits.log_softmax(-1)
        self.logits = logits

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits[tokens]


@pytest.mark.parametrize(
    ("choices", "scored"),
    [
        (["ab", "abc"], ["b", "bc"]),
        (["abc", "ab", "abd"], ["bc", "b", "bd"]),
        (["", "x"], [" ", " x"]),
        (["", ""], [" ", " "]),
        (["ab", "ab"], ["b", "b"]),
        (["ab"], ["b"]),
        (["ab", "abc", "xb"], ["ab", "abc", "xb"]),  # they part at once: two of them do not matter
    ],
)
def test_means_of_choices_that_share_their_beginning(choices: list[str], scored: list[str]) -> None:
    model = Measured()
    means = []
    for choice, end in zip(choices, scored, strict=True):
        text = f"q: {choice}" if choice else "q: "
        pairs = list(zip(text[-len(end) - 1 : -1], end, strict=True))
        losses = [float(model.losses[ord(before), ord(after)]) for before, after in pairs]
        means.append(sum(losses) / len(losses))
    best = means.index(min(means))
    for gold in range(len(choices)):
        items = [{"query": "q:", "choices": choices, "gold": gold}]
        (result,) = one(model, task(MULTIPLE_CHOICE, 0, items)).tasks
        assert result.accuracy == float(gold == best)
        assert result.nested == (len(scored[0]) < len("ab") or choices[-1] == "abd")


@pytest.mark.parametrize("contexts", [["the owl", "lo! the owl"], ["the owl", "the owl"]])
def test_contexts_that_end_alike_are_scored_on_all_that_is_equal(contexts: list[str]) -> None:
    """Also if one is the end of the other, or all are one: no loss is missing."""
    items = [{"context_options": contexts, "continuation": "hoots", "gold": 0}]
    result = one(Oracle("the owl hoots"), task(SCHEMA, 0, items))
    assert (result.tasks[0].accuracy, result.tasks[0].cut, result.tasks[0].nested) == (1.0, 0, 0)


def test_a_model_that_diverged_has_no_score() -> None:
    class Diverged(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return torch.full((*tokens.shape, 256), math.nan)

    for ours in whole_bundle():
        with pytest.raises(ValueError, match="not numbers: it has diverged, so leave it out"):
            one(Diverged(), ours)


def test_the_context_that_makes_the_end_likely_wins() -> None:
    items = [
        {"context_options": ["a wolf", "the owl"], "continuation": "hoots", "gold": 1},
        {"context_options": ["the owl", "a wolf"], "continuation": "hoots", "gold": 1},
    ]
    assert one(Oracle("the owl hoots"), task(SCHEMA, 0, items)).tasks[0].accuracy == 0.5


def test_every_token_of_a_continuation_must_be_predicted() -> None:
    items = [
        {"context": "tick tock tick", "continuation": "tock"},
        {"context": "tick tock tick", "continuation": "tack"},
        {"context": "tick tock tick", "continuation": "tocks"},
        {"context": "tick tock tick", "continuation": "toc"},
    ]
    model = Oracle("tick tock tick tock")
    result = one(model, task(LANGUAGE_MODELING, 0, items))
    assert (result.tasks[0].accuracy, result.tasks[0].cropped) == (0.5, 0)
    assert model.lengths[:1] == [1 + len("tick tock tick tack")], "a BOS and the whole prompt"


def test_what_stands_behind_a_short_choice_is_not_scored() -> None:
    # "blue" is right in all 4 bytes; the other choice in 13 of 14, more than blue with padding.
    model = Oracle("the sky is green as grass", "the sky is blue")
    items = [{"query": "the sky is", "choices": ["green as grass", "blue"], "gold": 1}]
    assert one(model, task(MULTIPLE_CHOICE, 0, items)).tasks[0].accuracy == 1.0


def test_the_first_token_of_a_continuation_counts() -> None:
    # Only the blank is wrong: the model expects a dash there, and goes on rightly after the blank.
    model = Oracle("tick tock tick tock", "tick tock tick-x")
    items = [{"context": "tick tock tick", "continuation": "tock"}]
    assert one(model, task(LANGUAGE_MODELING, 0, items)).tasks[0].accuracy == 0.0


def test_the_baselines_of_both_versions() -> None:
    percent = {label: (100 * v1, 100 * v2) for label, (_, _, v1, v2) in CORE_TASKS.items()}
    unlike = {label: pair for label, pair in percent.items() if pair[0] != pair[1]}
    assert unlike == {
        "commonsense_qa": (20.0, pytest.approx(40.3)),
        "agi_eval_lsat_ar": (20.0, 25.0),
        "bigbench_language_identification": (pytest.approx(9.1), 25.0),
    }
    quarter = ("hellaswag_zeroshot", "arc_easy", "arc_challenge", "openbook_qa", "hellaswag")
    half = ("copa", "piqa", "winograd", "winogrande")
    for label, (_, v2) in percent.items():
        if label not in unlike:
            expected = 25.0 if label in quarter else 50.0 if label in half else 0.0
            assert v2 == (62.0 if label == "boolq" else expected), label
    assert len(CORE_TASKS) == 22
    assert sum(shots for _, shots, *_ in CORE_TASKS.values()) == 14 * 10 + 3


def test_padding_changes_nothing() -> None:
    config = GPTConfig(vocab_size=256, sequence_len=64, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    items = [
        {"query": f"q{i}", "choices": ["x" * (1 + 5 * i), "yz", "w" * 9], "gold": i % 3}
        for i in range(9)
    ]
    ours = task(MULTIPLE_CHOICE, 0, items)
    shuffled = list(items)
    random.Random(1337).shuffle(shuffled)
    right = 0
    for item in shuffled:
        means = []
        for choice in item["choices"]:  # each alone: nothing is padded
            tokens = torch.tensor([[BOS, *f"{item['query']} {choice}".encode()]])
            losses = nn.functional.cross_entropy(
                model(tokens).detach()[0, :-1], tokens[0, 1:], reduction="none"
            )
            means.append(float(losses[len(item["query"]) + 1 :].mean()))
        right += means.index(min(means)) == item["gold"]
    assert one(model, ours).tasks[0].accuracy == right / 9


def test_long_prompts_keep_their_end() -> None:
    items = [{"context": "x" * 50 + " tick tock tick", "continuation": "tock"}]
    model = Oracle("tick tock tick tock")
    result = one(model, task(LANGUAGE_MODELING, 0, items), max_tokens=24)
    assert model.lengths == [24]
    assert (result.tasks[0].accuracy, result.tasks[0].cropped, result.tasks[0].cut) == (1.0, 1, 0)
    model = Oracle("tick tock tick tock")
    result = one(model, task(LANGUAGE_MODELING, 0, items), max_tokens=4)
    assert model.lengths == [4]
    assert (result.tasks[0].cropped, result.tasks[0].cut) == (1, 1)
    with pytest.raises(ValueError, match="max_tokens"):
        one(model, task(LANGUAGE_MODELING, 0, items), max_tokens=1)


def test_items_are_shuffled_before_they_are_cut() -> None:
    seen: list[str] = []

    def tokenize(text: str) -> list[int]:
        seen.append(text.split()[0])
        return byte_tokens(text)

    items = choice_items(20)
    evaluate(Oracle(), [task(MULTIPLE_CHOICE, 0, items)], tokenize, bos=BOS, max_per_task=4)
    expected = list(items)
    random.Random(1337).shuffle(expected)
    assert list(dict.fromkeys(seen)) == [item["query"] for item in expected[:4]]
    with pytest.raises(ValueError, match="3 items of ours are too few for 3 examples"):
        one(Oracle(), task(MULTIPLE_CHOICE, 3, items), max_per_task=3)


def test_the_model_is_left_in_its_mode_even_after_a_stop() -> None:
    ours = task(MULTIPLE_CHOICE, 0, choice_items(2))
    model = Oracle().train()
    one(model, ours)
    assert model.training
    assert set(model.modes) == {False}

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one(model, ours, between=stop)
    assert model.training


def whole_bundle(change: Callable[[Task], Task] = lambda task: task) -> list[Task]:
    """A bundle with the labels of CORE and twelve easy items each."""
    tasks = []
    for label, (kind, shots, *_) in CORE_TASKS.items():
        if kind == MULTIPLE_CHOICE:
            item: dict[str, Any] = {"query": "the sky is", "choices": ["blue", "red"], "gold": 0}
        elif kind == SCHEMA:
            item = {"context_options": ["the sky is", "a cat"], "continuation": "blue", "gold": 0}
        else:
            item = {"context": "the sky is", "continuation": "blue"}
        tasks.append(change(task(kind, shots, [item] * 12, label)))
    return tasks


def test_core_of_a_perfect_model_is_one() -> None:
    result = evaluate(Oracle("the sky is blue"), whole_bundle(), byte_tokens, bos=BOS)
    assert result.core(1) == (1.0, 0.0)
    assert result.core(2) == (1.0, 0.0)
    assert result.to_dict()["core_v1"] == {"value": 1.0, "standard_error": 0.0}


def test_core_of_known_accuracies() -> None:
    """Accuracy 0.62 everywhere; the three corrected baselines tell the versions apart."""
    half = evaluate(Oracle("the sky is blue"), whole_bundle(), byte_tokens, bos=BOS)
    tasks = [replace(t, items=t.items * 25) for t in whole_bundle()]
    scores = tuple(_score(t, 186, 0, 0, 0) for t in tasks)
    result = replace(half, tasks=scores)
    for version, column in ((1, 2), (2, 3)):
        baselines = [entry[column] for entry in CORE_TASKS.values()]
        expected = sum((0.62 - b) / (1 - b) for b in baselines) / 22
        errors = [math.sqrt(0.62 * 0.38 / 300) / (1 - b) for b in baselines]
        assert result.core(version) == pytest.approx(
            (expected, math.sqrt(sum(e * e for e in errors)) / 22)
        )
    assert result.core(2)[0] < result.core(1)[0]


def test_guessing_differs_by_the_corrected_baselines() -> None:
    """At chance 0.403, 0.25 and 0.25 version 1 gives credit for guessing: 0.024 in the mean."""
    changes = [(v2 - v1) / (1 - v1) for _, _, v1, v2 in CORE_TASKS.values()]
    gain = sum(changes) / len(changes)
    assert gain == pytest.approx(0.024, abs=0.002)


def test_a_missing_task_is_named_and_the_mean_is_not_core() -> None:
    tasks = [t for t in whole_bundle() if t.label not in ("squad", "piqa")]
    result = evaluate(Oracle("the sky is blue"), tasks, byte_tokens, bos=BOS)
    with pytest.raises(ValueError, match=r"2 of 22 tasks are missing \(piqa, squad\)"):
        result.core(1)
    content = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert content["core_v1"] is None
    assert content["core_v2"] is None
    assert "piqa, squad" in content["why_not_core"]
    assert content["mean_centred_v1"] == 1.0
    with pytest.raises(ValueError, match="version"):
        result.core(3)


def test_other_numbers_of_examples_are_not_core() -> None:
    tasks = whole_bundle(lambda t: replace(t, shots=5) if t.label == "boolq" else t)
    result = evaluate(Oracle("the sky is blue"), tasks, byte_tokens, bos=BOS)
    with pytest.raises(ValueError, match="boolq have another type or number"):
        result.core(1)


def test_items_that_lost_what_is_scored_are_not_core() -> None:
    result = evaluate(
        Oracle("the sky is blue"),
        whole_bundle(),
        byte_tokens,
        bos=BOS,
        max_tokens=4,
        max_per_task=11,
    )
    cut = sum(t.cut for t in result.tasks)
    assert cut > 0
    with pytest.raises(ValueError, match=f"not CORE: {cut} items lost a part of what is scored"):
        result.core(1)
    assert result.to_dict()["core_v1"] is None
    # Without its beginning alone a prompt still has all that is scored.
    fits = replace(result, tasks=tuple(replace(t, cut=0) for t in result.tasks))
    assert sum(t.cropped for t in fits.tasks) > 0
    assert fits.to_dict()["core_v1"] is not None


def test_further_tasks_do_not_change_core() -> None:
    extra = task(LANGUAGE_MODELING, 0, [{"context": "zzz", "continuation": "q"}])
    result = evaluate(Oracle("the sky is blue"), [*whole_bundle(), extra], byte_tokens, bos=BOS)
    assert result.tasks[-1].accuracy == 0.0
    assert result.core(1) == (1.0, 0.0)
