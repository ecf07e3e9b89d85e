"""The report: a table, the records behind it, and two figures."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.plain_files import write_atomically
from common.tables import markdown
from trainer.arms import Arm, parse_arm
from trainer.log import read_log
from trainer.plan import ModelPlan

__all__ = ["diverged", "markdown_table", "write_metrics", "write_report"]

Record = dict[str, Any]

_HEADER = (
    "arm", "depth", "params", "tokens", "FLOPs", "lineage FLOPs", "seconds", "val bpb",
    "against scratch",
)  # fmt: skip


def write_metrics(folder: Path, records: Sequence[Record]) -> None:
    """Write ``metrics.json``: one record a model, in the order of training.

    JSON has no NaN: of a model that diverged ``val_bpb`` is null, and ``diverged`` true.
    """
    content = [
        {**record, "val_bpb": None if diverged(record) else record["val_bpb"],
         "diverged": diverged(record)}
        for record in records
    ]  # fmt: skip
    text = json.dumps(content, indent=2, allow_nan=False)
    write_atomically(folder / "metrics.json", text + "\n")


def diverged(record: Record) -> bool:
    """Whether the loss of a model is not a number."""
    return not math.isfinite(record["val_bpb"])


def write_report(folder: Path, records: Sequence[Record], plans: Sequence[ModelPlan]) -> str:
    """Write ``table.md`` and the figures.

    Args:
        folder: output folder with the logs.
        records: one a model.
        plans: of the same models.

    Returns:
        The text of ``table.md``.
    """
    text = markdown_table(records)
    write_atomically(folder / "table.md", text)
    from trainer.figures import draw_losses  # not above: importing matplotlib takes seconds

    draw_losses(folder, plans, {p.name: read_log(folder / f"log_{p.name}.csv") for p in plans})
    return text


def _baseline(record: Record) -> str:
    """The arm from scratch with the same controller."""
    return Arm(False, (), parse_arm(record["arm"]).controller).name


def markdown_table(records: Sequence[Record]) -> str:
    """The table in GitHub's markdown, and what has to be known to read it.

    Args:
        records: one a model; differences are taken to the model from scratch of the same depth.
    """
    found = {(record["depth"], record["arm"]): record for record in records}
    rows = [_HEADER]
    for record in records:
        difference = ""
        baseline = found.get((record["depth"], _baseline(record)))
        pair = [record] if baseline is None or baseline is record else [record, baseline]
        if len(pair) == 2 and not any(map(diverged, pair)):
            difference = f"{pair[0]['val_bpb'] - pair[1]['val_bpb']:+.4f}"
        rows.append((
            record["arm"],
            f"d{record['depth']}",
            f"{record['params']:,}",
            f"{record['tokens']:,}",
            f"{record['flops']:.3e}",
            f"{record['lineage_flops']:.3e}",
            f"{record['seconds']:.1f}",
            "diverged" if diverged(record) else f"{record['val_bpb']:.4f}",
            difference,
        ))  # fmt: skip
    root = records[0]
    notes = [
        f"- d{root['depth']} has no parent: there a grown arm and scratch are one run.",
        "- lineage FLOPs: parents' trunks, Fisher passes, growing, own trunk and cooled branch. At "
        "each depth all arms have one budget; what an arm adds it pays for with steps. Evaluating "
        "is not counted.",
        f"- val bpb: bits per byte on {root['val_bytes']:,} bytes that no model was trained on; "
        "lower is better. A negative difference is a gain over the model from scratch.",
        f"- seconds: growing and training of this model alone. One seed ({root['seed']}): "
        "a demonstration, not a measurement of significance.",
    ]
    for record in records:
        notes += [f"- warning: {record['name']}: {text}" for text in record.get("warnings", [])]
    return "\n".join([markdown(rows, "lr", padded=True), "", *notes]) + "\n"
