"""The results: a file of all runs, a table, and figures of what is left of each task."""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from common.errors import UsageError, understanding
from common.jobs import changed_settings, run_jobs
from common.output_folder import LOCK_FILE, OutputFolder
from common.plain_files import read_json, write_atomically
from common.program import StopRequest
from common.statistics import Estimate
from common.tables import markdown
from continual.digit_tasks import Run, Settings, load, run_tasks
from continual.memory_methods import JOINT, METHODS, REPLAY

__all__ = [
    "average_accuracy", "check_folder", "forgetting", "markdown_table", "run_all", "seen_so_far",
    "write_report",
]  # fmt: skip

RESULTS = "results.json"

Matrix = Sequence[Sequence[float]]
Record = dict[str, Any]
Groups = Iterator[tuple[tuple[str, float], pd.DataFrame]]  # (method, strength) and its runs

_HEADER = ("tasks", "method", "strength", "accuracy %", "95 % interval", "forgetting")
_WRONG = ("subspace-outside", "subspace-output")


def check_folder(folder: Path, settings: Settings) -> list[Record]:
    """Read what an earlier call has left in the output folder, without writing anything.

    Args:
        folder: output folder; it need not exist.
        settings: of the runs to come.

    Returns:
        The records of the runs that are done.

    Raises:
        UsageError: the folder holds other things, damaged results, or results of other settings.
    """
    path = folder / RESULTS
    if not path.exists():
        if folder.is_dir() and any(path.name != LOCK_FILE for path in folder.iterdir()):
            raise UsageError(f"--out {folder} is not a run of this program: name another folder")
        return []
    remedy = "delete it or name another folder with --out"
    content = read_json(path, remedy=remedy)
    with understanding(str(path), remedy):
        records = [dict(record) for record in content["runs"]]
        # Results that were made before a setting existed were made with its default.
        found = {**Settings().to_dict(), **content["settings"]}
        _ = [_run_of(record) for record in records], [record["accuracy"] for record in records]
    if different := changed_settings(found, settings.to_dict()):
        raise UsageError(
            f"{path} is of other settings: {', '.join(different)}; name another folder with --out"
        )
    return records


def run_all(
    output: OutputFolder,
    settings: Settings,
    runs: Sequence[Run],
    done: Sequence[Record],
    threads: int,
    stop: StopRequest,
) -> list[Record]:
    """Do the runs that are not done yet.

    Args:
        output: folder, held; it gets ``results.json`` after every run.
        settings: of all runs.
        runs: what is wanted.
        done: records of earlier calls, as `check_folder` returned them.
        threads: of the CPU.
        stop: asked after every epoch.

    Returns:
        The records of ``runs``, in their order.

    Raises:
        RunInterruptedError: a signal has arrived; what was done before is on disk.
    """
    records = {_run_of(record): record for record in done}
    todo = [run for run in runs if run not in records]

    def keep(run: Run, record: Record) -> None:
        records[run] = record
        content = {"settings": settings.to_dict(), "runs": list(records.values())}
        output.check()
        write_atomically(output.path / RESULTS, _to_json(content))

    work = partial(run_tasks, settings=settings, digits=load(validation=settings.validation))
    done_before = len(runs) - len(todo)
    run_jobs(todo, work, keep, stop, workers=0, threads=threads, done=done_before)
    return [records[run] for run in runs]


def _run_of(record: Record) -> Run:
    return Run(record["method"], record["strength"], record["tasks"], record["seed"])


def _to_json(content: dict[str, Any]) -> str:
    """One line a run, so that the file can be read and compared."""
    runs = ",\n".join(
        f"    {json.dumps(_rounded(run), allow_nan=False)}" for run in content["runs"]
    )
    settings = json.dumps(content["settings"], allow_nan=False)
    return f'{{\n  "settings": {settings},\n  "runs": [\n{runs}\n  ]\n}}\n'


