"""What each model of a series cost: operations, seconds, utilisation and money, in two accounts.

In that of the *series* every model is wanted, so each pays for itself and the cumulative figures
say what the series cost up to it. In that of a *single model* its whole lineage counts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from analysis.comparisons import read_arm
from analysis.records import Record, chain

__all__ = ["CostAnalyzer", "ModelCost"]


@dataclass(frozen=True)
class ModelCost:
    """What one model cost, and its series up to it.

    Args:
        name: of the model.
        arm: the series is of this arm, ancestors of other arms included.
        seed: of the run.
        training_flops: of its own steps.
        overhead_flops: of these, what the arm adds to forward and backward passes (penalties, the
            teacher, Muon's iterations); ``None`` if no plain model of its size tells.
        fisher_flops: of the Fisher pass on its parent.
        growth_flops: of growing it.
        flops: the three together, its own part of the series.
        lineage_flops: of everything that went into it, as a single model.
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
        plain = {r.size: r.flops / r.tokens for r in records if _adds_nothing(r.arm)}
        for seed in dict.fromkeys(record.seed for record in records):
            for arm in dict.fromkeys(r.arm for r in records if r.seed == seed):
                costs += self._series(chain(records, arm, seed), arm, plain)
        return costs

    def _series(
        self, series: Sequence[Record], arm: str, plain: Mapping[str, float]
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


def _overhead(record: Record, plain: Mapping[str, float]) -> int | None:
    if record.size not in plain:
        return None
    return max(0, round(record.flops - record.tokens * plain[record.size]))
