"""What reaching the baseline's loss costs another arm, with and without its parents' share.

Two losses to reach, of which neither alone is fair to both sides:

* ``final``: the baseline's at the end of its cooled branch. The arm is not cooled on the way there,
  so its ratio is an upper bound of what it would need if it had been cooled earlier.
* ``trunk``: the worse of the two losses at the ends of the constant-rate trunks, which both models
  reached uncooled: like against like.

A grown model starts where its parent's trunk ended, so a loss may be reached before it is there:
the curve is that of the lineage, the ancestors' trunks followed by the model's own log. Reached
within an ancestor's trunk a loss costs the model itself nothing.

The transfer efficiency e says how many fresh tokens an inherited one was worth, trunk against
trunk: the baseline's tokens to that loss are the arm's own and e times the inherited ones, those
of the lineage alone where the loss was reached within it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from analysis.intervals import Estimate
from analysis.pairings import Pairing, pairings
from analysis.records import Log, Record

__all__ = ["Point", "Ratios", "Saving", "find_savings", "measured_rows", "reach", "trunk_of"]

_Four = tuple[float, float, float, float]  # of one seed, in the order of `Ratios`


@dataclass(frozen=True)
class Point:
    """Where a curve reached a loss.

    Args:
        flops: of the lineage so far.
        tokens: of the lineage so far.
        is_bound: whether it may have been reached earlier, before the first measurement.
    """

    flops: float
    tokens: float
    is_bound: bool = False


@dataclass(frozen=True)
class Ratios:
    """The arm's cost over the whole cost of the baseline.

    Args:
        with_parents: operations, the arm's whole lineage counted.
        without_parents: operations, its Fisher pass, growth and own training alone.
        tokens_with_parents: tokens of the lineage.
        tokens_without_parents: its own tokens alone.
        is_bound: whether the true values may be smaller, since in some seed the loss was reached
            before the first measurement or in an ancestor without a log.
    """

    with_parents: Estimate
    without_parents: Estimate
    tokens_with_parents: Estimate
    tokens_without_parents: Estimate
    is_bound: bool = False


@dataclass(frozen=True)
class Saving:
    """What an arm needs for the baseline's loss at one depth, paired by seed.

    Args:
        depth: of both models.
        arm: compared.
        baseline: compared with.
        seeds: that both have, with logs.
        reached: seeds of these in which the arm reached the baseline's final loss.
        final: cost of that loss; ``None`` unless all reached it.
        trunk: cost of the worse of the two trunks' losses; ``None`` if some log has no trunk, or
            the baseline reached it before its first measurement.
        efficiency: e; ``None`` without ``trunk``, where that is a bound, or for an arm without
            parents.
        ancestors: of the arm's model.
        diverged: seeds in which the model or the baseline diverged; with any, nothing is estimated.
    """

    depth: int
    arm: str
    baseline: str
    seeds: int
    reached: int
    final: Ratios | None
    trunk: Ratios | None
    efficiency: Estimate | None
    ancestors: int = 0
    diverged: int = 0

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps."""
        return asdict(self)


def reach(log: Log, level: float) -> Point | None:
    """Where a logged validation loss first was at or below a level.

    Between two measurements the loss is taken as linear in the logarithm of the operations, the
    tokens as linear in the operations.

    Args:
        log: rows with "flops" and "tokens" of the lineage and, now and then, "val_bpb".
        level: bits per byte.

    Returns:
        The place, a bound if the first measurement is there already; ``None`` if the level was
        never reached.
    """
    before: dict[str, Any] | None = None
    for row in measured_rows(log):
        if row["val_bpb"] <= level:
            if before is None:
                return Point(row["flops"], row["tokens"], is_bound=True)
            if row["flops"] <= before["flops"]:  # growth that took no operations
                return Point(row["flops"], row["tokens"])
            share = (before["val_bpb"] - level) / (before["val_bpb"] - row["val_bpb"])
            logs = (1 - share) * math.log(before["flops"]) + share * math.log(row["flops"])
            flops = math.exp(logs)
            way = (flops - before["flops"]) / (row["flops"] - before["flops"])
            return Point(flops, before["tokens"] + way * (row["tokens"] - before["tokens"]))
        before = row
    return None


def trunk_of(log: Log) -> Log:
    """The rows up to the end of the trunk; empty where the log has no learning rates.

    The first step of the cooled branch still has the trunk's rate.
    """
    rates = [(row["lr"], row["step"]) for row in log if row.get("lr") is not None]
    if not rates:
        return []
    peak = max(rate for rate, _ in rates)
    end = max(step for rate, step in rates if rate == peak) - 1
    return [row for row in log if row["step"] <= end]


def find_savings(records: Sequence[Record], logs: Mapping[tuple[str, int], Log]) -> list[Saving]:
    """Hold every arm against the model from scratch of the same depth, where both have logs.

    Losses are those of the logs, measured on the same bytes.

    Args:
        records: of one or more seeds.
        logs: by name and seed.
    """
    found = {(r.arm, r.depth, r.seed): r for r in records}
    by_name = {(r.name, r.seed): r for r in records}
    savings = []
    for pairing in pairings(records):
        if not pairing.from_scratch:
            continue
        for depth in sorted({r.depth for r in records if r.arm == pairing.arm}):
            pairs = [
                _Pair(record, found[pairing.baseline, depth, seed], by_name, logs)
                for (a, d, seed), record in found.items()
                if (a, d) == (pairing.arm, depth) and (pairing.baseline, depth, seed) in found
            ]
            known = [pair for pair in pairs if pair.is_known]
            if known:
                savings.append(_summary(depth, pairing, known))
    return savings


