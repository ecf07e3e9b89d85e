"""Which ways of training are compared, and what may be said of them: no more than seeds allow.

A grown model is held against its twin, the model from scratch of its size with the same optimizer
and controller; it has its share of the twin's steps, so the operations that both took are said too.
What was added to an arm is compared with the arm without it, at the same share: the controller with
the same arm uncontrolled, a penalty or a teacher with plain growing, Muon with AdamW.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from analysis.records import Record, sizes_of, without_nan
from common.errors import UsageError
from common.statistics import MIN_SEEDS, Estimate, Interval, count_seeds
from trainer.arms import Arm, parse_arm

__all__ = [
    "PLAIN", "QUESTIONS", "Comparison", "Pairing", "compare_arms", "drawn_word", "headlines",
    "paired_records", "pairings", "read_arm", "twin_of", "without_strengths",
]  # fmt: skip

# Question -> its words, in the order of the report.
QUESTIONS = {
    "inheriting": "Is a grown model better than its twin from scratch, which takes more steps?",
    "penalty": "Do penalties or a teacher add anything to plain growing?",
    "controller": "Does the controller add anything?",
    "muon": "Does growing with AdamW beat Muon from scratch, which takes more steps?",
    "optimizer": "How far is Muon from AdamW?",
}

PLAIN = Arm(False, (), None).name  # AdamW, from scratch
_MUON = (("muon", None),)
_OTHER_SHARES = ("inheriting", "muon")  # questions in which the baseline takes more steps
_SAME_SHARE = 0.01

_WORDS = {
    "better": "fewer bits per byte",
    "worse": "more bits per byte",
    "no difference shown": "no difference beyond chance",
    "too few seeds": f"no conclusion from fewer than {MIN_SEEDS} seeds",
    "shares differ": "not comparable, trained for other shares of the steps",
}


@dataclass(frozen=True)
class Pairing:
    """Two arms to compare.

    Args:
        arm: compared.
        baseline: compared with.
        question: a key of `QUESTIONS`.
    """

    arm: str
    baseline: str
    question: str


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


def twin_of(word: str) -> str:
    """How the twins of an arm are trained: from scratch, with its optimizer and controller.

    Example:
        >>> twin_of("grown+ewc+ars"), twin_of("unheard-of")
        ('scratch+ars', 'scratch')
    """
    arm = read_arm(word)
    return PLAIN if arm is None else arm.root.name


def pairings(records: Sequence[Record]) -> list[Pairing]:
    """The comparisons that a set of records allows, grouped by question.

    Args:
        records: of one or more seeds.
    """
    arms = list(dict.fromkeys(r.arm for r in records))
    found = [pairing for arm in arms for pairing in _of(arm, arms)]
    order = list(QUESTIONS)
    return sorted(found, key=lambda pairing: order.index(pairing.question))


def _of(word: str, arms: Sequence[str]) -> list[Pairing]:
    arm = read_arm(word)
    wanted: list[tuple[str, str]] = []
    if arm is None or arm.grown:
        wanted.append((twin_of(word) if twin_of(word) in arms else PLAIN, "inheriting"))
    if arm is not None:
        with_muon = _MUON if arm.has("muon") else ()
        if arm.parts != with_muon:
            wanted.append((Arm(arm.grown, with_muon, arm.controller).name, "penalty"))
        if arm.controller is not None:
            wanted.append((Arm(arm.grown, arm.parts, None).name, "controller"))
        if arm.grown and not arm.parts:
            wanted.append((Arm(False, _MUON, arm.controller).name, "muon"))
        if arm.parts == _MUON:
            wanted.append((Arm(arm.grown, (), arm.controller).name, "optimizer"))
    return [Pairing(word, name, question) for name, question in wanted if name in arms]


def paired_records(
    records: Sequence[Record],
) -> Iterator[tuple[Pairing, str, list[tuple[Record, Record]]]]:
    """Every pairing and size with the models of the seeds that both arms have, arm first.

    Args:
        records: of one or more seeds.
    """
    found = {(r.arm, r.size, r.seed): r for r in records}
    sizes = sizes_of(records)
    for pairing in pairings(records):
        for size in sizes:
            pairs = [
                (record, found[pairing.baseline, size, seed])
                for (a, s, seed), record in found.items()
                if (a, s) == (pairing.arm, size) and (pairing.baseline, size, seed) in found
            ]
            if pairs:
                yield pairing, size, pairs


@dataclass(frozen=True)
class Comparison:
    """An arm against a baseline at one size, paired by seed.

    Args:
        size: of both.
        arm: compared.
        baseline: compared with.
        question: that this answers, a key of `QUESTIONS`.
        seeds: that both have.
        difference: mean bits per byte, arm minus baseline; negative if the arm is better, no number
            if either diverged in some seed: the mean of the others would flatter it.
        interval: 95 % t interval of the mean; ``None`` below 2 seeds or without a mean.
        flops_ratio: mean operations, arm over baseline, each with its growth and Fisher pass and
            without its ancestors.
        conclusion: "better", "worse", "no difference shown", "too few seeds", "shares differ", or
            in how many seeds the arm or the baseline diverged.
    """

    size: str
    arm: str
    baseline: str
    question: str
    seeds: int
    difference: float
    interval: Interval | None
    flops_ratio: float
    conclusion: str

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps."""
        found: dict[str, Any] = without_nan(asdict(self))
        return found


def compare_arms(records: Sequence[Record]) -> list[Comparison]:
    """Compare arms wherever both trained a model of the same size.

    Args:
        records: of one or more seeds.
    """
    return [_compare(*found) for found in paired_records(records)]


def _compare(pairing: Pairing, size: str, pairs: Sequence[tuple[Record, Record]]) -> Comparison:
    ratio = float(np.mean([o.own_flops / t.own_flops for o, t in pairs]))
    alike = all(abs(o.share - t.share) <= _SAME_SHARE for o, t in pairs)
    difference = Estimate.of([o.val_bpb - t.val_bpb for o, t in pairs])
    diverged = _diverged(pairing, pairs)
    if diverged:
        difference = Estimate(math.nan, None, difference.values)
        conclusion = diverged
    elif not alike and pairing.question not in _OTHER_SHARES:
        conclusion = "shares differ"
    elif difference.known is None:
        conclusion = "too few seeds"
    elif difference.known[0] <= 0.0 <= difference.known[1]:
        conclusion = "no difference shown"
    else:
        conclusion = "better" if difference.mean < 0 else "worse"
    return Comparison(
        size=size,
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
        return ["There is nothing to compare: no two arms trained a model of the same size."]
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
        sizes: dict[str, list[str]] = {}
        for c in comparisons:
            if c.conclusion == conclusion:
                sizes.setdefault(c.arm, []).append(c.size)
        arms: dict[str, list[str]] = {}
        for arm, found in sizes.items():
            arms.setdefault(", ".join(found), []).append(arm)
        if arms:
            groups = [f"{_names(names)} at {where}" for where, names in arms.items()]
            parts.append(f"{words}: {'; '.join(groups)}")
    conclusions = {c.conclusion for c in comparisons}
    start = "" if "better" in conclusions else "No benefit shown. "
    if conclusions <= {"too few seeds", "shares differ"}:
        start = ""
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
