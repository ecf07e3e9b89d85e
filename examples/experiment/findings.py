"""What the tuning and the sizes found.

Tuning gives the loss over each setting, at each depth. The sizes say what the operations of the
largest model buy when one model from scratch gets all of them: where budgets are small, a small
model may be better than a large one. A grown model has been small for a part of its operations, so
it is held against each size, and not against its own alone.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.comparisons import read_arm
from analysis.records import Record
from analysis.sweeps import Sweep
from common.statistics import Estimate
from trainer.arms import Arm

__all__ = ["SizeRow", "find_sizes", "find_sweeps", "sentence_of"]

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

_SCRATCH, _GROWN = Arm(False, (), None).name, Arm(True, (), None).name


@dataclass(frozen=True)
class SizeRow:
    """Models of one depth from scratch, with the operations of the largest depth's.

    Args:
        depth: of the models.
        bits: validation bits per byte, over the seeds.
        grown: those of the largest model that is only grown minus these, paired by seed; ``None``
            without a common seed in which neither diverged. Negative: growing is better.
        flops: of one model, mean.
        tokens: of one model, mean.
        diverged: models of this depth that did, and are not in the means.
        grown_diverged: grown models that did.
    """

    depth: int
    bits: Estimate
    grown: Estimate | None
    flops: float
    tokens: float
    diverged: int
    grown_diverged: int


def find_sizes(alone: Sequence[Record], arms: Sequence[Record]) -> list[SizeRow]:
    """The rows, ascending by depth; none without models that were trained alone.

    A depth all of whose models diverged has no row.

    Args:
        alone: smaller models from scratch, each with all operations.
        arms: the models of the comparison; the largest from scratch and grown are taken of them.
    """
    if not alone:
        return []
    largest = max((r.depth for r in arms), default=0)
    all_grown = [r for r in arms if (r.depth, r.arm) == (largest, _GROWN)]
    grown = {r.seed: r.val_bpb for r in all_grown if not r.diverged}
    scratch = [r for r in arms if (r.depth, r.arm) == (largest, _SCRATCH)]
    records = [*alone, *scratch]
    rows = []
    for depth in sorted({r.depth for r in records if not r.diverged}):
        of_depth = [r for r in records if r.depth == depth]
        own = [r for r in of_depth if not r.diverged]
        differences = [grown[r.seed] - r.val_bpb for r in own if r.seed in grown]
        rows.append(
            SizeRow(
                depth=depth,
                bits=Estimate.of([r.val_bpb for r in own]),
                grown=Estimate.of(differences) if differences else None,
                flops=sum(r.own_flops for r in own) / len(own),
                tokens=sum(r.tokens for r in own) / len(own),
                diverged=len(of_depth) - len(own),
                grown_diverged=len(all_grown) - len(grown),
            )
        )
    return rows


def sentence_of(rows: Sequence[SizeRow]) -> str:
    """Which size is the best from scratch, and how growing to the largest compares with it.

    Args:
        rows: of `find_sizes`, one or more.
    """
    # What the survivors of a size that diverges end at is no reason to choose it.
    best = min(rows, key=lambda row: (row.diverged > 0, row.bits.mean))
    largest = rows[-1].depth
    found = f"d{best.depth} from scratch ends at {best.bits.mean:.4f} bits per byte"
    if best.diverged:
        found += f" where it does not diverge, as in {best.diverged} of "
        found += f"{best.diverged + len(best.bits.values)} seeds"
    if best.grown_diverged:
        found += f", and d{largest} grown diverged in some seed"
    elif best.grown is not None:
        interval = best.grown.known
        known = (
            "no difference shown"
            if interval is None or interval[0] <= 0 <= interval[1]
            else ("grown is worse" if interval[0] > 0 else "grown is better")
        )
        found += f", d{largest} grown {best.grown.plus_minus('+.4f')} from there: {known}"
    return f"What is the best size for the operations of d{largest}? {found}."


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
