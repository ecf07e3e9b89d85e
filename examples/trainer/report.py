"""The report: a table, the records behind it, and two figures."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from trainer.arms import Arm, parse_arm
from trainer.checkpoint import write_atomically
from trainer.log import read_log
from trainer.plan import ModelPlan

__all__ = ["markdown_table", "write_metrics", "write_report"]

Record = dict[str, Any]

_HEADER = (
    "arm", "depth", "params", "tokens", "FLOPs", "lineage FLOPs", "seconds", "val bpb",
    "against scratch",
)  # fmt: skip
_SMOOTHING = 10  # steps that a point of the training curve is the mean of
# Okabe and Ito's colours, which colour-blind readers can tell apart; the first arm is black.
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888888")


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
    for name, title, points in (
        ("loss_validation.png", "validation loss (bits per byte)", _validation),
        ("loss_training.png", f"training loss (bits a token, mean of {_SMOOTHING})", _training),
    ):
        _plot(folder / name, plans, logs, title, points)
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
    rows = [_HEADER, tuple("---" if name == "arm" else "---:" for name in _HEADER)]
    for record in records:
        difference = ""
        baseline = found.get((record["depth"], _baseline(record)))
        if baseline is not None and baseline is not record:
            difference = f"{record['val_bpb'] - baseline['val_bpb']:+.4f}"
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
    return "\n".join([*lines, "", *notes]) + "\n"


Points = tuple[list[float], list[float]]


def _validation(log: list[Record]) -> Points:
    points = [r for r in log if r["val_bpb"] is not None and r["flops"] > 0]
    return [r["flops"] for r in points], [r["val_bpb"] for r in points]


def _training(log: list[Record]) -> Points:
    steps = [r for r in log if r["loss"] is not None]
    groups = [steps[i : i + _SMOOTHING] for i in range(0, len(steps), _SMOOTHING)]
    bits = [sum(r["loss"] for r in g) / len(g) / math.log(2) for g in groups]
    return [g[-1]["flops"] for g in groups], bits


def _plot(
    path: Path,
    plans: Sequence[ModelPlan],
    logs: dict[str, list[Record]],
    title: str,
    points: Callable[[list[Record]], Points],
) -> None:
    depths = sorted({plan.depth for plan in plans})
    arms = list(dict.fromkeys(plan.arm.name for plan in plans))
    figure, panels = plt.subplots(
        1, len(depths), figsize=(3.0 + 2.8 * len(depths), 4.2), layout="constrained",
        sharey=True, squeeze=False,
    )  # fmt: skip
    for axes, depth in zip(panels[0], depths, strict=True):
        for plan in plans:
            if plan.depth == depth:
                axes.plot(
                    *points(logs[plan.name]),
                    color=_COLOURS[arms.index(plan.arm.name) % len(_COLOURS)],
                    linestyle="-" if plan.arm.grown else "--",
                    linewidth=1.4,
                    label=plan.arm.name,
                )
        axes.set_title(f"d{depth}", fontsize=10)
        axes.set_xscale("log")
        axes.set_xlabel("training FLOPs of the lineage")
        axes.grid(visible=True, which="both", linewidth=0.3)
        axes.legend(frameon=False, fontsize=8)
    panels[0][0].set_ylabel(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)
