"""Whether one way of training beats another, said no more strongly than the seeds allow."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from analysis.intervals import MIN_SEEDS, Interval, mean_interval
from analysis.pairings import QUESTIONS, Pairing, pairings, without_strengths
from analysis.records import Record

__all__ = ["Comparison", "compare_arms", "headlines"]

_SAME_BUDGET = 0.02  # largest relative difference of lineage FLOPs

_WORDS = {
    "better": "fewer bits per byte",
    "worse": "more bits per byte",
    "no difference shown": "no difference beyond chance",
    "too few seeds": f"no conclusion from fewer than {MIN_SEEDS} seeds",
    "budgets differ": "not comparable, the FLOPs differ by more than 2 %",
}


@dataclass(frozen=True)
class Comparison:
    """An arm against a baseline at one depth, paired by seed.

    Args:
        depth: of both.
        arm: compared.
        baseline: compared with.
        question: that this answers, a key of `analysis.pairings.QUESTIONS`.
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
    """Compare arms wherever both trained a model of the same depth; see `analysis.pairings`.

    Args:
        records: of one or more seeds.
    """
    found = {(r.arm, r.depth, r.seed): r for r in records}
    comparisons = []
    for pairing in pairings(records):
        for depth in sorted({r.depth for r in records if r.arm == pairing.arm}):
            pairs = [
                (record, found[pairing.baseline, depth, seed])
                for (a, d, seed), record in found.items()
                if (a, d) == (pairing.arm, depth) and (pairing.baseline, depth, seed) in found
            ]
            if pairs:
                comparisons.append(_compare(pairing, depth, pairs))
    return comparisons


def _compare(pairing: Pairing, depth: int, pairs: Sequence[tuple[Record, Record]]) -> Comparison:
    ratio = float(np.mean([o.lineage_flops / t.lineage_flops for o, t in pairs]))
    difference, interval = math.nan, None
    diverged = _diverged(pairing, pairs)
    if not diverged:
        difference, interval = mean_interval([o.val_bpb - t.val_bpb for o, t in pairs])
    if diverged:
        conclusion = diverged
    elif abs(ratio - 1.0) > _SAME_BUDGET:
        conclusion = "budgets differ"
    elif len(pairs) < MIN_SEEDS or interval is None:
        conclusion = "too few seeds"
    elif interval[0] <= 0.0 <= interval[1]:
        conclusion = "no difference shown"
    else:
        conclusion = "better" if difference < 0 else "worse"
    return Comparison(
        depth=depth,
        arm=pairing.arm,
        baseline=pairing.baseline,
        question=pairing.question,
        seeds=len(pairs),
        difference=difference,
        interval=interval,
        flops_ratio=ratio,
        conclusion=conclusion,
    )


def _diverged(pairing: Pairing, pairs: Sequence[tuple[Record, Record]]) -> str:
    """In how many seeds the arm or the baseline diverged, in words; empty if in none."""
    seeds = f"{len(pairs)} seed{'s' if len(pairs) > 1 else ''}"
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
