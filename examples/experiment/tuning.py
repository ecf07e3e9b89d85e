"""What the tuning runs found: the loss over each setting, at each depth."""

from collections.abc import Sequence
from typing import Any

from analysis.pairings import read_arm
from analysis.records import Record
from analysis.sweeps import Sweep

__all__ = ["find_sweeps"]

_FEWEST_VALUES = 2


def find_sweeps(runs: Sequence[tuple[dict[str, Any], Sequence[Record]]]) -> list[Sweep]:
    """The sweeps in a set of runs, each with its settings.

    AdamW's rate is that of plain models from scratch, Muon's that of models with Muon; a strength
    of the distillation stands in the arm's word.

    Args:
        runs: settings and records of each; models that diverged are left out.
    """
    found: dict[tuple[str, int], dict[float, list[float]]] = {}
    for settings, records in runs:
        for record in records:
            place = _place(settings, record)
            if place is not None and not record.diverged:
                setting, value = place
                values = found.setdefault((setting, record.depth), {})
                values.setdefault(value, []).append(record.val_bpb)
    return [
        Sweep.of(setting, depth, values)
        for (setting, depth), values in sorted(found.items())
        if len(values) >= _FEWEST_VALUES
    ]


def _place(settings: dict[str, Any], record: Record) -> tuple[str, float] | None:
    """Name and value of what a run varied; ``None`` for a model that tells of nothing."""
    arm = read_arm(record.arm)
    if arm is None:
        return None
    if arm.grown:
        strength = dict(arm.parts).get("distill")
        return None if strength is None else ("distillation strength", strength)
    key, setting = ("muon_lr", "Muon learning rate") if arm.has("muon") else (
        "lr", "AdamW learning rate")  # fmt: skip
    value = settings.get(key)
    return (setting, float(value)) if isinstance(value, int | float) else None
