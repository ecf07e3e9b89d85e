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
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import ars
from analysis.comparisons import QUESTIONS, headlines, single_arms
from analysis.records import Logs, Record, read_logs, read_metrics, run_settings, thinned_curve
from analysis.report_figures import bpb_against_depth, grid_map, loss_against_flops
from analysis.run_report import Analysis, analyze_runs, write_report
from analysis.sweeps import Grid, Sweep, find_grid, strength_word
from common.errors import UsageError
from common.plain_files import read_json, write_atomically
from common.statistics import Estimate
from common.tables import markdown
from experiment.experiment_design import STAGES
from experiment.findings import SizeRow, find_sizes, find_sweeps, sentence_of

__all__ = ["SUMMARY_FILE", "TABLE_FILE", "results_table", "write_summary"]

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


def results_table(
    analysis: Analysis | None,
    sizes: Sequence[SizeRow],
    grid: Grid | None,
    sweeps: Sequence[Sweep],
    unfinished: Sequence[str],
    left_out: Sequence[str],
) -> str:
    """What was found, the most important first.

    Args:
        analysis: of the arms; ``None`` if none was trained yet.
        sizes: models of other sizes with the operations of the largest.
        grid: of the strengths, if there is one.
        sweeps: settings that were tuned.
        unfinished: series whose models are not all there, in words.
        left_out: series that lie there and are none of the experiment's.
    """
    parts: list[str] = []
    if unfinished:
        parts += [f"Not finished: {', '.join(unfinished)}."]
    if left_out:
        parts += [f"Left out, since this design has no such series: {', '.join(left_out)}."]
    first = [sentence_of(sizes)] if sizes else []
    if analysis is not None:
        lines = [*first, *headlines(analysis.comparisons)]
        parts += ["\n".join(f"- {line}" for line in lines)]
        rows = [(claim.claim, claim.verdict, claim.evidence) for claim in analysis.claims]
        parts += ["## The proposal's claims", markdown([("claim", "verdict", "numbers"), *rows])]
        parts += ["## Arms", _arms(analysis), _ARMS_NOTE]
        parts += ["## Comparisons, paired by seed", _comparisons(analysis), _COMPARISONS_NOTE]
        parts += ["## Cost of scratch's final loss, over scratch's cost", _savings(analysis),
                  _SAVINGS_NOTE]  # fmt: skip
    if sizes:
        parts += ["## The largest model's operations, for one model from scratch", _sizes(sizes)]
    if grid is not None:
        parts += [f"## Strengths, d{grid.parent_depth} grown to d{grid.depth}", grid.sentence]
        parts += [_grid(grid)]
    if sweeps:
        parts += ["## Tuning", _sweeps(sweeps)]
    if analysis is not None and analysis.warnings:
        lines = [f"- {name}, seed {seed}: {text}" for name, seed, text in analysis.warnings]
        parts += ["## Warnings", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


_ARMS_NOTE = (
    "Bits per byte: mean over the seeds and 95 % t interval. FLOPs and tokens are those of the "
    "whole lineage, in the mean."
)
_COMPARISONS_NOTE = (
    "Bits per byte of the arm minus those of what it is held against; negative is better for the "
    "arm. 95 % t intervals; fewer than 3 seeds conclude nothing."
)
_SAVINGS_NOTE = (
    "Below 1 is cheaper. The arm is not cooled on the way to the final loss, so the first columns "
    "are upper bounds; trunk against trunk, both are uncooled. e: fresh tokens that an inherited "
    "one was worth."
)


def _arms(analysis: Analysis) -> str:
    records = analysis.healthy
    rows = [("depth", "arm", "seeds", "bits per byte", "FLOPs", "tokens", "seconds")]
    for depth in sorted({r.depth for r in records}):
        for arm in single_arms(records):
            own = [r for r in records if (r.depth, r.arm) == (depth, arm)]
            if not own:
                continue
            flops = sum(r.lineage_flops for r in own) / len(own)
            tokens = [r.lineage_tokens for r in own if r.lineage_tokens is not None]
            rows.append((
                f"d{depth}", arm, str(len(own)),
                Estimate.of([r.val_bpb for r in own]).plus_minus(".4f"),
                f"{flops:.3e}", f"{sum(tokens) / len(tokens):,.0f}" if tokens else "",
                f"{sum(r.seconds for r in own) / len(own):.0f}",
            ))  # fmt: skip
    return markdown(rows)


def _comparisons(analysis: Analysis) -> str:
    order = list(QUESTIONS)
    rows = [
        (
            c.arm,
            c.baseline,
            f"d{c.depth}",
            str(c.seeds),
            f"{c.difference:+.4f}" if math.isfinite(c.difference) else "",
            "" if c.interval is None else f"[{c.interval[0]:+.4f}, {c.interval[1]:+.4f}]",
            f"{c.flops_ratio:.3f}",
            c.conclusion,
        )
        for c in sorted(analysis.comparisons, key=lambda c: order.index(c.question))
    ]
    header = ("arm", "against", "depth", "seeds", "difference", "interval", "FLOPs ratio",
              "conclusion")  # fmt: skip
    return markdown([header, *rows])


def _savings(analysis: Analysis) -> str:
    rows = []
    for s in analysis.savings:
        final = s.final
        costs = (
            (None, None, None, None)
            if final is None
            else (final.with_parents, final.without_parents, final.tokens_with_parents,
                  final.tokens_without_parents)
        )  # fmt: skip
        trunk = None if s.trunk is None else s.trunk.with_parents
        cells = [
            *(_ratio(value, is_bound=final is not None and final.is_bound) for value in costs),
            _ratio(trunk, is_bound=s.trunk is not None and s.trunk.is_bound),
            _ratio(s.efficiency),
        ]
        rows.append((s.arm, f"d{s.depth}", f"{s.reached} of {s.seeds}", *cells))
    header = ("arm", "depth", "reached", "FLOPs", "without parents", "tokens", "without parents",
              "FLOPs, trunks", "e")  # fmt: skip
    return markdown([header, *rows])


def _sizes(sizes: Sequence[SizeRow]) -> str:
    rows = [
        (
            f"d{row.depth}",
            str(len(row.bits.values)),
            row.bits.plus_minus(".4f") + (f", {row.diverged} diverged" if row.diverged else ""),
            "" if row.grown is None else row.grown.plus_minus("+.4f"),
            f"{row.flops:.3e}",
            f"{row.tokens:,.0f}",
        )
        for row in sizes
    ]
    largest = f"d{sizes[-1].depth} grown"
    header = ("depth", "seeds", "bits per byte", f"{largest} minus this", "FLOPs", "tokens")
    note = f"Negative: {largest} is better than this size from scratch."
    if sizes[0].grown_diverged:
        note += f" {sizes[0].grown_diverged} models of {largest} diverged and are not in it."
    return f"{markdown([header, *rows])}\n\n{note}"


def _grid(grid: Grid) -> str:
    rows = []
    for ewc in grid.lambdas:
        cells = []
        for subspace in grid.gammas:
            cell = grid.at(ewc, subspace)
            if cell is None:
                cells.append("0" if ewc is subspace is None else "")
                continue
            text = "diverged" if cell.diverged else cell.difference.plus_minus("+.4f")
            mean, *margin = text.split(" ", 1)
            cells.append(" ".join([f"**{mean}**" if cell.proposed else mean, *margin]))
        rows.append((strength_word(ewc), *cells))
    header = ("lambda \\ gamma", *map(strength_word, grid.gammas))
    return (
        f"{markdown([header, *rows])}\n\nBits per byte minus those of plain growing "
        f"({grid.baseline:.4f}), paired, mean of {grid.seeds} seeds and 95 % t interval; bold: the "
        "proposal's pairs."
    )


def _sweeps(sweeps: Iterable[Sweep]) -> str:
    rows = [
        (
            s.setting,
            f"d{s.depth}",
            ", ".join(
                f"{v:g}: {loss.mean:.4f}" for v, loss in zip(s.values, s.losses, strict=True)
            ),
            f"{s.best:g}",
            "no, at the edge" if s.at_edge else "yes",
        )
        for s in sweeps
    ]
    header = ("setting", "depth", "bits per byte", "best", "inside the values tried")
    return markdown([header, *rows])


def _ratio(value: Estimate | None, *, is_bound: bool = False) -> str:
    return "–" if value is None else f"{'≤ ' if is_bound else ''}{value:.2f}"
