"""Whether one way of training beats another, said no more strongly than the seeds allow."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from analysis.records import Record

__all__ = ["Comparison", "compare_arms", "headlines", "is_sweep", "mean_interval"]

_CONFIDENCE = 0.95
_MIN_SEEDS = 3  # two give an interval 13 deviations wide
_SAME_BUDGET = 0.02  # largest relative difference of lineage FLOPs

_WORDS = {
    "better": "fewer bits per byte for the same FLOPs",
    "worse": "more bits per byte for the same FLOPs",
    "no difference shown": "no difference beyond chance",
    "too few seeds": f"no conclusion from fewer than {_MIN_SEEDS} seeds",
    "budgets differ": "not comparable, the FLOPs differ by more than 2 %,",
}


@dataclass(frozen=True)
class Comparison:
    """An arm against the baseline at one depth, paired by seed.

    Args:
        depth: of both.
        arm: compared.
        baseline: compared with.
        seeds: that both have.
        difference: mean bits per byte, arm minus baseline; negative if the arm is better.
        interval: 95 % t interval of the mean; ``None`` below 2 seeds.
        flops_ratio: mean lineage FLOPs, arm over baseline.
        conclusion: "better", "worse", "no difference shown", "too few seeds" or "budgets differ".
    """

    depth: int
    arm: str
    baseline: str
    seeds: int
    difference: float
    interval: tuple[float, float] | None
    flops_ratio: float
    conclusion: str

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps."""
        return asdict(self)


def mean_interval(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean of independent values and its 95 % t interval, ``None`` for a single value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.ppf(0.5 + _CONFIDENCE / 2, len(values) - 1)) * error
    return mean, (mean - half, mean + half)


def is_sweep(models: Sequence[Record]) -> bool:
    """Whether an arm has several models of one depth and seed, which differ by their budgets."""
    return len({(r.depth, r.seed) for r in models}) < len(models)


def compare_arms(records: Sequence[Record], baseline: str = "scratch") -> list[Comparison]:
    """Compare every arm with the baseline wherever both trained a model of the same depth.

    Sweeps are left out: which of their models to compare would be a choice.

    Args:
        records: of one or more seeds.
        baseline: the arm compared with.
    """
    arms = dict.fromkeys(r.arm for r in records)
    single = [arm for arm in arms if not is_sweep([r for r in records if r.arm == arm])]
    found = {(r.arm, r.depth, r.seed): r for r in records if r.arm in single}
    comparisons = []
    for arm in single:
        if arm == baseline:
            continue
        for depth in sorted({r.depth for r in records if r.arm == arm}):
            pairs = [
                (record, found[baseline, depth, seed])
                for (a, d, seed), record in found.items()
                if (a, d) == (arm, depth) and (baseline, depth, seed) in found
            ]
            if pairs:
                comparisons.append(_compare(arm, baseline, depth, pairs))
    return comparisons


def _compare(
    arm: str, baseline: str, depth: int, pairs: Sequence[tuple[Record, Record]]
) -> Comparison:
    difference, interval = mean_interval([ours.val_bpb - theirs.val_bpb for ours, theirs in pairs])
    ratio = float(np.mean([o.lineage_flops / t.lineage_flops for o, t in pairs]))
    if abs(ratio - 1.0) > _SAME_BUDGET:
        conclusion = "budgets differ"
    elif len(pairs) < _MIN_SEEDS or interval is None:
        conclusion = "too few seeds"
    elif interval[0] <= 0.0 <= interval[1]:
        conclusion = "no difference shown"
    else:
        conclusion = "better" if difference < 0 else "worse"
    return Comparison(depth, arm, baseline, len(pairs), difference, interval, ratio, conclusion)


def headlines(comparisons: Sequence[Comparison]) -> list[str]:
    """The result in a sentence an arm; that nothing was gained is said first.

    Args:
        comparisons: of `compare_arms`.
    """
    if not comparisons:
        return ["There is nothing to compare: no two arms trained a model of the same depth."]
    lines = []
    for arm in dict.fromkeys(c.arm for c in comparisons):
        ours = [c for c in comparisons if c.arm == arm]
        parts = []
        for conclusion, words in _WORDS.items():
            depths = ", ".join(f"d{c.depth}" for c in ours if c.conclusion == conclusion)
            if depths:
                parts.append(f"{words} at {depths}")
        conclusions = {c.conclusion for c in ours}
        start = "" if "better" in conclusions else "No benefit shown. "
        if conclusions <= {"too few seeds", "budgets differ"}:
            start = "Nothing is shown either way. "
        lines.append(f"{start}{arm} against {ours[0].baseline}: {'; '.join(parts)}.")
    return lines
