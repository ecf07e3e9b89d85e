"""What reaching the baseline's loss costs another arm, with and without its parents' share."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from analysis.records import Log, Record
from analysis.verdict import is_sweep, mean_interval

__all__ = ["Saving", "find_savings", "flops_to_reach"]

Pair = tuple[float, float]


@dataclass(frozen=True)
class Saving:
    """Operations to the baseline's final loss over the operations of the baseline, at one depth.

    Args:
        depth: of both models.
        arm: compared.
        baseline: compared with.
        seeds: that both have, with logs.
        reached: seeds of these in which the arm reached the baseline's loss.
        with_parents: mean ratio, the arm's whole lineage counted; ``None`` unless all reached it.
        with_parents_interval: its 95 % t interval; ``None`` below 2 seeds.
        without_parents: mean ratio, its Fisher pass and its own training alone counted.
        without_parents_interval: its 95 % t interval.
    """

    depth: int
    arm: str
    baseline: str
    seeds: int
    reached: int
    with_parents: float | None
    with_parents_interval: Pair | None
    without_parents: float | None
    without_parents_interval: Pair | None

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps."""
        return asdict(self)


def flops_to_reach(log: Log, level: float) -> float | None:
    """Operations at which a logged validation loss first was at or below a level.

    Between two measurements the loss is taken as linear in the logarithm of the operations. A model
    is not cooled down on the way, so an arm with a cooled end is not flattered.

    Args:
        log: rows with "flops" of the lineage and, now and then, "val_bpb".
        level: bits per byte.

    Returns:
        The operations, ``None`` if the level was never reached.
    """
    before: Pair | None = None
    for row in log:
        flops, bpb = row["flops"], row["val_bpb"]
        if bpb is None or not flops:
            continue
        if bpb <= level:
            if before is None:
                return float(flops)
            share = (before[1] - level) / (before[1] - bpb)
            return float(math.exp((1 - share) * math.log(before[0]) + share * math.log(flops)))
        before = (float(flops), float(bpb))
    return None


def find_savings(
    records: Sequence[Record], logs: Mapping[tuple[str, int], Log], baseline: str = "scratch"
) -> list[Saving]:
    """Compare every arm with the baseline wherever both have logs of a model of the same depth.

    Both losses are those of the logs, measured on the same bytes.

    Args:
        records: of one or more seeds.
        logs: by name and seed.
        baseline: the arm compared with.
    """
    arms = dict.fromkeys(r.arm for r in records)
    single = [arm for arm in arms if not is_sweep([r for r in records if r.arm == arm])]
    found = {(r.arm, r.depth, r.seed): r for r in records if r.arm in single}
    savings = []
    for arm in single:
        if arm == baseline:
            continue
        for depth in sorted({r.depth for r in records if r.arm == arm}):
            ratios = [
                _ratios(record, found[baseline, depth, seed], logs)
                for (a, d, seed), record in found.items()
                if (a, d) == (arm, depth) and (baseline, depth, seed) in found
            ]
            known = [pair for pair in ratios if pair != ()]
            if known:
                savings.append(_summary(depth, arm, baseline, known))
    return savings


def _ratios(
    ours: Record, theirs: Record, logs: Mapping[tuple[str, int], Log]
) -> Pair | tuple[()] | None:
    """With and without parents; ``None`` if not reached, empty if a log or its loss is missing."""
    log, reference = logs.get((ours.name, ours.seed)), logs.get((theirs.name, theirs.seed))
    measured = [row["val_bpb"] for row in reference or [] if row["val_bpb"] is not None]
    if not log or not measured:
        return ()
    flops = flops_to_reach(log, measured[-1])
    if flops is None:
        return None
    parents = ours.lineage_flops - ours.flops - ours.fisher_flops
    return flops / theirs.lineage_flops, (flops - parents) / theirs.lineage_flops


def _summary(
    depth: int, arm: str, baseline: str, known: Sequence[Pair | tuple[()] | None]
) -> Saving:
    reached = [pair for pair in known if pair]
    if len(reached) < len(known):
        return Saving(depth, arm, baseline, len(known), len(reached), None, None, None, None)
    whole, whole_interval = mean_interval([pair[0] for pair in reached])
    own, own_interval = mean_interval([pair[1] for pair in reached])
    count = len(known)
    return Saving(depth, arm, baseline, count, count, whole, whole_interval, own, own_interval)
