r"""CORE, the mean centred accuracy of 22 tasks, by the algorithm of DCLM and nanochat.

The items of a task are shuffled with seed 1337 (and cut, if asked) before anything is drawn. Item i
gets its k solved examples from the others with seed 1234 + i. A model answers with the option whose
scored tokens have the least mean loss (the first of equals), or, in language modelling, answers
rightly if the greedy choice at every scored position is the token that follows. Options are scored
from where their tokens part. If one option begins all others, nothing of it is left to score there:
nanochat takes the mean of no number, and so the first option, whatever the model. Here the last
token of that option is scored for all of them; `TaskResult.nested` counts such items.

    centred = (accuracy - baseline) / (1 - baseline),    CORE = mean of the 22

The baselines of three tasks were corrected in September 2025 (version 2); published numbers such as
0.2565 for GPT-2 XL are version 1. A model that guesses has a CORE about 0.024 lower in version 2.

References:
    Li et al., "DataComp-LM", arXiv:2406.11794. Karpathy, "nanochat",
    github.com/karpathy/nanochat.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from analysis.bundle import (
    LANGUAGE_MODELING,
    MULTIPLE_CHOICE,
    SCHEMA,
    Prompt,
    Task,
    Tokenize,
    build_prompts,
)

__all__ = ["CORE_TASKS", "CoreResult", "TaskResult", "evaluate"]

_SHUFFLE_SEED = 1337
_NO_NUMBER = "the model's predictions are not numbers: it has diverged, so leave it out"

# Label -> type, examples, baseline of version 1 and of version 2.
CORE_TASKS: dict[str, tuple[str, int, float, float]] = {
    "hellaswag_zeroshot": (MULTIPLE_CHOICE, 0, 0.25, 0.25),
    "jeopardy": (LANGUAGE_MODELING, 10, 0.0, 0.0),
    "bigbench_qa_wikidata": (LANGUAGE_MODELING, 10, 0.0, 0.0),
    "arc_easy": (MULTIPLE_CHOICE, 10, 0.25, 0.25),
    "arc_challenge": (MULTIPLE_CHOICE, 10, 0.25, 0.25),
    "copa": (MULTIPLE_CHOICE, 0, 0.5, 0.5),
    "commonsense_qa": (MULTIPLE_CHOICE, 10, 0.2, 0.403),
    "piqa": (MULTIPLE_CHOICE, 10, 0.5, 0.5),
    "openbook_qa": (MULTIPLE_CHOICE, 0, 0.25, 0.25),
    "lambada_openai": (LANGUAGE_MODELING, 0, 0.0, 0.0),
    "hellaswag": (MULTIPLE_CHOICE, 10, 0.25, 0.25),
    "winograd": (SCHEMA, 0, 0.5, 0.5),
    "winogrande": (SCHEMA, 0, 0.5, 0.5),
    "bigbench_dyck_languages": (LANGUAGE_MODELING, 10, 0.0, 0.0),
    "agi_eval_lsat_ar": (MULTIPLE_CHOICE, 3, 0.2, 0.25),
    "bigbench_cs_algorithms": (LANGUAGE_MODELING, 10, 0.0, 0.0),
    "bigbench_operators": (LANGUAGE_MODELING, 10, 0.0, 0.0),
    "bigbench_repeat_copy_logic": (LANGUAGE_MODELING, 10, 0.0, 0.0),
    "squad": (LANGUAGE_MODELING, 10, 0.0, 0.0),
    "coqa": (LANGUAGE_MODELING, 0, 0.0, 0.0),
    "boolq": (MULTIPLE_CHOICE, 10, 0.62, 0.62),
    "bigbench_language_identification": (MULTIPLE_CHOICE, 10, 0.091, 0.25),
}


@dataclass(frozen=True)
class TaskResult:
    """Score of one task.

    Args:
        label: of the task.
        items: answered.
        accuracy: share answered rightly.
        centred_v1: accuracy centred on the baseline of version 1 (the bundle's for other tasks).
        centred_v2: the same of version 2.
        standard_error_v1: binomial, of ``centred_v1``.
        standard_error_v2: binomial, of ``centred_v2``.
        cropped: items whose prompt was longer than the model reads and lost its beginning.
        cut: of these, items that lost a part of what is scored.
        nested: items one of whose choices begins all others, which nanochat leaves undecided.
    """

    label: str
    items: int
    accuracy: float
    centred_v1: float
    centred_v2: float
    standard_error_v1: float
    standard_error_v2: float
    cropped: int
    cut: int
    nested: int


@dataclass(frozen=True)
class CoreResult:
    """Scores of all tasks of a bundle.

    Args:
        tasks: in the order of the bundle.
        missing: tasks of CORE that were not evaluated.
        altered: tasks of CORE with another type or number of examples than CORE's.
        max_per_task: items evaluated of each task at most; ``None`` for all.
    """

    tasks: tuple[TaskResult, ...]
    missing: tuple[str, ...]
    altered: tuple[str, ...]
    max_per_task: int | None

    def core(self, version: int) -> tuple[float, float]:
        """CORE and its standard error from the finite number of items.

        Args:
            version: 1 or 2, of the baselines.

        Raises:
            ValueError: a task is missing or altered, or items lost a part of what is scored: the
                mean is then not CORE.
        """
        if version not in (1, 2):
            raise ValueError(f"version must be 1 or 2, got {version}")
        if self.missing:
            raise ValueError(
                f"not CORE: {len(self.missing)} of {len(CORE_TASKS)} tasks are missing "
                f"({', '.join(self.missing)}); give the whole bundle"
            )
        if self.altered:
            raise ValueError(
                f"not CORE: {', '.join(self.altered)} have another type or number of examples; "
                "restore core.yaml"
            )
        chosen = [task for task in self.tasks if task.label in CORE_TASKS]
        if cut := sum(task.cut for task in chosen):
            raise ValueError(
                f"not CORE: {cut} items lost a part of what is scored, since their prompts are "
                "longer than the model reads; train with longer sequences"
            )
        centred = [t.centred_v1 if version == 1 else t.centred_v2 for t in chosen]
        errors = [t.standard_error_v1 if version == 1 else t.standard_error_v2 for t in chosen]
        return sum(centred) / len(chosen), math.hypot(*errors) / len(chosen)

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps; ``core_v1`` and ``core_v2`` are ``None`` where there is no CORE."""
        result: dict[str, Any] = {"core_v1": None, "core_v2": None, "why_not_core": None}
        try:
            for version in (1, 2):
                value, error = self.core(version)
                result[f"core_v{version}"] = {"value": value, "standard_error": error}
        except ValueError as refusal:
            result["why_not_core"] = str(refusal)
        return {
            **result,
            "max_per_task": self.max_per_task,
            "mean_centred_v1": sum(t.centred_v1 for t in self.tasks) / len(self.tasks),
            "mean_centred_v2": sum(t.centred_v2 for t in self.tasks) / len(self.tasks),
            "tasks": [asdict(task) for task in self.tasks],
        }


@torch.no_grad()
def evaluate(
    model: Callable[[Tensor], Tensor],
    tasks: Sequence[Task],
    tokenize: Tokenize,
    *,
    bos: int,
    max_tokens: int | None = None,
    max_per_task: int | None = None,
    device: torch.device | str = "cpu",
    between: Callable[[], None] = lambda: None,
) -> CoreResult:
    """Evaluate a model on the tasks of a bundle.

    Args:
        model: (B, T) int64 tokens -> (B, T, V) logits, causal; an ``nn.Module`` is put in
            evaluation mode for the time.
        tasks: of `analysis.bundle.load_bundle`.
        tokenize: text to tokens, without any special ones.
        bos: token put before every prompt and behind short ones; byte models take 10.
        max_tokens: longest input of the model; longer prompts lose their beginning.
        max_per_task: items of each task at most, examples included.
        device: the model is on.
        between: called before every item; may raise to stop.

    Raises:
        ValueError: ``max_tokens`` is below 2, ``max_per_task`` leaves too few for the examples, the
            tokenizer does not suit an item, or a loss is not a number.
    """
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens must be at least 2, got {max_tokens}")
    was_training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    results = []
    try:
        for task in tasks:
            items = list(task.items)
            random.Random(_SHUFFLE_SEED).shuffle(items)
            task = replace(task, items=tuple(items[:max_per_task]))
            if len(task.items) <= task.shots:
                raise ValueError(
                    f"{len(task.items)} items of {task.label} are too few for {task.shots} "
                    "examples each; raise max_per_task"
                )
            right = cropped = cut = nested = 0
            for index in range(len(task.items)):
                between()
                prompts = build_prompts(task, index, tokenize, bos)
                fitted = [_crop(prompt, max_tokens) for prompt in prompts]
                cropped += any(
                    len(f.tokens) < len(p.tokens) for f, p in zip(fitted, prompts, strict=True)
                )
                cut += any(
                    len(f.tokens) - f.start < len(p.tokens) - p.start
                    for f, p in zip(fitted, prompts, strict=True)
                )
                nested += task.kind == MULTIPLE_CHOICE and _is_nested(prompts)
                right += _is_right(model, task, index, fitted, bos, device)
            results.append(_score(task, right, cropped, cut, nested))
    finally:
        if isinstance(model, nn.Module):
            model.train(was_training)
    found = {task.label: task for task in tasks}
    return CoreResult(
        tasks=tuple(results),
        missing=tuple(label for label in CORE_TASKS if label not in found),
        altered=tuple(
            label
            for label, (kind, shots, *_) in CORE_TASKS.items()
            if label in found and (found[label].kind, found[label].shots) != (kind, shots)
        ),
        max_per_task=max_per_task,
    )


def _crop(prompt: Prompt, max_tokens: int | None) -> Prompt:
    surplus = 0 if max_tokens is None else max(0, len(prompt.tokens) - max_tokens)
    # A token can only be scored if another stands before it.
    return Prompt(prompt.tokens[surplus:], max(1, prompt.start - surplus))


def _is_nested(prompts: Sequence[Prompt]) -> bool:
    shortest = min((prompt.tokens for prompt in prompts), key=len)
    return all(prompt.tokens[: len(shortest)] == shortest for prompt in prompts)


def _is_right(
    model: Callable[[Tensor], Tensor],
    task: Task,
    index: int,
    prompts: Sequence[Prompt],
    bos: int,
    device: torch.device | str,
) -> bool:
    longest = max(len(prompt.tokens) for prompt in prompts)
    rows = [prompt.tokens + [bos] * (longest - len(prompt.tokens)) for prompt in prompts]
    tokens = torch.tensor(rows, dtype=torch.int64, device=device)  # (B, T)
    logits = model(tokens)[:, :-1].float()  # (B, T - 1, V): what follows each token
    targets = tokens[:, 1:]
    if task.kind == LANGUAGE_MODELING:
        (prompt,) = prompts
        scored = slice(prompt.start - 1, None)
        if bool(logits[0, scored].isnan().any()):
            raise ValueError(_NO_NUMBER)
        return bool((logits.argmax(dim=-1)[0, scored] == targets[0, scored]).all())
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    means = [
        losses[i, prompt.start - 1 : len(prompt.tokens) - 1].mean().item()
        for i, prompt in enumerate(prompts)
    ]
    if any(map(math.isnan, means)):
        raise ValueError(_NO_NUMBER)
    best = min(range(len(means)), key=means.__getitem__)
    return best == int(task.items[index]["gold"])


def _score(task: Task, right: int, cropped: int, cut: int, nested: int) -> TaskResult:
    count = len(task.items)
    accuracy = right / count
    error = math.sqrt(accuracy * (1 - accuracy) / count)
    _, _, v1, v2 = CORE_TASKS.get(task.label, (task.kind, 0, task.baseline, task.baseline))
    return TaskResult(
        label=task.label,
        items=count,
        accuracy=accuracy,
        centred_v1=(accuracy - v1) / (1 - v1),
        centred_v2=(accuracy - v2) / (1 - v2),
        standard_error_v1=error / (1 - v1),
        standard_error_v2=error / (1 - v2),
        cropped=cropped,
        cut=cut,
        nested=nested,
    )
