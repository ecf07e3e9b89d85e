"""Which ways of training are compared, and what may be said of them: no more than seeds allow.

Every arm is compared with the tuned model from scratch. What was added to an arm is compared with
the arm without it: the controller with the same arm uncontrolled, a penalty with plain growing.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from analysis.records import Record
from common.errors import UsageError
from common.statistics import MIN_SEEDS, Estimate, Interval
from trainer.arms import Arm, parse_arm

__all__ = [
    "QUESTIONS", "Comparison", "Pairing", "compare_arms", "count_seeds", "drawn_word", "headlines",
    "is_sweep", "paired_records", "pairings", "read_arm", "single_arms", "without_strengths",
]  # fmt: skip

# Question -> its words, in the order of the report.
QUESTIONS = {
    "inheriting": "Does inheriting beat training from scratch at equal FLOPs?",
    "penalty": "Do the penalties add anything to plain growing?",
    "controller": "Does the controller add anything?",
    "muon": "Does growing with AdamW beat Muon from scratch?",
    "control": "How far is the other optimizer from tuned AdamW, both from scratch?",
}

_MUON = (("muon", None),)
_SAME_BUDGET = 0.02  # largest relative difference of lineage FLOPs

_WORDS = {
    "better": "fewer bits per byte",
    "worse": "more bits per byte",
    "no difference shown": "no difference beyond chance",
    "too few seeds": f"no conclusion from fewer than {MIN_SEEDS} seeds",
    "budgets differ": "not comparable, the FLOPs differ by more than 2 %",
}


@dataclass(frozen=True)
class Pairing:
    """Two arms to compare.

    Args:
        arm: compared.
        baseline: compared with.
        question: a key of `QUESTIONS`.
        from_scratch: whether the baseline is the model from scratch that every arm is held against.
    """

    arm: str
    baseline: str
    question: str
    from_scratch: bool


def read_arm(word: str) -> Arm | None:
    """The parts of an arm, ``None`` for a word that is none of the trainer's."""
    try:
        return parse_arm(word)
    except UsageError:
        return None


def drawn_word(arm: str) -> str:
    """The word of an arm, in which matplotlib sees no formula and nothing to hide."""
    return arm.replace("$", r"\$").replace("_", "\u200b_", arm.startswith("_"))


def without_strengths(word: str) -> str:
    """The arm without the strengths in its word.

    Example:
        >>> without_strengths("grown+ewc=0.5+subspace=0.05+ars")
        'grown+ewc+subspace+ars'
    """
    arm = read_arm(word)
    if arm is None:
        return word
    return Arm(arm.grown, tuple((part, None) for part, _ in arm.parts), arm.controller).name


def is_sweep(models: Sequence[Record]) -> bool:
    """Whether an arm has several models of one depth and seed, which differ by their budgets."""
    return len({(r.depth, r.seed) for r in models}) < len(models)


def single_arms(records: Sequence[Record]) -> list[str]:
    """The arms in the order of the records, sweeps left out: which model would be a choice."""
    arms = dict.fromkeys(r.arm for r in records)
    return [arm for arm in arms if not is_sweep([r for r in records if r.arm == arm])]


def pairings(records: Sequence[Record]) -> list[Pairing]:
    """The comparisons that a set of records allows, grouped by question.

    Args:
        records: of one or more seeds.
    """
    arms = single_arms(records)
    found = [pairing for arm in arms for pairing in _of(arm, arms)]
    order = list(QUESTIONS)
    return sorted(found, key=lambda pairing: order.index(pairing.question))


def _of(word: str, arms: Sequence[str]) -> list[Pairing]:
    arm = read_arm(word)
    wanted: list[tuple[Arm, str]] = []
    scratch = Arm(False, (), None)
    if scratch.name not in arms and arm is not None:
        scratch = Arm(False, (), arm.controller)
    if arm is None:
        wanted.append((scratch, "inheriting"))
    else:
        question = "control" if arm.parts else "controller"
        wanted.append((scratch, "inheriting" if arm.grown else question))
        if arm.controller is not None:
            wanted.append((Arm(arm.grown, arm.parts, None), "controller"))
        if arm.grown and arm.parts:
            wanted.append((Arm(True, (), arm.controller), "penalty"))
        if arm.grown and not arm.parts:
            wanted.append((Arm(False, _MUON, arm.controller), "muon"))
    baselines: dict[str, Pairing] = {}
    for baseline, question in wanted:
        name = baseline.name
        if name != word and name in arms:
            baselines.setdefault(name, Pairing(word, name, question, baseline == scratch))
    return list(baselines.values())


def paired_records(
    records: Sequence[Record],
) -> Iterator[tuple[Pairing, int, list[tuple[Record, Record]]]]:
    """Every pairing and depth with the models of the seeds that both arms have, arm first.

    Args:
        records: of one or more seeds.
    """
    found = {(r.arm, r.depth, r.seed): r for r in records}
    for pairing in pairings(records):
        for depth in sorted({r.depth for r in records if r.arm == pairing.arm}):
            pairs = [
                (record, found[pairing.baseline, depth, seed])
                for (a, d, seed), record in found.items()
                if (a, d) == (pairing.arm, depth) and (pairing.baseline, depth, seed) in found
            ]
            if pairs:
                yield pairing, depth, pairs


