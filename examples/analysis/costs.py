"""What a series cost, and what reaching the baseline's loss costs another arm.

The cost of each model and of the series so far: operations, seconds, utilisation and money.

The saving of an arm, with and without its parents' share, at two losses, of which neither alone is
fair to both sides:

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
from dataclasses import dataclass

from analysis.comparisons import Pairing, paired_records, read_arm
from analysis.records import Log, Logs, Record, chain
from common.statistics import Estimate

__all__ = [
    "CostAnalyzer", "ModelCost", "Point", "Ratios", "Saving", "find_savings", "measured_rows",
    "reach", "trunk_of",
]  # fmt: skip

_Ratios = tuple[float, float, float, float, bool]  # of one seed, in the order of `Ratios`


@dataclass(frozen=True)
class ModelCost:
    """What one model cost, and its series up to it.

    Args:
        name: of the model.
        arm: the series is of this arm, ancestors of other arms included.
        seed: of the run.
        training_flops: of its own steps.
        overhead_flops: of these, what the arm adds to forward and backward passes (penalties, the
            teacher, Muon's iterations); ``None`` if no plain model of its depth tells.
        fisher_flops: of the Fisher pass on its parent.
        growth_flops: of growing it.
        flops: the three together.
        lineage_flops: of everything that went into it, as the trainer counted.
        devices: that worked at once.
        seconds: measured, on all devices at once.
        flops_per_second: flops / seconds; ``None`` if no time was measured.
        mfu: flops / (seconds x devices x peak); ``None`` without a peak or a time.
        price: seconds x devices x price a device hour; ``None`` without a price.
        cumulative_flops: of the series up to this model.
        cumulative_seconds: of the series up to this model.
        cumulative_price: of the series up to this model.
    """

    name: str
    arm: str
    seed: int
    training_flops: int
    overhead_flops: int | None
    fisher_flops: int
    growth_flops: int
    flops: int
    lineage_flops: int
    devices: int
    seconds: float
    flops_per_second: float | None
    mfu: float | None
    price: float | None
    cumulative_flops: int
    cumulative_seconds: float
    cumulative_price: float | None


class CostAnalyzer:
    """Turns records of training into costs.

    Operations are those of training steps (6 a parameter in matrix products and token, and
    attention), of Fisher passes and of growing; evaluation is not counted.

    Args:
        peak_flops: operations a second of one device, such as one of `PEAK_FLOPS` in
            `trainer.settings`; ``None`` gives no MFU.
        price_per_hour: of one device; ``None`` gives no prices.
        devices: that worked at once; ``None`` for what each record says.

    Raises:
        ValueError: an argument is not positive and finite.
    """

    def __init__(
        self,
        *,
        peak_flops: float | None = None,
        price_per_hour: float | None = None,
        devices: int | None = None,
    ) -> None:
        for name, value in (("peak_flops", peak_flops), ("devices", devices)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if price_per_hour is not None and not 0 <= price_per_hour < math.inf:
            raise ValueError(f"price_per_hour must be >= 0 and finite, got {price_per_hour}")
        self.peak_flops = peak_flops
        self.price_per_hour = price_per_hour
        self.devices = devices

    def analyze(self, records: Sequence[Record]) -> list[ModelCost]:
        """The costs of every arm and seed, each series in the order it was trained.

        An ancestor that belongs to another arm is listed in every series that grew out of it.

        Args:
            records: of one or more runs.

        Raises:
            ValueError: a model did more operations a second than its devices can.
        """
        costs = []
        plain = {r.depth: r.flops / r.tokens for r in records if _adds_nothing(r.arm)}
        for seed in dict.fromkeys(record.seed for record in records):
            for arm in dict.fromkeys(r.arm for r in records if r.seed == seed):
                costs += self._series(chain(records, arm, seed), arm, plain)
        return costs

    def _series(
        self, series: Sequence[Record], arm: str, plain: Mapping[int, float]
    ) -> list[ModelCost]:
        costs = []
        flops, seconds, device_hours = 0, 0.0, 0.0
        for record in series:
            devices = self.devices or record.devices
            hours = record.seconds / 3600 * devices
            flops += record.own_flops
            seconds += record.seconds
            device_hours += hours
            costs.append(
                ModelCost(
                    name=record.name,
                    arm=arm,
                    seed=record.seed,
                    training_flops=record.flops,
                    overhead_flops=_overhead(record, plain),
                    fisher_flops=record.fisher_flops,
                    growth_flops=record.growth_flops,
                    flops=record.own_flops,
                    lineage_flops=record.lineage_flops,
                    devices=devices,
                    seconds=record.seconds,
                    flops_per_second=record.own_flops / record.seconds if record.seconds else None,
                    mfu=self._mfu(record, devices),
                    price=self._price(hours),
                    cumulative_flops=flops,
                    cumulative_seconds=seconds,
                    cumulative_price=self._price(device_hours),
                )
            )
        return costs

    def _price(self, device_hours: float) -> float | None:
        return None if self.price_per_hour is None else device_hours * self.price_per_hour

    def _mfu(self, record: Record, devices: int) -> float | None:
        if self.peak_flops is None or not record.seconds:
            return None
        mfu = record.own_flops / (record.seconds * devices * self.peak_flops)
        if mfu > 1.0:
            raise ValueError(
                f"{record.name} did {mfu:.3g} times the operations that {devices} x "
                f"{self.peak_flops:.3g} a second allow: give the device's true peak, or the number "
                "of devices"
            )
        return mfu


def _adds_nothing(word: str) -> bool:
    arm = read_arm(word)
    return arm is not None and not arm.parts


def _overhead(record: Record, plain: Mapping[int, float]) -> int | None:
    if record.depth not in plain:
        return None
    return max(0, round(record.flops - record.tokens * plain[record.depth]))


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
    before: Mapping[str, float] | None = None
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


def find_savings(records: Sequence[Record], logs: Logs) -> list[Saving]:
    """Hold every arm against the model from scratch of the same depth, where both have logs.

    Losses are those of the logs, measured on the same bytes.

    Args:
        records: of one or more seeds.
        logs: by name and seed.
    """
    by_name = {(r.name, r.seed): r for r in records}
    savings = []
    for pairing, depth, pairs in paired_records(records):
        if pairing.from_scratch:
            known = [p for p in (_Pair(*models, by_name, logs) for models in pairs) if p.is_known]
            if known:
                savings.append(_summary(depth, pairing, known))
    return savings


class _Pair:
    """An arm's model and the baseline's of one seed, with their logs."""

    def __init__(
        self, ours: Record, theirs: Record, by_name: Mapping[tuple[str, int], Record], logs: Logs
    ) -> None:
        self.ours, self.theirs = ours, theirs
        self.log = logs.get((ours.name, ours.seed), [])
        self.reference = logs.get((theirs.name, theirs.seed), [])
        self.diverged = ours.diverged or theirs.diverged
        logged = measured_rows(self.log) and measured_rows(self.reference)
        self.is_known = self.diverged or (bool(logged) and ours.lineage_tokens is not None)
        self.ancestors, self.before = _ancestors(ours, by_name, logs)
        self.final: _Ratios | None = None
        self.trunk: _Ratios | None = None
        self.efficiency: float | None = None
        if self.is_known and not self.diverged:
            self._find()

    def _find(self) -> None:
        point = reach([*self.before, *self.log], measured_rows(self.reference)[-1]["val_bpb"])
        if point is not None:
            whole = Point(self.theirs.lineage_flops, self.theirs.tokens)
            self.final = self._ratios(point, whole)
        own, others = (measured_rows(trunk_of(log)) for log in (self.log, self.reference))
        if not own or not others:
            return
        level = max(own[-1]["val_bpb"], others[-1]["val_bpb"])
        point, other = reach([*self.before, *own], level), reach(others, level)
        if point is None or other is None or other.is_bound:
            return
        self.trunk = self._ratios(point, other)
        if self._inherited_tokens and not point.is_bound:
            inherited = min(point.tokens, self._inherited_tokens)
            self.efficiency = (other.tokens - (point.tokens - inherited)) / inherited

    @property
    def _inherited_tokens(self) -> int:
        whole = self.ours.lineage_tokens
        return 0 if whole is None else whole - self.ours.tokens

    def _ratios(self, point: Point, other: Point) -> _Ratios:
        # What was there before the arm's Fisher pass and growth belongs to the parents.
        own = max(0.0, point.flops - (self.ours.lineage_flops - self.ours.own_flops))
        own_tokens = max(0.0, point.tokens - self._inherited_tokens)
        return (
            point.flops / other.flops,
            own / other.flops,
            point.tokens / other.tokens,
            own_tokens / other.tokens,
            point.is_bound,
        )


def _ancestors(
    record: Record, by_name: Mapping[tuple[str, int], Record], logs: Logs
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
    def ratios(found: Sequence[_Ratios | None]) -> Ratios | None:
        known = [values for values in found if values is not None]
        if len(known) < len(found):
            return None
        *columns, bounds = zip(*known, strict=True)
        flops, own_flops, tokens, own_tokens = map(Estimate.of, columns)
        return Ratios(flops, own_flops, tokens, own_tokens, any(bounds))

    worth = [pair.efficiency for pair in pairs if pair.efficiency is not None]
    return Saving(
        depth=depth,
        arm=pairing.arm,
        baseline=pairing.baseline,
        seeds=len(pairs),
        reached=sum(pair.final is not None for pair in pairs),
        final=ratios([p.final for p in pairs]),
        trunk=ratios([p.trunk for p in pairs]),
        efficiency=Estimate.of(worth) if len(worth) == len(pairs) else None,
        ancestors=max(pair.ancestors for pair in pairs),
        diverged=sum(pair.diverged for pair in pairs),
    )
