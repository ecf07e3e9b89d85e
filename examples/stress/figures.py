"""One figure a scenario (mean and band over the seeds), and the heat map of the settings."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from stress.arms import ARMS
from stress.jobs import Job
from stress.scenarios import SCENARIOS

__all__ = ["draw_scenarios", "draw_sensitivity"]

Record = dict[str, Any]


def draw_scenarios(folder: Path, jobs: Sequence[Job], records: Sequence[Record]) -> list[Path]:
    """Draw validation, weight norm and gate of each scenario at its middle learning rate.

    Args:
        folder: gets ``<scenario>.png``.
        jobs: what was run.
        records: one a job.

    Returns:
        The files.
    """
    files = []
    for scenario in dict.fromkeys(job.scenario for job in jobs):
        curves: dict[str, list[dict[str, list[float]]]] = {}
        for job, record in zip(jobs, records, strict=True):
            if job.scenario == scenario and job.rate == 1.0 and not job.changes:
                curves.setdefault(job.arm, []).append(record["curves"])
        if curves:
            files.append(folder / f"{scenario}.png")
            _draw(files[-1], scenario, curves)
    return files


def _draw(path: Path, scenario: str, arms: dict[str, list[dict[str, list[float]]]]) -> None:
    columns = [
        {arm: runs for arm, runs in arms.items() if (ARMS[arm].family == "adamw") == adamw}
        for adamw in (True, False)
    ]
    columns = [column for column in columns if column]
    figure, grid = plt.subplots(
        3,
        len(columns),
        figsize=(6.5 * len(columns), 8.5),
        sharex=True,
        sharey="row",
        squeeze=False,
        height_ratios=(2, 1, 1),
        layout="constrained",
    )
    colors = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for (top, middle, bottom), column in zip(grid.T, columns, strict=True):
        for arm, runs in column.items():
            style = {"color": colors[list(ARMS).index(arm)], "label": ARMS[arm].title}
            style["linestyle"] = "--" if ARMS[arm].controller is None else "-"
            steps = range(len(runs[0]["norm"]))
            _band(top, runs[0]["times"], [run["validation"] for run in runs], style)
            _band(middle, steps, [run["norm"] for run in runs], style)
            if ARMS[arm].controller is not None:
                _band(bottom, steps[1:], [run["phi"] for run in runs], style)
        for axes in (top, middle, bottom):
            axes.axvline(len(steps) // 2, color="0.5", linewidth=0.8)
            axes.grid(visible=True, linewidth=0.3)
        bottom.set_ylim(-0.05, 1.05)
        bottom.set_xlabel(f"step; half-way, {SCENARIOS[scenario].begins}")
    for axes in (*grid[0], *grid[1]):
        low, high = axes.get_ylim()
        if high > 20 * max(low, 1e-9):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
    figure.suptitle(f"{SCENARIOS[scenario].title}: mean and range of {len(runs)} seeds")
    labels = ("validation (bits per byte)", "weight norm / initial", "gate Phi")
    for axes, label in zip(grid[:, 0], labels, strict=True):
        axes.set_ylabel(label)
    figure.legend(
        handles=[
            line for axes in grid[0] for line in axes.get_lines() if line.get_label()[0] != "_"
        ],
        loc="outside lower center",
        ncols=3 * len(columns),
        frameon=False,
        fontsize=8,
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _band(axes: Any, steps: Sequence[float], runs: Sequence[list[float]], style: Any) -> None:
    # A run that is not finite has no place on the axis: it leaves the mean and the band.
    values = np.array([[math.nan if v is None else v for v in run] for run in runs], dtype=float)
    shown = np.isfinite(values).any(axis=0)
    at, values = np.asarray(steps)[shown], values[:, shown]
    axes.plot(at, np.nanmean(values, axis=0), linewidth=1.3, **style)
    axes.fill_between(
        at,
        np.nanmin(values, axis=0),
        np.nanmax(values, axis=0),
        color=style["color"],
        alpha=0.12,
        linewidth=0,
    )


def draw_sensitivity(path: Path, rows: Sequence[dict[str, Any]], pairs: Sequence[Any]) -> None:
    """Draw the final validation over pairs of settings, a row of maps a scenario.

    Args:
        path: of the figure.
        rows: of the summary, with their changes of the default's settings.
        pairs: ((name, values), (name, values)) of each map.
    """
    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    figure, grid = plt.subplots(
        len(scenarios),
        len(pairs),
        figsize=(4.2 * len(pairs), 2.9 * len(scenarios)),
        squeeze=False,
        layout="constrained",
    )
    for line, scenario in zip(grid, scenarios, strict=True):
        mine = [row for row in rows if row["scenario"] == scenario]
        found = [row["final"][0] for row in mine if row["final"]]
        for axes, ((down, ys), (across, xs)) in zip(line, pairs, strict=True):
            values = np.full((len(ys), len(xs)), math.nan)
            for row in mine:
                changes = row["changes"]
                if set(changes) == {down, across} and row["final"]:
                    values[ys.index(changes[down]), xs.index(changes[across])] = row["final"][0]
            # Half a bit of colours at least: what differs by less looks alike.
            low, high = min(found), max(max(found), min(found) + 0.5)
            axes.imshow(values, vmin=low, vmax=high, cmap="viridis_r", aspect="auto")
            middle = (low + high) / 2
            for (y, x), value in np.ndenumerate(values):
                color = "white" if value > middle else "black"
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
            axes.set_xticks(range(len(xs)), [_plain(x) for x in xs])
            axes.set_yticks(range(len(ys)), [_plain(y) for y in ys])
            axes.set_xlabel(across)
            axes.set_ylabel(down)
            axes.set_title(SCENARIOS[scenario].title, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plain(value: Any) -> str:
    return "+".join(value) or "none" if isinstance(value, tuple) else f"{value:g}"
