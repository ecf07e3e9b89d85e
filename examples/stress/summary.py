"""What the runs say together: a table a scenario, a CSV of all runs, and a compact JSON file."""

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common.statistics import Estimate, share_interval
from common.tables import markdown
from stress.arms import ARMS
from stress.jobs import Job
from stress.scenarios import SCENARIOS
from stress.text import Corpus
from trainer.checkpoint import write_atomically

__all__ = ["summarize", "tables", "write_summary"]

Record = dict[str, Any]
Row = dict[str, Any]

_AVERAGED = ("final", "peak_norm", "recovery", "wasted", "mean_phi", "mean_phi_before")
_HEADER = (
    "arm", "runs", "diverged [95 %]", "final bits", "against base", "against clipped AdamW",
    "peak norm", "recovery", "wasted", "mean Phi",
)  # fmt: skip


def summarize(jobs: Sequence[Job], records: Sequence[Record]) -> list[Row]:
    """One row for each scenario, learning rate, arm and change of settings, over the seeds."""
    groups: dict[tuple[Any, ...], dict[int, Record]] = {}
    for job, record in zip(jobs, records, strict=True):
        key = (job.scenario, job.rate, job.arm, job.changes)
        groups.setdefault(key, {})[job.seed] = record["metrics"]
    rows = []
    for (scenario, rate, arm, changes), runs in groups.items():
        failed = sum(metrics["diverged"] for metrics in runs.values())
        row: Row = {
            "scenario": scenario,
            "rate": rate,
            "arm": arm,
            "changes": dict(changes),
            "runs": len(runs),
            "diverged": failed,
            "diverged_interval": share_interval(failed, len(runs)),
        }
        values = {name: [metrics[name] for metrics in runs.values()] for name in _AVERAGED}
        for name, control in _controls(arm).items():
            other = groups.get((scenario, rate, control, ()), {})
            if other:
                values[name] = [
                    _difference(runs[seed]["final"], other[seed]["final"])
                    for seed in runs.keys() & other
                ]
        row |= {name: _interval(found) for name, found in values.items()}
        row["not_finite"] = {
            name: found.count(None) for name, found in values.items() if None in found
        }
        rows.append(row)
    return rows


def _controls(arm: str) -> dict[str, str]:
    """The arms that an arm is compared with, by the names of the differences."""
    family = ARMS[arm].family
    controls = {"against_base": family}
    if family == "adamw":
        controls["against_clipped"] = "adamw-clip"  # the fair one
    return {name: control for name, control in controls.items() if control != arm}


def _difference(mine: float | None, other: float | None) -> float | None:
    return None if mine is None or other is None else mine - other


def _interval(values: Sequence[float | None]) -> tuple[float, float | None] | None:
    """Mean and half the interval's width over the finite values; ``None`` without any."""
    finite = [value for value in values if value is not None]
    if not finite:
        return None
    found = Estimate.of(finite)
    return found.mean, found.margin


def tables(rows: Sequence[Row]) -> str:
    """The rows as tables of GitHub's markdown, one a scenario and learning rate."""
    parts = []
    for scenario, rate in dict.fromkeys((row["scenario"], row["rate"]) for row in rows):
        mine = [r for r in rows if (r["scenario"], r["rate"]) == (scenario, rate)]
        title = SCENARIOS[scenario].title
        title += f", learning rate x {rate:g}" if len(SCENARIOS[scenario].rates) > 1 else ""
        parts.append(f"### {title}\n\n{markdown([_HEADER, *map(_cells, mine)], 'lr')}")
    return "\n\n".join(parts) + "\n"


def _cells(row: Row) -> list[str]:
    changed = "".join(f", {name}={value}" for name, value in row["changes"].items())
    low, high = row["diverged_interval"]
    return [
        ARMS[row["arm"]].title + changed,
        str(row["runs"]),
        f"{row['diverged'] / row['runs']:.0%} [{low:.0%}, {high:.0%}]",
        _text(row, "final", "{:.3f}"),
        _text(row, "against_base", "{:+.3f}"),
        _text(row, "against_clipped", "{:+.3f}"),
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
    names = list(records[0]["metrics"])
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    keys = ("scenario", "arm", "changes", "rate", "seed")
    table.writerow([*keys, *names])
    for job, record in zip(jobs, records, strict=True):
        changes = json.dumps(dict(job.changes), allow_nan=False) if job.changes else ""
        values = (job.scenario, job.arm, changes, job.rate, job.seed)
        table.writerow([*values, *record["metrics"].values()])
    write_atomically(folder / "runs.csv", text.getvalue())
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