@dataclass(frozen=True)
class Comparison:
    """An arm against a baseline at one depth, paired by seed.

    Args:
        depth: of both.
        arm: compared.
        baseline: compared with.
        question: that this answers, a key of `QUESTIONS`.
        seeds: that both have.
        difference: mean bits per byte, arm minus baseline; negative if the arm is better, no number
            if either diverged in some seed: the mean of the others would flatter it.
        interval: 95 % t interval of the mean; ``None`` below 2 seeds or without a mean.
        flops_ratio: mean lineage FLOPs, arm over baseline.
        conclusion: "better", "worse", "no difference shown", "too few seeds", "budgets differ", or
            in how many seeds the arm or the baseline diverged.
    """

    depth: int
    arm: str
    baseline: str
    question: str
    seeds: int
    difference: float
    interval: Interval | None
    flops_ratio: float
    conclusion: str

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps, which has no word for a difference that is no number."""
        difference = self.difference if math.isfinite(self.difference) else None
        return {**asdict(self), "difference": difference}


def compare_arms(records: Sequence[Record]) -> list[Comparison]:
    """Compare arms wherever both trained a model of the same depth.

    Args:
        records: of one or more seeds.
    """
    return [_compare(*found) for found in paired_records(records)]


def _compare(pairing: Pairing, depth: int, pairs: Sequence[tuple[Record, Record]]) -> Comparison:
    ratio = float(np.mean([o.lineage_flops / t.lineage_flops for o, t in pairs]))
    difference = Estimate.of([o.val_bpb - t.val_bpb for o, t in pairs])
    diverged = _diverged(pairing, pairs)
    if diverged:
        difference = Estimate(math.nan, None, difference.values)
        conclusion = diverged
    elif abs(ratio - 1.0) > _SAME_BUDGET:
        conclusion = "budgets differ"
    elif difference.known is None:
        conclusion = "too few seeds"
    elif difference.known[0] <= 0.0 <= difference.known[1]:
        conclusion = "no difference shown"
    else:
        conclusion = "better" if difference.mean < 0 else "worse"
    return Comparison(
        depth=depth,
        arm=pairing.arm,
        baseline=pairing.baseline,
        question=pairing.question,
        seeds=len(pairs),
        difference=difference.mean,
        interval=difference.interval,
        flops_ratio=ratio,
        conclusion=conclusion,
    )


def _diverged(pairing: Pairing, pairs: Sequence[tuple[Record, Record]]) -> str:
    """In how many seeds the arm or the baseline diverged, in words; empty if in none."""
    seeds = count_seeds(len(pairs))
    counts = {
        "": sum(ours.diverged for ours, _ in pairs),
        f"{pairing.baseline} ": sum(theirs.diverged for _, theirs in pairs),
    }
    return ", ".join(f"{who}diverged in {n} of {seeds}" for who, n in counts.items() if n)


def headlines(comparisons: Sequence[Comparison]) -> list[str]:
    """The result in a sentence a question; that nothing was gained is said first.

    Args:
        comparisons: of `compare_arms`.
    """
    if not comparisons:
        return ["There is nothing to compare: no two arms trained a model of the same depth."]
    lines = []
    for question, words in QUESTIONS.items():
        ours = [c for c in comparisons if c.question == question]
        if ours:
            lines.append(f"{words} {_answer(ours)}")
    return lines


def _answer(comparisons: Sequence[Comparison]) -> str:
    parts = []
    for conclusion in dict.fromkeys([*_WORDS, *(c.conclusion for c in comparisons)]):
        words = _WORDS.get(conclusion, conclusion)
        depths: dict[str, list[str]] = {}
        for c in comparisons:
            if c.conclusion == conclusion:
                depths.setdefault(c.arm, []).append(f"d{c.depth}")
        arms: dict[str, list[str]] = {}
        for arm, found in depths.items():
            arms.setdefault(", ".join(found), []).append(arm)
        if arms:
            groups = [f"{_names(names)} at {where}" for where, names in arms.items()]
            parts.append(f"{words}: {'; '.join(groups)}")
    conclusions = {c.conclusion for c in comparisons}
    start = "" if "better" in conclusions else "No benefit shown. "
    if conclusions <= {"too few seeds", "budgets differ"}:
        start = "Nothing is shown either way. "
    text = ". ".join(part[0].upper() + part[1:] for part in parts)
    return f"{start}{text}."


def _names(arms: Sequence[str]) -> str:
    """The arms; those that differ by the strengths of their penalties alone are counted."""
    groups: dict[str, list[str]] = {}
    for arm in arms:
        groups.setdefault(without_strengths(arm), []).append(arm)
    return ", ".join(
        words[0] if len(words) == 1 else f"{method} ({len(words)} strengths)"
        for method, words in groups.items()
    )


def count_seeds(count: int) -> str:
    """The number in words.

    Example:
        >>> count_seeds(1), count_seeds(3)
        ('1 seed', '3 seeds')
    """
    return f"{count} seed{'' if count == 1 else 's'}"
