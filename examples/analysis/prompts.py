"""Prompts of the three task types, and where in their tokens the scored part lies."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.bundle import LANGUAGE_MODELING, MULTIPLE_CHOICE, Task

__all__ = ["Prompt", "Tokenize", "build_prompts", "examples_for"]

Tokenize = Callable[[str], Sequence[int]]

_EXAMPLE_SEED = 1234  # plus the item's index


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
    item, examples = task.items[index], examples_for(task.items, index, task.shots)
    if task.kind == LANGUAGE_MODELING:
        head = "".join(
            f"{example['context'].strip()}{task.delimiter}{example['continuation']}\n\n"
            for example in examples
        )
        question = f"{head}{item['context'].strip()}{task.delimiter}"
        without = [bos, *tokenize(question.strip())]
        whole = [bos, *tokenize(question + item["continuation"])]
        if len(without) >= len(whole) or whole[: len(without)] != without:
            raise ValueError(
                f"item {index} of {task.label}: the tokens of the prompt do not begin those of the "
                "prompt with its continuation; the tokenizer must not merge across the delimiter"
            )
        return [Prompt(whole, len(without))]
    if task.kind == MULTIPLE_CHOICE:
        head = "".join(
            f"{example['query']}{task.delimiter}{example['choices'][example['gold']]}\n\n"
            for example in examples
        )
        texts = [f"{head}{item['query']}{task.delimiter}{choice}" for choice in item["choices"]]
        sequences = _scorable(task, index, [[bos, *tokenize(text)] for text in texts])
        start = min(_common_prefix(sequences), min(map(len, sequences)) - 1)
        return [Prompt(tokens, start) for tokens in sequences]
    head = "".join(
        f"{example['context_options'][example['gold']]}{task.delimiter}{example['continuation']}\n\n"
        for example in examples
    )
    end = f"{task.delimiter}{item['continuation']}"
    texts = [f"{head}{context}{end}" for context in item["context_options"]]
    sequences = _scorable(task, index, [[bos, *tokenize(text)] for text in texts])
    suffix = _common_prefix([tokens[:0:-1] for tokens in sequences])  # the BOS is never scored
    if suffix == 0:
        raise ValueError(
            f"item {index} of {task.label}: the tokens of its options have no common end; the "
            "tokenizer must not merge across the delimiter"
        )
    return [Prompt(tokens, len(tokens) - suffix) for tokens in sequences]


def _scorable(task: Task, index: int, sequences: list[list[int]]) -> list[list[int]]:
    if min(map(len, sequences)) < 2:
        raise ValueError(f"item {index} of {task.label} has an option without any text")
    return sequences


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    length = 0
    for tokens in zip(*sequences, strict=False):  # as far as the shortest
        if len(set(tokens)) > 1:
            break
        length += 1
    return length
