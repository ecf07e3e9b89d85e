"""What the operations of the largest model buy when one model from scratch gets all of them.

Where budgets are small, a small model may be better than a large one. A grown model has been small
for a part of its operations, so it is held against each size, and not against its own alone.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from analysis.intervals import Estimate
from analysis.records import Record
from trainer.arms import Arm

__all__ = ["SizeRow", "find_sizes", "sentence_of"]

_SCRATCH, _GROWN = Arm(False, (), None).name, Arm(True, (), None).name


@dataclass(frozen=True)
class SizeRow:
    """Models of one depth from scratch, with the operations of the largest depth's.

    Args:
        depth: of the models.
        bits: validation bits per byte, over the seeds.
        grown: those of the largest model that is only grown minus these, paired by seed; ``None``
            without a common seed. Negative: growing is better.
        flops: of one model, mean.
        tokens: of one model, mean.
    """

    depth: int
    bits: Estimate
    grown: Estimate | None
    flops: float
    tokens: float

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps."""
        return asdict(self)


def find_sizes(alone: Sequence[Record], arms: Sequence[Record]) -> list[SizeRow]:
    """The rows, ascending by depth; none without models that were trained alone.

    Args:
        alone: smaller models from scratch, each with all operations.
        arms: the models of the comparison; the largest from scratch and grown are taken of them.
    """
    if not alone:
        return []
    largest = max((r.depth for r in arms), default=0)
    grown = {r.seed: r.val_bpb for r in arms if (r.depth, r.arm) == (largest, _GROWN)}
    scratch = [r for r in arms if (r.depth, r.arm) == (largest, _SCRATCH)]
    records = [r for r in (*alone, *scratch) if not r.diverged]
    rows = []
    for depth in sorted({r.depth for r in records}):
        own = [r for r in records if r.depth == depth]
        differences = [grown[r.seed] - r.val_bpb for r in own if r.seed in grown]
        rows.append(
            SizeRow(
                depth=depth,
                bits=Estimate.of([r.val_bpb for r in own]),
                grown=Estimate.of(differences) if differences else None,
                flops=sum(r.own_flops for r in own) / len(own),
                tokens=sum(r.tokens for r in own) / len(own),
            )
        )
    return rows


def sentence_of(rows: Sequence[SizeRow]) -> str:
    """Which size is the best from scratch, and how growing to the largest compares with it.

    Args:
        rows: of `find_sizes`, one or more.
    """
    best, largest = min(rows, key=lambda row: row.bits.mean), rows[-1].depth
    found = f"d{best.depth} from scratch ends at {best.bits.mean:.4f} bits per byte"
    if best.grown is not None:
        interval = best.grown.known
        known = (
            "no difference shown"
            if interval is None or interval[0] <= 0 <= interval[1]
            else ("grown is worse" if interval[0] > 0 else "grown is better")
        )
        margin = "" if best.grown.margin is None else f" ± {best.grown.margin:.4f}"
        found += f", d{largest} grown {best.grown.mean:+.4f}{margin} from there: {known}"
    return f"What is the best size for the operations of d{largest}? {found}."
