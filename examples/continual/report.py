"""The report: a table, and figures of what is left of each task."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common.statistics import Estimate
from common.tables import markdown
from continual.config import Settings
from continual.methods import METHODS
from trainer.checkpoint import write_atomically

__all__ = ["average_accuracy", "forgetting", "markdown_table", "seen_so_far", "write_report"]

Matrix = Sequence[Sequence[float]]
Record = dict[str, Any]
Group = tuple[str, float]  # method, strength

_HEADER = ("tasks", "method", "strength", "accuracy %", "95 % interval", "forgetting")
_WRONG = ("subspace-outside", "subspace-output")


def average_accuracy(accuracy: Matrix) -> float:
    """Mean accuracy over all tasks after the last one."""
    return fmean(accuracy[-1])


def forgetting(accuracy: Matrix) -> float | None:
    """How far the earlier tasks have fallen from their best, on average; None with one row.

    Example:
        >>> forgetting([[90, 10, 10], [80, 95, 10], [70, 90, 99]])
        12.5
    """
    last = len(accuracy) - 1
    if last == 0:
        return None
    drops = [max(row[s] for row in accuracy) - accuracy[last][s] for s in range(last)]
    return fmean(drops)


def seen_so_far(accuracy: Matrix) -> list[float]:
    """After each task, the mean accuracy over the tasks learned until then.

    Example:
        >>> seen_so_far([[90, 10], [80, 96]])
        [90.0, 88.0]
    """
    return [fmean(row[: t + 1]) for t, row in enumerate(accuracy)]


def write_report(
    folder: Path, settings: Settings, records: Sequence[Record], *, sweep: bool
) -> str:
    """Write ``table.md`` and the figures.

    Args:
        folder: output folder.
        settings: of the runs.
        records: one a run.
        sweep: draw accuracy against strength in place of the course of learning.

    Returns:
        The text of ``table.md``.
    """
    text = markdown_table(settings, records)
    write_atomically(folder / "table.md", text)
    for tasks, group in _by_tasks(records).items():
        if sweep:
            _plot_strengths(folder / f"strength_{tasks}_tasks.png", group)
        else:
            _plot_course(folder / f"course_{tasks}_tasks.png", tasks, group)
            _plot_matrices(folder / f"matrices_{tasks}_tasks.png", group)
    return text


def markdown_table(settings: Settings, records: Sequence[Record]) -> str:
    """The table in GitHub's markdown, and what has to be known to read it.

    Args:
        settings: of the runs.
        records: one a run; those that differ in the seed alone are one row.
    """
    # Strengths are compared by what they keep, whatever ran beside them.
    timed = not settings.validation
    rows: list[tuple[str, ...]] = [(*_HEADER, "CPU s") if timed else _HEADER]
    for tasks, group in _by_tasks(records).items():
        for (method, strength), runs in _by_group(group).items():
            found = Estimate.of([average_accuracy(run["accuracy"]) for run in runs])
            low, high = found.interval or (math.nan, math.nan)
            drops = [drop for run in runs if (drop := forgetting(run["accuracy"])) is not None]
            lost = Estimate.of(drops) if drops else None
            rows.append((
                str(tasks),
                method,
                f"{strength:g}" if METHODS[method].strength else "",
                f"{found.mean:.1f} ± {found.error:.1f}",
                f"{low:.1f} to {high:.1f}",
                "" if lost is None else f"{lost.mean:.1f} ± {lost.error:.1f}",
                *([f"{fmean(run['cpu_seconds'] for run in runs):.1f}"] if timed else []),
            ))  # fmt: skip
    seeds = sorted({record["seed"] for record in records})
    where = "held out of the training images" if settings.validation else "of the test set"
    notes = [
        f"- Accuracy on 360 images {where}, over all tasks after the last; mean ± standard error "
        f"of {len(seeds)} seeds ({seeds[0]} to {seeds[-1]}), and Student's 95 % interval.",
        "- Forgetting: how far the earlier tasks end below their best, in points, on average.",
        f"- {settings.epochs} epochs a task"
        + ("; CPU s: of a run, Fisher passes included." if timed else "."),
    ]
    return "\n".join([markdown(rows, "rlr", padded=True), "", *notes]) + "\n"


def _by_tasks(records: Sequence[Record]) -> dict[int, list[Record]]:
    grouped: dict[int, list[Record]] = {}
    for record in records:
        grouped.setdefault(record["tasks"], []).append(record)
    return grouped


def _by_group(records: Sequence[Record]) -> dict[Group, list[Record]]:
    grouped: dict[Group, list[Record]] = {}
    for record in records:
        grouped.setdefault((record["method"], record["strength"]), []).append(record)
    return grouped


def _label(group: Group) -> str:
    method, strength = group
    chosen = METHODS[method]
    return chosen.label + (f" ({strength:g})" if strength != chosen.strength else "")


def _plot_course(path: Path, tasks: int, records: Sequence[Record]) -> None:
    """Mean accuracy over the tasks learned so far, with one standard error on either side."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    ends = []
    for number, (group, runs) in enumerate(_by_group(records).items()):
        style: dict[str, Any] = {"color": f"C{number % 10}", "label": _label(group)}
        points = [
            Estimate.of(values)
            for values in zip(*(seen_so_far(r["accuracy"]) for r in runs), strict=True)
        ]
        means = [p.mean for p in points]
        ends.append(means[-1])
        if len(points) == 1:
            axes.axhline(means[0], linestyle=":", **style)
            continue
        steps = range(1, tasks + 1)
        dashed = "--" if group[0] in _WRONG else "-"
        axes.plot(steps, means, dashed, marker="o", markersize=3, linewidth=1.4, **style)
        errors = [0.0 if math.isnan(p.error) else p.error for p in points]
        low = [m - e for m, e in zip(means, errors, strict=True)]
        high = [m + e for m, e in zip(means, errors, strict=True)]
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set_xticks(range(1, tasks + 1))
    axes.set_ylim(0, 100)
    axes.set_xlabel("permutations learned")
    axes.set_ylabel("accuracy on all of them (%), mean ± standard error")
    axes.grid(visible=True, linewidth=0.3)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(ends)), key=lambda i: -ends[i])
    figure.legend(
        [handles[i] for i in order], [labels[i] for i in order], frameon=False, fontsize=8,
        loc="outside right center",
    )  # fmt: skip
    _save(figure, path)