class _Pair:
    """An arm's model and the baseline's of one seed, with their logs."""

    def __init__(
        self,
        ours: Record,
        theirs: Record,
        by_name: Mapping[tuple[str, int], Record],
        logs: Mapping[tuple[str, int], Log],
    ) -> None:
        self.ours, self.theirs = ours, theirs
        self.log = logs.get((ours.name, ours.seed), [])
        self.reference = logs.get((theirs.name, theirs.seed), [])
        self.diverged = ours.diverged or theirs.diverged
        logged = measured_rows(self.log) and measured_rows(self.reference)
        self.is_known = self.diverged or (bool(logged) and ours.lineage_tokens is not None)
        self.ancestors, self.before = _ancestors(ours, by_name, logs)
        self.final: _Four | None = None
        self.trunk: _Four | None = None
        self.final_is_bound = self.trunk_is_bound = False
        self.efficiency: float | None = None
        if self.is_known and not self.diverged:
            self._find()

    def _find(self) -> None:
        point = reach([*self.before, *self.log], measured_rows(self.reference)[-1]["val_bpb"])
        if point is not None:
            whole = Point(self.theirs.lineage_flops, self.theirs.tokens)
            self.final, self.final_is_bound = self._ratios(point, whole), point.is_bound
        own, others = (measured_rows(trunk_of(log)) for log in (self.log, self.reference))
        if not own or not others:
            return
        level = max(own[-1]["val_bpb"], others[-1]["val_bpb"])
        point, other = reach([*self.before, *own], level), reach(others, level)
        if point is None or other is None or other.is_bound:
            return
        self.trunk, self.trunk_is_bound = self._ratios(point, other), point.is_bound
        if self._inherited_tokens and not point.is_bound:
            inherited = min(point.tokens, self._inherited_tokens)
            self.efficiency = (other.tokens - (point.tokens - inherited)) / inherited

    @property
    def _inherited_tokens(self) -> int:
        whole = self.ours.lineage_tokens
        return 0 if whole is None else whole - self.ours.tokens

    def _ratios(self, point: Point, other: Point) -> _Four:
        # What was there before the arm's Fisher pass and growth belongs to the parents.
        own = max(0.0, point.flops - (self.ours.lineage_flops - self.ours.own_flops))
        own_tokens = max(0.0, point.tokens - self._inherited_tokens)
        return (
            point.flops / other.flops,
            own / other.flops,
            point.tokens / other.tokens,
            own_tokens / other.tokens,
        )


def _ancestors(
    record: Record,
    by_name: Mapping[tuple[str, int], Record],
    logs: Mapping[tuple[str, int], Log],
) -> tuple[int, Log]:
    """Number of ancestors, and what their trunks measured, from the oldest on.

    Each counts up to where its child was grown out of it. Before one without a log nothing is
    known.
    """
    count, complete = 0, True
    rows: Log = []
    while record.parent is not None and (record.parent, record.seed) in by_name:
        start = record.lineage_flops - record.own_flops
        record = by_name[record.parent, record.seed]
        log = measured_rows(logs.get((record.name, record.seed), []))
        trunk = [row for row in log if row["flops"] <= start]
        complete = complete and bool(trunk)
        if complete:
            rows = [*trunk, *rows]
        count += 1
    return count, rows


def measured_rows(log: Log) -> Log:
    """Rows with a validation loss, those before the first operation left out."""
    return [
        row for row in log
        if row["val_bpb"] is not None and math.isfinite(row["val_bpb"]) and row["flops"]
    ]  # fmt: skip


def _summary(depth: int, pairing: Pairing, pairs: Sequence[_Pair]) -> Saving:
    def ratios(found: Sequence[_Four | None], is_bound: bool) -> Ratios | None:
        whole = [values for values in found if values is not None]
        if len(whole) < len(found):
            return None
        flops, own_flops, tokens, own_tokens = (
            Estimate.of(column) for column in zip(*whole, strict=True)
        )
        return Ratios(flops, own_flops, tokens, own_tokens, is_bound)

    worth = [pair.efficiency for pair in pairs if pair.efficiency is not None]
    return Saving(
        depth=depth,
        arm=pairing.arm,
        baseline=pairing.baseline,
        seeds=len(pairs),
        reached=sum(pair.final is not None for pair in pairs),
        final=ratios([p.final for p in pairs], any(p.final_is_bound for p in pairs)),
        trunk=ratios([p.trunk for p in pairs], any(p.trunk_is_bound for p in pairs)),
        efficiency=Estimate.of(worth) if len(worth) == len(pairs) else None,
        ancestors=max(pair.ancestors for pair in pairs),
        diverged=sum(pair.diverged for pair in pairs),
    )
