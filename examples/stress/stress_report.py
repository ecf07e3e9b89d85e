"""What the runs say together: a table and a figure a scenario, a CSV of all runs, a JSON file."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch

from common.plain_files import write_atomically
from common.statistics import Estimate, share_interval
from common.tables import markdown
from corpus import Corpus
from stress.compared_optimizers import ARMS
from stress.scenarios import SCENARIOS
from stress.stress_run import Job, Record

__all__ = ["draw_scenarios", "draw_sensitivity", "summarize", "tables", "write_summary"]

Row = dict[str, Any]

_AVERAGED = ("final", "peak_norm", "recovery", "wasted", "mean_phi", "mean_phi_before")
_OUTCOME = (
    "arm", "runs", "diverged [95 %]", "final bits", "against base", "against clipped AdamW",
)  # fmt: skip
_COURSE = ("arm", "peak norm", "recovery", "wasted", "mean Phi")


def _runs(jobs: Sequence[Job], records: Sequence[Record]) -> pd.DataFrame:
    """A row a run: what it is, and its metrics."""
    return pd.DataFrame([
        {"scenario": job.scenario, "arm": job.arm, "changes": job.changes, "rate": job.rate,
         "seed": job.seed, **record["metrics"]}
        for job, record in zip(jobs, records, strict=True)
    ])  # fmt: skip


def summarize(jobs: Sequence[Job], records: Sequence[Record]) -> list[Row]:
    """One row for each scenario, learning rate, arm and change of settings, over the seeds."""
    frame = _runs(jobs, records).astype(dict.fromkeys(_AVERAGED, float))
    groups = dict(iter(frame.groupby(["scenario", "rate", "arm", "changes"], sort=False)))
    rows = []
    for (scenario, rate, arm, changes), runs in groups.items():
        failed = int(runs["diverged"].sum())
        row: Row = {
            "scenario": scenario,
            "rate": rate,
            "arm": arm,
            "changes": dict(changes),
            "runs": len(runs),
            "diverged": failed,
            "diverged_interval": share_interval(failed, len(runs)),
        }
        values = {name: runs[name] for name in _AVERAGED}
        for name, control in _controls(arm).items():
            if (other := groups.get((scenario, rate, control, ()))) is not None:
                pairs = runs.merge(other, on="seed")
                values[name] = pairs["final_x"] - pairs["final_y"]
        row |= {name: _interval(found) for name, found in values.items()}
        lost = {name: int(found.isna().sum()) for name, found in values.items()}
        rows.append(row | {"not_finite": {name: count for name, count in lost.items() if count}})
    return rows


def _controls(arm: str) -> dict[str, str]:
    """The arms that an arm is compared with, by the names of the differences."""
    family = ARMS[arm].family
    controls = {"against_base": family}
    if family == "adamw":
        controls["against_clipped"] = "adamw-clip"  # the fair one
    return {name: control for name, control in controls.items() if control != arm}


def _interval(values: pd.Series) -> tuple[float, float | None] | None:
    """Mean and half the interval's width over the finite values; ``None`` without any."""
    if values.isna().all():
        return None
    found = Estimate.of(values.dropna().tolist())
    return found.mean, found.margin


def tables(rows: Sequence[Row]) -> str:
    """The rows in GitHub's Markdown, two tables a scenario and learning rate: end and course."""
    parts = []
    for scenario, rate in dict.fromkeys((row["scenario"], row["rate"]) for row in rows):
        mine = [r for r in rows if (r["scenario"], r["rate"]) == (scenario, rate)]
        title = SCENARIOS[scenario].title
        title += f", learning rate x {rate:g}" if len(SCENARIOS[scenario].rates) > 1 else ""
        outcome = markdown([_OUTCOME, *map(_outcome, mine)], "lr")
        course = markdown([_COURSE, *map(_course, mine)], "lr")
        parts.append(f"### {title}\n\n{outcome}\n\n{course}")
    return "\n\n".join(parts) + "\n"


def _arm(row: Row) -> str:
    changed = "".join(f", {name}={value}" for name, value in row["changes"].items())
    return ARMS[row["arm"]].title + changed


def _outcome(row: Row) -> list[str]:
    low, high = row["diverged_interval"]
    return [
        _arm(row),
        str(row["runs"]),
        f"{row['diverged'] / row['runs']:.0%} [{low:.0%}, {high:.0%}]",
        _text(row, "final", "{:.3f}"),
        _text(row, "against_base", "{:+.3f}"),
        _text(row, "against_clipped", "{:+.3f}"),
    ]


