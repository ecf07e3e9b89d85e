"""The report: a table, the records behind it, and two figures."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from trainer.checkpoint import write_atomically
from trainer.log import read_log
from trainer.plan import INHERITED, SCRATCH, ModelPlan

__all__ = ["markdown_table", "write_metrics", "write_report"]

Record = dict[str, Any]

_HEADER = (
    "arm", "depth", "params", "tokens", "FLOPs", "lineage FLOPs", "seconds", "val bpb",
    "inherited - scratch",
)  # fmt: skip
_STYLE = {SCRATCH: "--", INHERITED: "-"}
_SMOOTHING = 10  # steps that a point of the training curve is the mean of


def write_metrics(folder: Path, records: Sequence[Record]) -> None:
    """Write ``metrics.json``: one record a model, in the order of training."""
    write_atomically(folder / "metrics.json", json.dumps(list(records), indent=2) + "\n")


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
    logs = {plan.name: read_log(folder / f"log_{plan.name}.csv") for plan in plans}
    _plot_validation(folder / "loss_validation.png", plans, logs)
    _plot_training(folder / "loss_training.png", plans, logs)
    return text


def markdown_table(records: Sequence[Record]) -> str:
    """The table in GitHub's markdown, and what has to be known to read it.

    Args:
        records: one a model; the difference is taken between the two arms of a depth.
    """
    scratch = {record["depth"]: record for record in records if record["arm"] == SCRATCH}
    rows = [_HEADER, tuple("---" if name == "arm" else "---:" for name in _HEADER)]
    for record in records:
        difference = ""
        if record["arm"] == INHERITED and record["depth"] in scratch:
            difference = f"{record['val_bpb'] - scratch[record['depth']]['val_bpb']:+.4f}"
        rows.append((
            record["arm"],
            f"d{record['depth']}",
            f"{record['params']:,}",
            f"{record['tokens']:,}",
            f"{record['flops']:.3e}",
            f"{record['lineage_flops']:.3e}",
            f"{record['seconds']:.1f}",
            f"{record['val_bpb']:.4f}",
            difference,
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    lines = []
    for row in rows:
        cells = []
        for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
            if cell in ("---", "---:"):
                cell = "-" * (width - 1) + ("-" if cell == "---" else ":")
            cells.append(cell.ljust(width) if i == 0 else cell.rjust(width))
        lines.append("| " + " | ".join(cells) + " |")
    root = records[0]
    notes = [
        f"- d{root['depth']} has no parent: its inherited and its scratch arm are one run.",
        "- lineage FLOPs: parents' trunks, Fisher passes, own trunk and cooled branch. A scratch "
        "model gets the lineage FLOPs of its inherited twin, rounded up to a whole step. Growing "
        "and evaluating are not counted.",
        f"- val bpb: bits per byte on {root['val_bytes']:,} bytes that no model was trained on; "
        "lower is better. A negative difference means that inheriting won.",
        f"- seconds: growing and training of this model alone. One seed ({root['seed']}): "
        "a demonstration, not a measurement of significance.",
    ]
    return "\n".join([*lines, "", *notes]) + "\n"


def _plot_validation(path: Path, plans: Sequence[ModelPlan], logs: dict[str, list[Record]]) -> None:
    figure, axes = plt.subplots(figsize=(7.0, 4.5), layout="constrained")
    for plan in plans:
        points = [r for r in logs[plan.name] if r["val_bpb"] is not None and r["flops"] > 0]
        _draw(axes, plan, [r["flops"] for r in points], [r["val_bpb"] for r in points], marker="o")
    _finish(figure, axes, path, "validation loss (bits per byte)")


def _plot_training(path: Path, plans: Sequence[ModelPlan], logs: dict[str, list[Record]]) -> None:
    figure, axes = plt.subplots(figsize=(7.0, 4.5), layout="constrained")
    for plan in plans:
        steps = [r for r in logs[plan.name] if r["loss"] is not None]
        groups = [steps[i : i + _SMOOTHING] for i in range(0, len(steps), _SMOOTHING)]
        bits = [sum(r["loss"] for r in g) / len(g) / math.log(2) for g in groups]
        _draw(axes, plan, [g[-1]["flops"] for g in groups], bits, marker="")
    _finish(figure, axes, path, f"training loss (bits per byte, mean of {_SMOOTHING} steps)")


def _draw(
    axes: Any, plan: ModelPlan, flops: Sequence[float], bits: Sequence[float], *, marker: str
) -> None:
    axes.plot(
        flops,
        bits,
        linestyle=_STYLE[plan.arm],
        color=f"C{plan.depth % 10}",
        marker=marker,
        markersize=3,
        linewidth=1.4,
        label=f"d{plan.depth} {plan.arm}",
    )


def _finish(figure: Any, axes: Any, path: Path, ylabel: str) -> None:
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs of the whole lineage")
    axes.set_ylabel(ylabel)
    axes.grid(visible=True, which="both", linewidth=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
