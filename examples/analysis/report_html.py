"""One HTML file with everything in it: tables, figures as base64, no script, nothing fetched."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from analysis import detail_figures, figures
from analysis.assemble import Analysis
from analysis.intervals import Estimate
from analysis.pairings import QUESTIONS
from analysis.records import Log, Record
from analysis.series_laws import ArmLaws
from analysis.sweeps import Sweep
from analysis.verdict import headlines
from trainer.checkpoint import write_atomically
from trainer.health import numbers_apart

__all__ = ["REPORT_FILE", "gate_rows", "render_report", "write_report"]

REPORT_FILE = "report.html"

_LAWS = {
    "chinchilla": ("E + A/N^alpha + B/D^beta", ("E", "A", "B", "alpha", "beta", "a")),
    "compute": ("E + K C^-gamma", ("E", "K", "gamma")),
    "isoflop": ("isoFLOP, N* ~ C^a and D* ~ C^b", ("a", "b")),
}


def write_report(
    analysis: Analysis, out: Path, sweeps: Sequence[Sweep] = (), *, first: Sequence[str] = ()
) -> str:
    """Write the report.

    Args:
        analysis: reported.
        out: folder; made if absent.
        sweeps: settings that were tuned before.
        first: sentences that go before all conclusions.

    Returns:
        The name of the file.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / REPORT_FILE, render_report(analysis, sweeps, first=first))
    return REPORT_FILE


def render_report(
    analysis: Analysis, sweeps: Sequence[Sweep] = (), *, first: Sequence[str] = ()
) -> str:
    """The report as HTML.

    Args:
        analysis: reported.
        sweeps: settings that were tuned before.
        first: sentences that go before all conclusions.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": lambda value: f"{value:,}",
        "power": lambda value: f"{value:.3g}",
        "bits": lambda value: f"{value:.4f}",
        "signed": lambda value: f"{value:+.4f}",
        "interval": lambda pair: "" if pair is None else f"[{pair[0]:+.4f}, {pair[1]:+.4f}]",
        "span": lambda pair: f"[{pair[0]:.3g}, {pair[1]:.3g}]",
        "or_dash": lambda value, form: "–" if value is None else form.format(value),
        "estimate": _estimate,
    }
    fitted, refused = _law_rows(analysis.laws)
    compared = {
        words: [c for c in analysis.comparisons if c.question == question]
        for question, words in QUESTIONS.items()
    }
    return environment.get_template("report.html.j2").render(
        records=analysis.records,
        seeds=sorted({record.seed for record in analysis.records}),
        headlines=[*first, *headlines(analysis.comparisons)],
        claims=analysis.claims,
        warnings=_grouped(analysis.warnings),
        comparisons={words: rows for words, rows in compared.items() if rows},
        count=len(analysis.comparisons),
        savings=analysis.savings,
        grid=analysis.grid,
        sweeps=sweeps,
        fitted=fitted,
        refused=refused,
        costs=analysis.costs,
        plans=analysis.plans,
        gates=gate_rows(analysis.records, analysis.logs),
        core=analysis.core,
        figures={
            name: base64.b64encode(content).decode()
            for name, content in _figures(analysis, sweeps).items()
            if content is not None
        },
    )


def _figures(analysis: Analysis, sweeps: Sequence[Sweep]) -> dict[str, bytes | None]:
    records, logs = analysis.healthy, analysis.logs
    drawn: dict[str, bytes | None] = {}
    if records:
        drawn = {
            "flops": figures.loss_against_flops(records, logs),
            "depth": figures.bpb_against_depth(records, analysis.comparisons),
            "scaling": detail_figures.scaling(analysis.laws),
            "cost": detail_figures.costs(analysis.costs, records),
            "gates": detail_figures.gates(logs, records),
        }
    if analysis.grid is not None:
        drawn["grid"] = detail_figures.grid_map(analysis.grid)
    if sweeps:
        drawn["sweeps"] = detail_figures.sweep_curves(sweeps)
    return drawn


def _estimate(value: Estimate | None) -> str:
    if value is None:
        return "–"
    if value.interval is None:
        return f"{value.mean:.2f}"
    return f"{value.mean:.2f} [{value.interval[0]:.2f}, {value.interval[1]:.2f}]"


def _grouped(warnings: Sequence[tuple[str, int, str]]) -> dict[str, list[str]]:
    """Text -> the models it was said of, with its numbers where these differ."""
    kinds: dict[str, list[tuple[str, str, str]]] = {}
    for name, seed, text in warnings:
        kind, numbers = numbers_apart(text)
        kinds.setdefault(kind, []).append((f"{name} (seed {seed}", ", ".join(numbers), text))
    found = {}
    for kind, said in kinds.items():
        same = len({text for *_, text in said}) == 1
        key = said[0][2] if same else kind
        found[key] = [f"{where})" if same else f"{where}: {values})" for where, values, _ in said]
    return found


def _law_rows(laws: Sequence[ArmLaws]) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The laws that were fitted, and for each reason why not: which laws of which arms."""
    fitted: list[dict[str, Any]] = []
    refused: dict[str, dict[str, Any]] = {}
    for arm in laws:
        found = arm.to_dict()
        for key, (title, names) in _LAWS.items():
            law = found[key]
            if "refused" in law:
                row = refused.setdefault(law["refused"], {"laws": [], "arms": []})
                for kind, value in (("laws", title), ("arms", arm.arm)):
                    if value not in row[kind]:
                        row[kind].append(value)
                continue
            score = found.get(f"{key}_score", {"refused": ""})
            error = law.get("rms_relative_error")
            held_out = None if "refused" in score else score["rms_relative_error"]
            fitted.append({
                "arm": arm.arm,
                "title": title,
                "values": ", ".join(f"{name} = {law[name]:.3g}" for name in names),
                "flaws": law.get("flaws", []),
                "intervals": law["intervals"],
                "error": None if error is None else 100 * error,
                "held_out": None if held_out is None else 100 * held_out,
            })  # fmt: skip
    return fitted, refused


def gate_rows(
    records: Sequence[Record], logs: Mapping[tuple[str, int], Log]
) -> list[dict[str, Any]]:
    """What the controller and the penalty did in each logged model.

    Args:
        records: of the trained models.
        logs: of their steps.

    Returns:
        One row a logged model with a controller or a penalty: mean phi and psi, share of steps with
        phi below 0.99, and the largest ratio of penalty to task loss; ``None`` for what was not
        logged.
    """
    rows = []
    for record in records:
        steps = [s for s in logs.get((record.name, record.seed), []) if s["loss"] is not None]
        phi = [step["phi"] for step in steps if step["phi"] is not None]
        psi = [step["psi"] for step in steps if step["psi"] is not None]
        shares = [s["penalty"] / s["loss"] for s in steps if s["penalty"] is not None and s["loss"]]
        if not (phi or psi or shares):
            continue
        rows.append({
            "name": record.name,
            "seed": record.seed,
            "steps": len(steps),
            "phi": sum(phi) / len(phi) if phi else None,
            "psi": sum(psi) / len(psi) if psi else None,
            "damped": sum(value < 0.99 for value in phi) / len(phi) if phi else None,
            "penalty": max(shares) if shares else None,
        })  # fmt: skip
    return rows