def _course(row: Row) -> list[str]:
    return [
        _arm(row),
        _text(row, "peak_norm", "{:.2f}"),
        _text(row, "recovery", "{:.0f}"),
        _text(row, "wasted", "{:.0f}"),
        _text(row, "mean_phi", "{:.3f}"),
    ]


def _text(row: Row, name: str, form: str) -> str:
    parts = []
    if row.get(name):
        mean, half = row[name]
        parts.append(form.format(mean))
        if half is not None:
            parts.append(f"± {form.format(half).lstrip('+')}")
    if name in row["not_finite"]:
        parts.append(f"({row['not_finite'][name]} not finite)")
    return " ".join(parts)


def write_summary(
    folder: Path, jobs: Sequence[Job], records: Sequence[Record], corpus: Corpus, command: str
) -> list[Row]:
    """Write ``summary.json``, ``runs.csv`` and ``tables.md``.

    Args:
        folder: output folder.
        jobs: what was run.
        records: one a job.
        corpus: the text.
        command: that was given, to be recorded.

    Returns:
        The rows of the summary.
    """
    rows = summarize(jobs, records)
    write_atomically(folder / "tables.md", tables(rows))
    runs = _runs(jobs, records)
    # The words that read back as the settings.
    runs["changes"] = [json.dumps(dict(c), allow_nan=False) if c else "" for c in runs["changes"]]
    write_atomically(folder / "runs.csv", runs.to_csv(index=False, lineterminator="\n"))
    identities = [record["identity"] for record in records]
    controllers = {i["arm"]: i["update"]["controller"] for i in identities if not i["changes"]}
    content = {
        "command": command,
        "torch": torch.__version__,
        "corpus": {**corpus.facts, "sha256": corpus.sha256},
        "size": records[0]["identity"]["size"],
        "controllers": controllers,
        "rows": [{name: _finite(value) for name, value in row.items()} for row in rows],
    }
    write_atomically(folder / "summary.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    return rows


def _finite(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


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
    values = pd.DataFrame(runs, columns=steps, dtype=float).dropna(axis="columns", how="all")
    at, low, high = values.columns, values.min(), values.max()
    axes.plot(at, values.mean(), linewidth=1.3, **style)
    axes.fill_between(at, low, high, color=style["color"], alpha=0.12, linewidth=0)


def draw_sensitivity(path: Path, rows: Sequence[dict[str, Any]], pairs: Sequence[Any]) -> None:
    """Draw the final validation over pairs of settings, a row of maps a scenario.

    Args:
        path: of the figure.
        rows: of the summary, with their changes of the default's settings.
        pairs: ((name, values), (name, values)) of each map.
    """
    frame = pd.DataFrame([
        {"scenario": row["scenario"], "final": row["final"][0] if row["final"] else math.nan}
        | {name: _plain(value) for name, value in row["changes"].items()}
        for row in rows
    ])  # fmt: skip
    scenarios = frame["scenario"].unique()
    figure, grid = plt.subplots(
        len(scenarios),
        len(pairs),
        figsize=(4.2 * len(pairs), 2.9 * len(scenarios)),
        squeeze=False,
        layout="constrained",
    )
    for line, scenario in zip(grid, scenarios, strict=True):
        mine = frame[frame["scenario"] == scenario]
        # Half a bit of colours at least: what differs by less looks alike.
        low = mine["final"].min()
        high = max(mine["final"].max(), low + 0.5)
        for axes, ((down, ys), (across, xs)) in zip(line, pairs, strict=True):
            found = mine.dropna(subset=[down, across]).pivot(
                index=down, columns=across, values="final"
            )
            sns.heatmap(
                found.loc[[*map(_plain, ys)], [*map(_plain, xs)]], ax=axes, vmin=low, vmax=high,
                cmap="viridis_r", annot=True, fmt=".2f", annot_kws={"fontsize": 8}, cbar=False,
            )  # fmt: skip
            axes.tick_params(axis="y", rotation=0)
            axes.set_title(SCENARIOS[scenario].title, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plain(value: Any) -> str:
    return "+".join(value) or "none" if isinstance(value, tuple) else f"{value:g}"
