"""What an experiment amounts to: one JSON file with every number, a table, figures and a report.

    summary.json      settings, versions, every model's record and thinned curve, what was concluded
    table.md          the same for reading
    arms_flops.png    validation loss against operations
    arms_depth.png    bits per byte against depth, and differences to the model from scratch
    grid.png          the strengths of the penalties on one transition
    report.html       all of it, with costs, laws and gates

Any stage may be missing or unfinished: what there is is summed up.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import ars
from analysis.records import Logs, Record, read_logs, read_metrics, run_settings, thinned_curve
from analysis.report_figures import bpb_against_depth, grid_map, loss_against_flops
from analysis.run_report import Analysis, analyze_runs, write_report
from analysis.sweeps import Grid, Sweep, find_grid
from experiment.design import STAGES
from experiment.sizes import SizeRow, find_sizes, sentence_of
from experiment.table import results_table
from experiment.tuning import find_sweeps
from trainer.checkpoint import write_atomically
from trainer.errors import UsageError
from trainer.reading import read_json

__all__ = ["SUMMARY_FILE", "TABLE_FILE", "write_summary"]

SUMMARY_FILE = "summary.json"
TABLE_FILE = "table.md"

_BOOTSTRAPS = 200
_CURVES = {
    "tune": ("flops", "val_bpb"),
    "grid": ("flops", "val_bpb"),
    "sizes": ("flops", "val_bpb"),
    "arms": ("tokens", "flops", "val_bpb", "loss", "phi", "psi", "penalty"),
}
_OF_THE_RUN = ("seed", "data_sha256", "python", "torch", "devices")  # said once, not of each model


@dataclass(frozen=True)
class _Series:
    """One series of the experiment, as far as it got."""

    stage: str
    path: Path  # of its metrics.json
    settings: dict[str, Any]
    data: dict[str, Any]
    entries: list[dict[str, Any]]
    records: list[Record]
    logs: Logs

    @property
    def name(self) -> str:
        return _name(self.path)

    @property
    def missing(self) -> list[str]:
        """Arms that have no model at the largest depth yet."""
        depth = max(self.settings.get("depths", [0]))
        there = {r.arm for r in self.records if r.depth == depth}
        return [arm for arm in self.settings.get("arms", []) if arm not in there]


def write_summary(folder: Path, names: Collection[str]) -> str:
    """Sum up an experiment.

    Args:
        folder: of the experiment.
        names: its series, such as "arms/seed-0", as far as they are there; others are left out.

    Returns:
        The text of ``table.md``.

    Raises:
        UsageError: no model is finished, or a file is damaged.
    """
    there = [path for stage in STAGES for path in _metrics(folder / stage)]
    series = [_read(path) for path in there if _name(path) in names]
    if not series:
        raise UsageError(f"{folder} holds no finished model yet: let the experiment go on")
    of = {stage: [s for s in series if s.stage == stage] for stage in STAGES}
    sweeps = find_sweeps([(s.settings, s.records) for s in of["tune"]])
    grid = find_grid(_records(of["grid"]))
    sizes = find_sizes(_records(of["sizes"]), _records(of["arms"]))
    shown = of["arms"] or of["grid"][:1]  # the grid's series repeat their first model
    analysis = None
    if shown:
        analysis = analyze_runs([s.path for s in shown], bootstraps=_BOOTSTRAPS)
        first = [sentence_of(sizes)] if sizes else []
        write_report(replace(analysis, grid=grid), folder, sweeps, first=first)
    arms = analysis if of["arms"] else None
    unfinished = [f"{s.name} ({', '.join(s.missing)})" for s in series if s.missing]
    left_out = [_name(path) for path in there if _name(path) not in names]
    table = results_table(arms, sizes, grid, sweeps, unfinished, left_out)
    write_atomically(folder / TABLE_FILE, table)
    write_atomically(folder / SUMMARY_FILE, _as_lines(_content(series, arms, sizes, grid, sweeps)))
    for name, content in _figures(arms, grid).items():
        (folder / name).write_bytes(content)
    return table


def _records(series: Sequence[_Series]) -> list[Record]:
    return [record for s in series for record in s.records]


def _metrics(folder: Path) -> list[Path]:
    """Of a stage; series without a controller first, so that they are drawn and listed first."""
    return sorted(folder.glob("*/metrics.json"), key=lambda p: (p.parent.name.count("ars"), p))


def _name(metrics: Path) -> str:
    return f"{metrics.parent.parent.name}/{metrics.parent.name}"


def _read(path: Path) -> _Series:
    records = read_metrics([path])
    stored = run_settings([path])
    return _Series(
        stage=path.parent.parent.name,
        path=path,
        settings=stored[0].get("settings", {}) if stored else {},
        data=stored[0].get("data", {}) if stored else {},
        entries=read_json(path, remedy="name another folder with --out"),
        records=records,
        logs=read_logs([path], records),
    )


def _content(
    series: Sequence[_Series],
    analysis: Analysis | None,
    sizes: Sequence[SizeRow],
    grid: Grid | None,
    sweeps: Sequence[Sweep],
) -> dict[str, Any]:
    return {
        "versions": {"ars": ars.__version__, "numpy": np.__version__},
        "data": series[0].data,
        "claims": [] if analysis is None else [asdict(claim) for claim in analysis.claims],
        "comparisons": [] if analysis is None else [c.to_dict() for c in analysis.comparisons],
        "savings": [] if analysis is None else [asdict(s) for s in analysis.savings],
        "laws": [] if analysis is None else [law.to_dict() for law in analysis.laws],
        "sizes": [asdict(row) for row in sizes],
        "grid": None if grid is None else grid.to_dict(),
        "tuning": [sweep.to_dict() for sweep in sweeps],
        "runs": [
            {
                "run": s.name,
                "settings": s.settings,
                **{key: s.entries[0][key] for key in _OF_THE_RUN if key in s.entries[0]},
                "unfinished": s.missing,
            }
            for s in series
        ],
        "models": [
            {
                "run": s.name,
                **{key: _plain(v) for key, v in entry.items() if key not in _OF_THE_RUN},
                "curve": thinned_curve(
                    s.logs.get((record.name, record.seed), []), _CURVES[s.stage]
                ),
            }
            for s in series
            for entry, record in zip(s.entries, s.records, strict=True)
        ],
    }


def _plain(value: Any) -> Any:
    """The value as JSON can have it: there is no word for a loss that is no number."""
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _figures(analysis: Analysis | None, grid: Grid | None) -> dict[str, bytes]:
    drawn = {}
    if analysis is not None and analysis.healthy:
        drawn["arms_flops.png"] = loss_against_flops(analysis.healthy, analysis.logs)
        drawn["arms_depth.png"] = bpb_against_depth(analysis.healthy, analysis.comparisons)
    if grid is not None:
        drawn["grid.png"] = grid_map(grid)
    return drawn


def _as_lines(content: dict[str, Any]) -> str:
    """JSON with a line an entry of each list: small, and a change shows where it is."""

    def dump(value: Any) -> str:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))

    parts = []
    for key, value in content.items():
        text = dump(value)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(dump(item) for item in value) + "\n]"
        parts.append(f"{dump(key)}:{text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
