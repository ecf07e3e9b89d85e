"""Evaluation bundles: a folder of tasks as DCLM and nanochat have it, and prompts of their items.

    DIR/core.yaml              icl_tasks: label, dataset_uri, num_fewshot, icl_task_type,
                               continuation_delimiter (a space if absent)
    DIR/eval_meta_data.csv     columns "Eval Task" and "Random baseline" (per cent), among others
    DIR/eval_data/<uri>        one JSON item a line

Items by type: multiple_choice ``query, choices, gold``; schema ``context_options, continuation,
gold``; language_modeling ``context, continuation``.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UsageError, understanding
from common.plain_files import parse_json, read_csv, read_text, read_yaml

__all__ = [
    "LANGUAGE_MODELING", "MINI_BUNDLE", "MULTIPLE_CHOICE", "SCHEMA", "Prompt", "Task", "Tokenize",
    "build_prompts", "examples_for", "load_bundle",
]  # fmt: skip

Tokenize = Callable[[str], Sequence[int]]

MULTIPLE_CHOICE = "multiple_choice"
SCHEMA = "schema"
LANGUAGE_MODELING = "language_modeling"

MINI_BUNDLE = Path(__file__).resolve().parent / "mini_bundle"

_REMEDY = "name an evaluation bundle"
_EXAMPLE_SEED = 1234  # plus the item's index

# Type -> its text fields and its fields of several texts, one of which is gold.
_FIELDS = {
    MULTIPLE_CHOICE: (("query",), "choices"),
    SCHEMA: (("continuation",), "context_options"),
    LANGUAGE_MODELING: (("context", "continuation"), None),
}


@dataclass(frozen=True)
class Task:
    """One task of a bundle.

    Args:
        label: its name.
        kind: "multiple_choice", "schema" or "language_modeling".
        shots: solved examples before each item.
        delimiter: between a question and its answer.
        baseline: accuracy of guessing, in [0, 1), by the bundle's own table.
        items: in the order of the file.
    """

    label: str
    kind: str
    shots: int
    delimiter: str
    baseline: float
    items: tuple[dict[str, Any], ...]


def load_bundle(folder: Path) -> list[Task]:
    """Read every task of a bundle whose data lie in it.

    A task of ``core.yaml`` whose data file is absent is left out: `analysis.core.evaluate` names
    what is missing of CORE.

    Args:
        folder: with ``core.yaml``, ``eval_meta_data.csv`` and ``eval_data/``.

    Raises:
        UsageError: a file is damaged or not of this form, or no task has data.
    """
    entries = _entries(folder / "core.yaml")
    baselines = _baselines(folder / "eval_meta_data.csv")
    tasks: list[Task] = []
    for entry in entries:
        where = f"{folder / 'core.yaml'}: {entry.get('label', entry)}"
        try:
            label, kind = str(entry["label"]), entry["icl_task_type"]
            path = folder / "eval_data" / str(entry["dataset_uri"])
            counts = entry["num_fewshot"]
        except KeyError as error:
            raise UsageError(f"{where} lacks {error}: it is not a task of a bundle") from None
        if kind not in _FIELDS:
            raise UsageError(f"{where} has the type {kind!r}; known are {', '.join(_FIELDS)}")
        if not isinstance(counts, list) or not counts or not isinstance(counts[0], int):
            raise UsageError(f"{where}: num_fewshot is {counts!r}, not [n]")
        shots = counts[0]
        if shots < 0:
            raise UsageError(f"{where}: num_fewshot is {counts!r}, below 0")
        if not path.is_file():
            continue
        if label not in baselines:
            raise UsageError(f"{folder / 'eval_meta_data.csv'} has no row for {label}; add one")
        delimiter = str(entry.get("continuation_delimiter", " "))
        if label in (task.label for task in tasks):
            raise UsageError(f"{folder / 'core.yaml'} has {label} twice: remove one")
        items = _items(path, kind)
        if len(items) <= shots:
            raise UsageError(f"{path} has {len(items)} items, too few for {shots} examples each")
        tasks.append(Task(label, kind, shots, delimiter, baselines[label], items))
    if not tasks:
        raise UsageError(f"{folder} has no data of any task: unpack the whole bundle there")
    return tasks


def _entries(path: Path) -> list[dict[str, Any]]:
    content = read_yaml(path, remedy=_REMEDY)
    entries = content.get("icl_tasks") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise UsageError(f"{path} has no list icl_tasks: {_REMEDY}")
    return entries


def _baselines(path: Path) -> dict[str, float]:
    baselines = {}
    for row in read_csv(path, remedy=_REMEDY):
        label, text = row.get("Eval Task"), row.get("Random baseline")
        try:
            value = float(text or "") / 100
        except ValueError:
            value = -1.0
        if label is None or not 0.0 <= value < 1.0:
            raise UsageError(
                f"{path}: the random baseline of {label} is {text!r}, not a percentage"
            )
        baselines[label] = value
    return baselines


def _items(path: Path, kind: str) -> tuple[dict[str, Any], ...]:
    items = []
    for number, line in enumerate(read_text(path, remedy=_REMEDY).split("\n"), start=1):
        if line.strip():
            with understanding(f"{path}: line {number}", _REMEDY, f"not an item of type {kind}"):
                items.append(_item(parse_json(line), kind))
    return tuple(items)


def _item(entry: dict[str, Any], kind: str) -> dict[str, Any]:
    texts, options = _FIELDS[kind]
    item: dict[str, Any] = {field: _text(entry[field]) for field in texts}
    if options is not None:
        if not isinstance(entry[options], list):
            raise TypeError("options are no list")
        item[options] = [_text(option) for option in entry[options]]
        item["gold"] = entry["gold"]
        if not isinstance(item["gold"], int) or not 0 <= item["gold"] < len(item[options]):
            raise ValueError("gold is not the index of an option")
    elif not item["continuation"].strip():
        raise ValueError("nothing to predict")
    return item


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError("not a text")
    return str(value)


@dataclass(frozen=True)
class Prompt:
    """One sequence to score.

    Args:
        tokens: of the whole prompt, a BOS token first.
        start: index of the first scored token, >= 1.
    """

    tokens: list[int]
    start: int


def examples_for(items: Sequence[dict[str, Any]], index: int, shots: int) -> list[dict[str, Any]]:
    """The solved examples before item ``index``: drawn without it, reproducibly."""
    if shots == 0:
        return []
    others = [i for i in range(len(items)) if i != index]
    drawn = random.Random(_EXAMPLE_SEED + index).sample(others, shots)
    return [items[i] for i in drawn]


def build_prompts(task: Task, index: int, tokenize: Tokenize, bos: int) -> list[Prompt]:
    """The prompts of one item: one an answer, or a single one of a language modelling task.

    * multiple choice: the same question before every choice; scored is what follows the longest
      common prefix of their tokens, or, if one of them is that prefix, from its last token on.
    * schema: every context before the same continuation; scored is their longest common suffix.
    * language modelling: scored is what the continuation adds to the tokens of the prompt.

    Every prompt has at least one scored token, and one before it.

    Args:
        task: the task.
        index: of the item.
        tokenize: text to tokens, without any special ones.
        bos: token put first.

    Raises:
        ValueError: an item has no text, or the tokens of a language modelling prompt do not begin
            those of the prompt with its continuation.
    """
    item = task.items[index]
    examples = examples_for(task.items, index, task.shots)
    head = "".join(f"{_texts(task, e)[e.get('gold', 0)]}\n\n" for e in examples)
    sequences = [[bos, *tokenize(f"{head}{text}")] for text in _texts(task, item)]
    where = f"item {index} of {task.label}"
    if task.kind == LANGUAGE_MODELING:
        (whole,) = sequences
        question = [bos, *tokenize(f"{head}{item['context'].strip()}{task.delimiter}".strip())]
        if len(question) >= len(whole) or whole[: len(question)] != question:
            raise ValueError(
                f"{where}: the tokens of the prompt do not begin those of the prompt with its "
                "continuation; the tokenizer must not merge across the delimiter"
            )
        return [Prompt(whole, len(question))]
    if min(map(len, sequences)) < 2:
        raise ValueError(f"{where} has an option without any text")
    if task.kind == MULTIPLE_CHOICE:
        start = min(_common_prefix(sequences), min(map(len, sequences)) - 1)
        return [Prompt(tokens, start) for tokens in sequences]
    suffix = _common_prefix([tokens[:0:-1] for tokens in sequences])  # the BOS is never scored
    if suffix == 0:
        raise ValueError(
            f"{where}: the tokens of its options have no common end; the tokenizer must not merge "
            "across the delimiter"
        )
    return [Prompt(tokens, len(tokens) - suffix) for tokens in sequences]


def _texts(task: Task, item: dict[str, Any]) -> list[str]:
    """An item with each of its answers."""
    if task.kind == LANGUAGE_MODELING:
        return [f"{item['context'].strip()}{task.delimiter}{item['continuation']}"]
    if task.kind == MULTIPLE_CHOICE:
        return [f"{item['query']}{task.delimiter}{choice}" for choice in item["choices"]]
    end = f"{task.delimiter}{item['continuation']}"
    return [f"{context}{end}" for context in item["context_options"]]


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    length = 0
    for tokens in zip(*sequences, strict=False):  # as far as the shortest
        if len(set(tokens)) > 1:
            break
        length += 1
    return length