def _rounded(record: Record) -> Record:
    rows = [[round(value, 4) for value in row] for row in record["accuracy"]]
    return record | {"accuracy": rows}


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
        sweep: draw accuracy against strength in place of the course of learning, as for classes.

    Returns:
        The text of ``table.md``.
    """
    text = markdown_table(settings, records)
    write_atomically(folder / "table.md", text)
    for tasks, frame in _frame(records).groupby("tasks", sort=False):
        if sweep or settings.by_class:
            _plot_strengths(folder / f"strength_{tasks}_tasks.png", frame)
        else:
            _plot_course(folder / f"course_{tasks}_tasks.png", frame)
            _plot_matrices(folder / f"matrices_{tasks}_tasks.png", frame)
    return text


def _frame(records: Sequence[Record]) -> pd.DataFrame:
    """A row a run, with its accuracy at the end and what it forgot, NaN where that has no sense."""
    frame = pd.DataFrame(records)
    frame["final"] = frame["accuracy"].map(average_accuracy)
    frame["lost"] = frame["accuracy"].map(forgetting).astype(float)
    return frame


def _groups(frame: pd.DataFrame) -> Groups:
    yield from frame.groupby(["method", "strength"], sort=False)


def markdown_table(settings: Settings, records: Sequence[Record]) -> str:
    """The table in GitHub's markdown, and what has to be known to read it.

    Args:
        settings: of the runs.
        records: one a run; those that differ in the seed alone are one row.
    """
    # Strengths are compared by what they keep, whatever ran beside them.
    timed = not settings.validation
    rows: list[tuple[str, ...]] = [(*_HEADER, "CPU s") if timed else _HEADER]
    for tasks, of_tasks in _frame(records).groupby("tasks", sort=False):
        for (method, strength), runs in _groups(of_tasks):
            found, lost = Estimate.of(runs["final"]), Estimate.of(runs["lost"])
            low, high = found.interval or (math.nan, math.nan)
            rows.append((
                str(tasks),
                method,
                f"{strength:g}" if METHODS[method].strength else "",
                f"{found.mean:.1f} ± {found.error:.1f}",
                f"{low:.1f} to {high:.1f}",
                "" if math.isnan(lost.mean) else f"{lost.mean:.1f} ± {lost.error:.1f}",
                *([f"{runs['cpu_seconds'].mean():.1f}"] if timed else []),
            ))  # fmt: skip
    seeds = sorted({record["seed"] for record in records})
    where = "held out of the training images" if settings.validation else "of the test set"
    where += ", each among all ten classes" * settings.by_class
    notes = [
        f"- Accuracy on 360 images {where}, over all tasks after the last; mean ± standard error "
        f"of {len(seeds)} seeds ({seeds[0]} to {seeds[-1]}), and Student's 95 % interval.",
        "- Forgetting: how far the earlier tasks end below their best, in points, on average.",
        f"- {settings.epochs} epochs a task"
        + ("; CPU s: of a run, Fisher passes included." if timed else "."),
    ]
    return "\n".join([markdown(rows, "rlr", padded=True), "", *notes]) + "\n"


def _label(method: str, strength: float) -> str:
    chosen = METHODS[method]
    return chosen.label + (f" ({strength:g})" if strength != chosen.strength else "")


def _plot_course(path: Path, frame: pd.DataFrame) -> None:
    """Mean accuracy over the tasks learned so far, with one standard error on either side."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    ends = []
    for number, ((method, strength), runs) in enumerate(_groups(frame)):
        seen = pd.DataFrame([*map(seen_so_far, runs["accuracy"])])
        seen.columns += 1
        ends.append(seen.iloc[:, -1].mean())
        style: dict[str, Any] = {"color": f"C{number % 10}", "label": _label(method, strength)}
        if len(seen.columns) == 1:
            axes.axhline(ends[-1], linestyle=":", **style)
            continue
        style["linestyle"] = "--" if method in _WRONG else "-"
        sns.lineplot(
            seen.melt(), x="variable", y="value", errorbar="se", ax=axes, markersize=4,
            marker="os"[number // 10 % 2], markeredgewidth=0, linewidth=1.4, legend=False,
            err_kws={"alpha": 0.15, "linewidth": 0}, **style,
        )  # fmt: skip
    axes.set_xticks(range(1, int(frame["tasks"].iloc[0]) + 1))
    axes.set_ylim(0, 100)
    axes.set_xlabel("tasks learned")
    axes.set_ylabel("accuracy on all of them (%), mean ± standard error")
    axes.grid(visible=True, linewidth=0.3)
    lines = axes.get_lines()
    best_first = [lines[i] for i in np.argsort(ends)[::-1]]
    figure.legend(handles=best_first, frameon=False, fontsize=8, loc="outside right center")
    _save(figure, path)


def _plot_matrices(path: Path, frame: pd.DataFrame) -> None:
    """Accuracy on each task after each task, mean of the seeds, one square a method."""
    means = {
        _label(*group): np.mean(runs["accuracy"].tolist(), axis=0)
        for group, runs in _groups(frame)
        if len(runs["accuracy"].iloc[0]) > 1
    }
    if not means:
        return
    columns = min(5, len(means))
    rows = math.ceil(len(means) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(2.1 * columns + 0.9, 2.3 * rows), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    image: Any = None
    for axes, entry in itertools.zip_longest(grid.flat, means.items()):
        if entry is None:
            axes.set_axis_off()
            continue
        label, mean = entry
        size = len(mean)
        image = axes.imshow(mean, vmin=0, vmax=100, cmap="viridis")
        axes.set_title(label, fontsize=8)
        axes.set_xticks([0, size - 1], ["1", str(size)])
        axes.set_yticks([0, size - 1], ["1", str(size)])
    for axes in grid[:, 0]:
        axes.set_ylabel("after task", fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("accuracy on task", fontsize=8)
    figure.colorbar(image, ax=grid, shrink=0.8, label="%")
    _save(figure, path)


def _plot_strengths(path: Path, frame: pd.DataFrame) -> None:
    """Accuracy after the last task against the strength; a line across for what has none."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    without = frame["method"].isin(["none", REPLAY, JOINT])
    for number, (method, runs) in enumerate(frame[without].groupby("method", sort=False)):
        axes.axhline(
            runs["final"].mean(), label=METHODS[method].label, color="0.3",
            linestyle=(":", "--", "-.")[number],
        )  # fmt: skip
    frame = frame[~without]
    labels = frame["method"].map(lambda method: METHODS[method].label)
    sns.lineplot(
        frame, x="strength", y="final", hue=labels, errorbar=None, ax=axes, marker="o",
        markersize=4, markeredgewidth=0,
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("strength")
    axes.set_ylabel("accuracy on all tasks (%)")
    axes.grid(visible=True, linewidth=0.3)
    handles = axes.get_legend_handles_labels()[0]
    axes.legend().remove()
    figure.legend(handles=handles, frameon=False, fontsize=8, loc="outside right center")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
