"""The figures of a run: losses over the operations that went into the models."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from trainer.plan import ModelPlan

__all__ = ["FIGURES", "draw_losses"]

FIGURES = ("loss_validation.png", "loss_training.png")

Record = dict[str, Any]
Points = tuple[list[float], list[float]]

_SMOOTHING = 10  # steps that a point of the training curve is the mean of
# Okabe and Ito's colours, which colour-blind readers can tell apart; the first arm is black.
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888888")


def draw_losses(folder: Path, plans: Sequence[ModelPlan], logs: dict[str, list[Record]]) -> None:
    """Write the files of `FIGURES`.

    Args:
        folder: output folder.
        plans: of the models.
        logs: rows of each model by its name.
    """
    kinds = (
        ("validation loss (bits per byte)", _validation),
        (f"training loss (bits a token, mean of {_SMOOTHING})", _training),
    )
    for name, (title, points) in zip(FIGURES, kinds, strict=True):
        _plot(folder / name, plans, logs, title, points)


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
    figure = Figure(figsize=(3.0 + 2.8 * len(depths), 4.2), layout="constrained")
    panels = figure.subplots(1, len(depths), sharey=True, squeeze=False)
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
        axes.xaxis.set_minor_formatter(NullFormatter())  # within a decade its labels overlap
        axes.set_xlabel("training FLOPs of the lineage")
        axes.grid(visible=True, which="both", linewidth=0.3)
        axes.legend(frameon=False, fontsize=8)
    panels[0][0].set_ylabel(title)
    figure.savefig(path, dpi=150)