def _plot_matrices(path: Path, records: Sequence[Record]) -> None:
    """Accuracy on each task after each task, mean of the seeds, one square a method."""
    groups = {g: runs for g, runs in _by_group(records).items() if len(runs[0]["accuracy"]) > 1}
    if not groups:
        return
    columns = min(5, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(2.1 * columns + 0.9, 2.3 * rows), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    image: Any = None
    for axes, entry in itertools.zip_longest(grid.flat, groups.items()):
        if entry is None:
            axes.set_axis_off()
            continue
        group, runs = entry
        size = len(runs[0]["accuracy"])
        mean = [
            [sum(run["accuracy"][t][s] for run in runs) / len(runs) for s in range(size)]
            for t in range(size)
        ]
        image = axes.imshow(mean, vmin=0, vmax=100, cmap="viridis")
        axes.set_title(_label(group), fontsize=8)
        axes.set_xticks([0, size - 1], ["1", str(size)])
        axes.set_yticks([0, size - 1], ["1", str(size)])
    for axes in grid[:, 0]:
        axes.set_ylabel("after task", fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("accuracy on task", fontsize=8)
    figure.colorbar(image, ax=grid, shrink=0.8, label="%")
    _save(figure, path)


def _plot_strengths(path: Path, records: Sequence[Record]) -> None:
    """Accuracy after the last task against the strength."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    methods: dict[str, list[tuple[float, float]]] = {}
    for (method, strength), runs in _by_group(records).items():
        mean = Estimate.of([average_accuracy(run["accuracy"]) for run in runs]).mean
        methods.setdefault(method, []).append((strength, mean))
    for method, points in methods.items():
        style = "--" if method in _WRONG else "-"
        x, y = zip(*points, strict=True)
        axes.plot(x, y, style, marker="o", markersize=3, label=METHODS[method].label)
    axes.set_xscale("log")
    axes.set_xlabel("strength")
    axes.set_ylabel("accuracy on all tasks (%)")
    axes.grid(visible=True, linewidth=0.3)
    figure.legend(frameon=False, fontsize=8, loc="outside right center")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
