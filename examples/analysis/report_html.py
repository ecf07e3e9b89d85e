"""One HTML file with everything in it: tables, figures as base64, no script, nothing fetched."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from analysis import figures
from analysis.cost import ModelCost
from analysis.records import Log, Record
from analysis.savings import Saving
from analysis.series_laws import ArmLaws
from analysis.verdict import Comparison, headlines

__all__ = ["gate_rows", "render_report"]


def render_report(
    records: Sequence[Record],
    logs: Mapping[tuple[str, int], Log],
    comparisons: Sequence[Comparison],
    savings: Sequence[Saving],
    laws: Sequence[ArmLaws],
    costs: Sequence[ModelCost],
    plans: Mapping[str, Mapping[str, Any]],
    core: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """The report as HTML.

    Args:
        records: of the trained models.
        logs: of their steps, as far as there are any.
        comparisons: of the arms.
        savings: of the arms, where there are logs.
        laws: of every arm.
        costs: of every arm and seed.
        plans: title -> `analysis.paper.plan_cost`, series on paper.
        core: name of a model -> `analysis.core.CoreResult.to_dict`; ``None`` if none was evaluated.
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
    }
    drawn = {
        "flops": figures.loss_against_flops(records, logs),
        "depth": figures.bpb_against_depth(records),
        "scaling": figures.scaling(laws),
        "cost": figures.costs(costs, records),
        "gates": figures.gates(logs, records),
    }
    return environment.get_template("report.html.j2").render(
        records=records,
        seeds=sorted({record.seed for record in records}),
        headlines=headlines(comparisons),
        comparisons=comparisons,
        savings=savings,
        laws=[law.to_dict() for law in laws],
        costs=costs,
        plans=plans,
        gates=gate_rows(records, logs),
        core=core or {},
        figures={
            name: None if png is None else base64.b64encode(png).decode()
            for name, png in drawn.items()
        },
    )


def gate_rows(
    records: Sequence[Record], logs: Mapping[tuple[str, int], Log]
) -> list[dict[str, Any]]:
    """What the controller and the penalty did in each logged model.

    Args:
        records: of the trained models.
        logs: of their steps.

    Returns:
        One row a logged model: mean phi and psi, share of steps with phi below 0.99, and the
        largest ratio of penalty to task loss; ``None`` for what was not logged.
    """
    rows = []
    for record in records:
        steps = [s for s in logs.get((record.name, record.seed), []) if s["loss"] is not None]
        if not steps:
            continue
        phi = [step["phi"] for step in steps if step["phi"] is not None]
        psi = [step["psi"] for step in steps if step["psi"] is not None]
        shares = [s["penalty"] / s["loss"] for s in steps if s["penalty"] is not None and s["loss"]]
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
