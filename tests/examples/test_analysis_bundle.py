"""Bundles, ours and faulty ones, and prompts: the examples before an item, and what is scored."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from analysis_records import byte_tokens

from analysis.bundle import (
    LANGUAGE_MODELING,
    MINI_BUNDLE,
    MULTIPLE_CHOICE,
    SCHEMA,
    Task,
    build_prompts,
    examples_for,
    load_bundle,
)
from analysis.core import CORE_TASKS, evaluate
from ars.models import GPT, miniseries_config
from common.errors import UsageError

BOS = ord("\n")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MINI_BUNDLE, tmp_path / "bundle"))


def test_our_bundle_has_every_type() -> None:
    tasks = {task.label: task for task in load_bundle(MINI_BUNDLE)}
    assert {(t.kind, t.shots, t.baseline) for t in tasks.values()} == {
        (MULTIPLE_CHOICE, 2, 0.5), (SCHEMA, 0, 0.5), (LANGUAGE_MODELING, 2, 0.0),
    }  # fmt: skip
    assert tasks["mini_choice"].delimiter == " "
    assert tasks["mini_completion"].delimiter == "\nAnswer: "
    assert sum(len(t.items) for t in tasks.values()) == 40
    assert not tasks.keys() & CORE_TASKS.keys()
    assert "CC0" in (MINI_BUNDLE / "README.md").read_text()


def test_golds_of_our_bundle_are_not_all_alike() -> None:
    for task in load_bundle(MINI_BUNDLE):
        golds = [item["gold"] for item in task.items if "gold" in item]
        assert not golds or 0.3 < sum(golds) / len(golds) < 0.7
        questions = [json.dumps(item) for item in task.items]
        assert len(set(questions)) == len(questions)


def test_a_byte_model_goes_through_our_bundle() -> None:
    model = GPT(miniseries_config(1, sequence_len=128), torch.Generator().manual_seed(0))
    result = evaluate(model, load_bundle(MINI_BUNDLE), byte_tokens, bos=ord("\n"), max_tokens=128)
    assert [task.items for task in result.tasks] == [16, 10, 14]
    content = result.to_dict()
    assert content["core_v1"] is None
    assert "22 of 22 tasks are missing" in content["why_not_core"]
    again = evaluate(model, load_bundle(MINI_BUNDLE), byte_tokens, bos=ord("\n"), max_tokens=128)
    assert again == result


def test_a_task_without_data_is_left_out(bundle: Path) -> None:
    (bundle / "eval_data" / "mini_schema.jsonl").unlink()
    assert [t.label for t in load_bundle(bundle)] == ["mini_choice", "mini_completion"]
    shutil.rmtree(bundle / "eval_data")
    with pytest.raises(UsageError, match="no data of any task"):
        load_bundle(bundle)


def test_numbers_are_texts(bundle: Path) -> None:
    path = bundle / "eval_data" / "mini_completion.jsonl"
    path.write_text('{"context": "1 2", "continuation": 3}\n' * 3 + "\n")
    task = next(t for t in load_bundle(bundle) if t.kind == LANGUAGE_MODELING)
    assert [item["continuation"] for item in task.items] == ["3"] * 3


def rewrite(name: str, old: str, new: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


def item(name: str, line: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "eval_data" / f"{name}.jsonl").write_text(line + "\n")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "core.yaml").unlink(), "No such file"),
        (lambda folder: (folder / "core.yaml").write_text("a: [1"), "is not YAML"),
        (
            lambda folder: (folder / "core.yaml").write_text("icl_tasks:\n- label: a\n  label: b"),
            "is not YAML (label stands there twice, again in line 3)",
        ),
        (lambda folder: (folder / "core.yaml").write_text("a: 1"), "no list icl_tasks"),
        (lambda folder: (folder / "core.yaml").write_bytes(b"\xff"), "is not UTF-8"),
        (rewrite("core.yaml", "  num_fewshot: [0]\n", ""), "mini_schema lacks 'num_fewshot'"),
        (rewrite("core.yaml", "[0]", "[-1]"), "num_fewshot is [-1], below 0"),
        (rewrite("core.yaml", "[0]", "[]"), "num_fewshot is [], not [n]"),
        (rewrite("core.yaml", "[0]", "0"), "num_fewshot is 0, not [n]"),
        (rewrite("core.yaml", ": schema", ": riddle"), "the type 'riddle'"),
        (rewrite("core.yaml", "[0]", "[10]"), "has 10 items, too few for 10 examples"),
        (rewrite("eval_meta_data.csv", "mini_schema", "other"), "no row for mini_schema"),
        (rewrite("eval_meta_data.csv", ",50,", ",half,"), "is 'half', not a percentage"),
        (rewrite("eval_meta_data.csv", ",50,", ",100,"), "is '100', not a percentage"),
        (item("mini_choice", "{"), "line 1 is not an item of type multiple_choice"),
        (item("mini_choice", '{"query": "q", "choices": ["a", "b"], "gold": 2}'), "line 1 is not"),
        (item("mini_choice", '{"query": "q", "choices": ["a", "b"], "gold": "a"}'), "line 1 is"),
        (item("mini_schema", '{"query": "q", "choices": ["a", "b"], "gold": 1}'), "of type schema"),
        (item("mini_completion", '{"context": "c", "continuation": " "}'), "language_modeling"),
        (item("mini_completion", '{"context": null, "continuation": "a"}'), "language_modeling"),
        (item("mini_completion", "[1]"), "language_modeling"),
    ],
)
def test_what_is_not_a_bundle_is_refused(
    bundle: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(bundle)
    with pytest.raises(UsageError) as caught:
        load_bundle(bundle)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


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
