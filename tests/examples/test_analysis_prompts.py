"""Prompts: which examples come before an item, and what of the tokens is scored."""

import random
from typing import Any

import pytest
from analysis_records import byte_tokens

from analysis.bundle import LANGUAGE_MODELING, MULTIPLE_CHOICE, SCHEMA, Task
from analysis.prompts import build_prompts, examples_for

BOS = ord("\n")


def text_of(tokens: list[int]) -> str:
    assert tokens[0] == BOS
    return bytes(tokens[1:]).decode()


def choice_items(count: int) -> list[dict[str, Any]]:
    return [{"query": f"q{i}", "choices": ["no", f"a{i}", "nope"], "gold": 1} for i in range(count)]


def task(kind: str, shots: int, items: list[dict[str, Any]], label: str = "ours") -> Task:
    return Task(label, kind, shots, " ", 0.0, tuple(items))


def test_examples_are_drawn_without_the_item_and_by_its_seed() -> None:
    items = choice_items(12)
    for index in (0, 5, 11):
        expected = random.Random(1234 + index).sample([i for i in range(12) if i != index], 10)
        assert [items.index(e) for e in examples_for(items, index, 10)] == expected
        assert index not in expected
    assert examples_for(items, 3, 0) == []


def test_prompts_of_multiple_choice() -> None:
    ours = task(MULTIPLE_CHOICE, 2, choice_items(4))
    prompts = build_prompts(ours, 1, byte_tokens, BOS)
    first, second = examples_for(ours.items, 1, 2)
    head = "".join(f"{e['query']} {e['choices'][1]}\n\n" for e in (first, second))
    assert [text_of(p.tokens) for p in prompts] == [head + f"q1 {c}" for c in ("no", "a1", "nope")]
    assert {p.start for p in prompts} == {1 + len(head) + len("q1 ")}


def test_prompts_of_schema_are_scored_on_their_common_end() -> None:
    item = {"context_options": ["The cat", "A dog of mine"], "continuation": "sat.", "gold": 0}
    cat, dog = build_prompts(task(SCHEMA, 0, [item]), 0, byte_tokens, BOS)
    assert text_of(cat.tokens) == "The cat sat."
    assert text_of(dog.tokens) == "A dog of mine sat."
    assert bytes(cat.tokens[cat.start :]) == bytes(dog.tokens[dog.start :]) == b" sat."


def test_prompts_of_language_modelling_are_stripped() -> None:
    items = [
        {"context": "  one two \n", "continuation": "three"},
        {"context": "four five ", "continuation": "six"},
    ]
    (prompt,) = build_prompts(task(LANGUAGE_MODELING, 1, items), 0, byte_tokens, BOS)
    assert text_of(prompt.tokens) == "four five six\n\none two three"
    # The blank at the end of the prompt belongs to what is to be predicted.
    assert bytes(prompt.tokens[prompt.start :]) == b" three"


def test_a_tokenizer_that_merges_across_the_answer_is_refused() -> None:
    def pairs(text: str) -> list[int]:
        return [hash(text[i : i + 2]) % 1000 for i in range(0, len(text), 2)]

    items = [{"context": "odd", "continuation": "x"}]
    with pytest.raises(ValueError, match="item 0 of ours: the tokens of the prompt"):
        build_prompts(task(LANGUAGE_MODELING, 0, items), 0, pairs, BOS)


def test_every_prompt_has_something_to_score_and_something_before_it() -> None:
    texts = ["", "a", "ab", "abc", "b", "\n", "\na"]  # a line's end is the BOS of bytes
    for first in texts:
        for second in texts:
            choice = {"query": first, "choices": [second, "", first, "abx"], "gold": 0}
            schema = {"context_options": [second, first, "xab"], "continuation": first, "gold": 0}
            for kind, item in ((MULTIPLE_CHOICE, choice), (SCHEMA, schema)):
                for prompt in build_prompts(task(kind, 0, [item]), 0, byte_tokens, BOS):
                    assert 1 <= prompt.start < len(prompt.tokens)


def test_items_with_nothing_to_score_are_refused() -> None:
    empty = {"query": "", "choices": ["", "a"], "gold": 0}
    ours = Task("ours", MULTIPLE_CHOICE, 0, "", 0.0, (empty,))
    with pytest.raises(ValueError, match="item 0 of ours has an option without any text"):
        build_prompts(ours, 0, byte_tokens, BOS)
    apart = {"context_options": ["a", "b"], "continuation": "", "gold": 0}
    ours = Task("ours", SCHEMA, 0, "", 0.0, (apart,))
    with pytest.raises(ValueError, match="item 0 of ours: the tokens of its options have no comm"):
        build_prompts(ours, 0, byte_tokens, BOS)
