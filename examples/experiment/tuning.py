"""What the tuning runs found: the loss over each setting, at each depth."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from analysis.comparisons import read_arm
from analysis.records import Record
from analysis.sweeps import Sweep

__all__ = ["find_sweeps"]

Runs = Sequence[tuple[Mapping[str, Any], Sequence[Record]]]

_FEWEST_VALUES = 2
# Arm -> the settings that are tuned on it, and their words.
_TUNED = {
    "scratch": {"lr": "AdamW learning rate"},
    "scratch+muon": {
        "muon_lr": "Muon learning rate", "muon_adamw_lr": "learning rate of AdamW beside Muon",
    },
}  # fmt: skip
_DISTILLATION = "distillation strength"


def find_sweeps(runs: Runs) -> list[Sweep]:
    """The sweeps in a set of runs, each with its settings.

    Where an arm has several settings to tune, one is varied while the others have the value that
    most runs have. A strength of the distillation stands in the arm's word; plain growing in the
    same run has none, 0.

    Args:
        runs: settings and records of each; models that diverged are left out.
    """
    found: dict[tuple[str, int], dict[float, list[float]]] = {}
    for setting, value, record in [*_rates(runs), *_strengths(runs)]:
        if not record.diverged:
            values = found.setdefault((setting, record.depth), {})
            values.setdefault(value, []).append(record.val_bpb)
    return [
        Sweep.of(setting, depth, values)
        for (setting, depth), values in sorted(found.items())
        if len(values) >= _FEWEST_VALUES
    ]


def _rates(runs: Runs) -> Iterator[tuple[str, float, Record]]:
    for arm, names in _TUNED.items():
        own = [(settings, r) for settings, records in runs for r in records if r.arm == arm]
        if not own:
            continue
        usual = {
            name: Counter(str(settings.get(name)) for settings, _ in own).most_common(1)[0][0]
            for name in names
        }
        for varied, words in names.items():
            for settings, record in own:
                value = settings.get(varied)
                others = [name for name in names if name != varied]
                if isinstance(value, int | float) and all(
                    str(settings.get(name)) == usual[name] for name in others
                ):
                    yield words, float(value), record


def _strengths(runs: Runs) -> Iterator[tuple[str, float, Record]]:
    for _, records in runs:
        found = []
        for record in records:
            arm = read_arm(record.arm)
            if arm is not None and arm.grown and arm.controller is None:
                strength = dict(arm.parts).get("distill") if arm.parts else 0.0
                if strength is not None:
                    found.append((_DISTILLATION, strength, record))
        if any(strength for _, strength, _ in found):
            yield from found
