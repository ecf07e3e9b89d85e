"""What is told of a series: its plan as tables; its results as a table, records and two figures."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.plain_files import write_atomically
from common.tables import aligned, markdown
from trainer.arms import parse_arm
from trainer.series_plan import ModelPlan, shape_of
from trainer.step_log import read_log

__all__ = [
    "FIGURES", "check_record", "diverged", "markdown_table", "models_table", "settings_table",
    "write_metrics", "write_report",
]  # fmt: skip

Record = dict[str, Any]

_HEADER = (
    "size", "arm", "params", "tokens", "share", "FLOPs", "lineage FLOPs", "seconds", "val bpb",
    "against scratch",
)  # fmt: skip
_PANELS = 4  # of a figure, side by side
FIGURES = ("loss_validation.png", "loss_training.png")
Points = tuple[list[float], list[float]]
_SMOOTHING = 10  # steps that a point of the training curve is the mean of
# Okabe and Ito's colours, which colour-blind readers can tell apart; the first arm is black.
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888888")


def settings_table(plans: Sequence[ModelPlan], sequence_len: int) -> str:
    """What the size of each model decides, by rule or as the user named it, a line a size.

    Args:
        plans: of the series.
        sequence_len: tokens a sequence.
    """
    rows: list[Sequence[str]] = [(
        "size", "layers", "width", "heads", "parameters", "in products", "growth", "sequences",
        "tokens a step", "lr", "Muon lr", "beside it", "decay",
    )]  # fmt: skip
    before = 0
    for size, plan in {plan.size: plan for plan in plans}.items():
        shape, chosen = shape_of(plan.model), plan.settings
        rows.append((
            size,
            f"{plan.model.n_layer}",
            f"{plan.model.n_embd}",
            f"{plan.model.n_head}",
            f"{shape.params:,}",
            f"{shape.scaling_params:,}",
            f"x {shape.scaling_params / before:.2f}" if before else "-",
            f"{chosen.batch_size}",
            f"{chosen.batch_size * sequence_len:,}",
            f"{chosen.lr:.3g}",
            f"{chosen.muon_lr:.3g}",
            f"{chosen.muon_adamw_lr:.3g}",
            f"{chosen.weight_decay:.3g}",
        ))  # fmt: skip
        before = shape.scaling_params
    return aligned(rows)


def models_table(
    plans: Sequence[ModelPlan],
    sequence_len: int,
    header: Sequence[str] = (),
    cells: Sequence[Sequence[str]] | None = None,
) -> str:
    """What each model is trained on and costs, a line a model.

    Args:
        plans: of the series.
        sequence_len: tokens a sequence.
        header: of more columns.
        cells: of these, for each model.
    """
    rows = [["model", "share", "trunk", "cooled", "tokens", "Fisher", "growing", "FLOPs",
             "lineage FLOPs", *header]]  # fmt: skip
    for plan, more in zip(plans, cells or [()] * len(plans), strict=True):
        rows.append([
            plan.name,
            f"{plan.share:g}",
            f"{plan.trunk}",
            f"{plan.cooldown}",
            f"{plan.steps * plan.settings.batch_size * sequence_len:,}",
            f"{plan.fisher_flops:.2e}" if plan.fisher_flops else "-",
            f"{plan.growth_flops:.2e}" if plan.growth_flops else "-",
            f"{plan.flops + plan.fisher_flops + plan.growth_flops:.2e}",
            f"{plan.lineage_flops:.2e}",
            *more,
        ])  # fmt: skip
    return aligned(rows)


def write_metrics(folder: Path, records: Sequence[Record]) -> None:
    """Write ``metrics.json``: one record a model, in the order of training.

    JSON has no NaN: of a model that diverged ``val_bpb`` is null, and ``diverged`` true.
    """
    content = []
    for record in records:
        cooled = [_without_nan(branch) for branch in record["cooled"]]
        content.append({**_without_nan(record), "cooled": cooled, "diverged": diverged(record)})
    text = json.dumps(content, indent=2, allow_nan=False)
    write_atomically(folder / "metrics.json", text + "\n")


def _without_nan(record: Record) -> Record:
    return {**record, "val_bpb": None if diverged(record) else record["val_bpb"]}


def diverged(record: Record) -> bool:
    """Whether the loss of a model or a cooled branch is not a number."""
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
    draw_losses(folder, plans, {p.name: read_log(folder / f"log_{p.name}.csv") for p in plans})
    return text


def check_record(record: Record) -> None:
    """See that a report can be made of the record of a model or a branch.

    Raises:
        KeyError, TypeError, ValueError: it cannot.
    """
    markdown_table([record])
    cooled = record["cooled"]
    f"{cooled['share']:g} {cooled['steps']:d} {cooled['flops']:d} {cooled['val_bpb']:g}"


def markdown_table(records: Sequence[Record]) -> str:
    """The table in GitHub's markdown, and what has to be known to read it.

    Args:
        records: one a model; differences are taken to its twin: the model from scratch of the same
            size and optimizer.
    """
    found = {(record["size"], record["arm"]): record for record in records}
    rows = [_HEADER]
    for record in records:
        difference = ""
        baseline = found.get((record["size"], parse_arm(record["arm"]).root.name))
        pair = [record] if baseline is None or baseline is record else [record, baseline]
        if len(pair) == 2 and not any(map(diverged, pair)):
            difference = f"{pair[0]['val_bpb'] - pair[1]['val_bpb']:+.4f}"
        rows.append((
            record["size"],
            record["arm"],
            f"{record['params']:,}",
            f"{record['tokens']:,}",
            f"{record['share']:g}",
            f"{record['flops']:.3e}",
            f"{record['lineage_flops']:.3e}",
            f"{record['seconds']:.1f}",
            "diverged" if diverged(record) else f"{record['val_bpb']:.4f}",
            difference,
        ))  # fmt: skip
    root = records[0]
    firsts = [parse_arm(r["arm"]) for r in records if r["size"] == root["size"]]
    one_run = f"- {root['size']} has no parent: there a grown model and its twin are one run."
    notes = [
        *([] if any(arm.grown for arm in firsts) else [one_run]),
        "- share: steps, as a share of those of the twin, the model from scratch of the same size.",
        "- FLOPs: of the model's own trunk and cooled branch. lineage FLOPs: of its parents' "
        "trunks, Fisher passes and growing too. Evaluating is not counted.",
        f"- val bpb: bits per byte on {root['val_bytes']:,} bytes that no model was trained on; "
        "lower is better. A negative difference is a gain over the twin.",
        f"- seconds: growing and training of this model alone. One seed ({root['seed']}): "
        "a demonstration, not a measurement of significance.",
    ]
    for record in records:
        notes += [f"- warning: {record['name']}: {text}" for text in record.get("warnings", [])]
    return "\n".join([markdown(rows, "ll", padded=True), "", *notes]) + "\n"


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
    from matplotlib.figure import Figure  # not above: importing matplotlib takes seconds
    from matplotlib.ticker import NullFormatter

    sizes = list(dict.fromkeys(plan.size for plan in plans))
    arms = list(dict.fromkeys(plan.arm.name for plan in plans))
    columns = min(len(sizes), _PANELS)
    rows = -(-len(sizes) // columns)
    figure = Figure(figsize=(3.0 + 2.8 * columns, 0.6 + 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes in panels.flat[len(sizes) :]:
        axes.set_visible(False)
    for axes, size in zip(panels.flat, sizes, strict=False):
        for plan in plans:
            if plan.size == size:
                axes.plot(
                    *points(logs[plan.name]),
                    color=_COLOURS[arms.index(plan.arm.name) % len(_COLOURS)],
                    linestyle="-" if plan.arm.grown else "--",
                    linewidth=1.4,
                    label=plan.arm.name,
                )
        axes.set_title(size, fontsize=10)
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())  # within a decade its labels overlap
        axes.set_xlabel("training FLOPs of the lineage")
        axes.grid(visible=True, which="both", linewidth=0.3)
        axes.legend(frameon=False, fontsize=8)
    for row in panels:
        row[0].set_ylabel(title)
    figure.savefig(path, dpi=150)
