"""Everything that is known of one or more runs, found once and written in every form."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.claims import Claim, decide_claims
from analysis.cost import CostAnalyzer, ModelCost
from analysis.grid import Grid, find_grid
from analysis.pairings import read_arm
from analysis.paper import plan_cost, plan_depths, plan_doubling
from analysis.records import Log, Record, read_logs, read_metrics
from analysis.savings import Saving, find_savings
from analysis.scaling import ScalingLawValidator
from analysis.series_laws import ArmLaws, fit_series
from analysis.training_log import run_settings, training_log
from analysis.verdict import Comparison, compare_arms
from trainer.checkpoint import write_atomically
from trainer.errors import UsageError

__all__ = ["METRICS_FOLDER", "Analysis", "analyze_runs", "write_json"]

METRICS_FOLDER = "metrics"


@dataclass(frozen=True)
class Analysis:
    """What is known of a set of runs.

    Args:
        settings: of each run, as far as known.
        records: of all models.
        logs: of their steps, as far as there are any.
        comparisons: of the arms.
        savings: of the arms, where there are logs.
        claims: decided.
        laws: of every arm.
        costs: of every arm and seed.
        grid: of strengths, if there is one.
        prices: what costs were counted with; the devices are ``None`` where those recorded were.
        core: name of a model -> `analysis.core.CoreResult.to_dict`.
    """

    settings: list[dict[str, Any]]
    records: list[Record]
    logs: dict[tuple[str, int], Log]
    comparisons: list[Comparison]
    savings: list[Saving]
    claims: list[Claim]
    laws: list[ArmLaws]
    costs: list[ModelCost]
    grid: Grid | None
    prices: dict[str, Any]
    core: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def healthy(self) -> list[Record]:
        """The models that did not diverge."""
        return [record for record in self.records if not record.diverged]

    @property
    def warnings(self) -> list[tuple[str, int, str]]:
        """Name, seed and text of every warning."""
        return [(r.name, r.seed, text) for r in self.records for text in r.warnings]

    @property
    def plans(self) -> dict[str, dict[str, Any]]:
        """Title -> costs of series on paper."""
        return {
            "d10 ... d20 on paper (8 tokens a parameter, as the first nanochat miniseries)":
                plan_cost(plan_depths()),
            "7M ... 7.2B on paper (20 tokens a parameter, C = 6 N D)": plan_cost(plan_doubling()),
        }  # fmt: skip


def analyze_runs(
    paths: Sequence[Path],
    *,
    bootstraps: int,
    peak_flops: float | None = None,
    price_per_hour: float | None = None,
    devices: int | None = None,
    core: Mapping[str, dict[str, Any]] | None = None,
) -> Analysis:
    """Analyse the runs whose ``metrics.json`` are given; nothing is written.

    Args:
        paths: of the metrics; logs and settings beside them are read too.
        bootstraps: resamples behind the intervals of the laws.
        peak_flops: operations a second of one device; ``None`` gives no MFU.
        price_per_hour: of one device; ``None`` gives no prices.
        devices: that worked at once; ``None`` for what the records say.
        core: results of evaluations.

    Raises:
        UsageError: the files are not as they should be, or the peak cannot be true.
    """
    records = sorted(read_metrics(paths), key=lambda record: _is_controlled(record.arm))
    logs = read_logs(paths, records)
    healthy = [record for record in records if not record.diverged]
    analyzer = CostAnalyzer(peak_flops=peak_flops, price_per_hour=price_per_hour, devices=devices)
    try:
        costs = analyzer.analyze(records)
    except ValueError as error:
        raise UsageError(str(error)) from None
    savings = find_savings(records, logs)
    return Analysis(
        settings=run_settings(paths),
        records=records,
        logs=logs,
        comparisons=compare_arms(records),
        savings=savings,
        claims=decide_claims(records, logs, savings),
        laws=fit_series(healthy, ScalingLawValidator(bootstraps=bootstraps)),
        costs=costs,
        grid=find_grid(records),
        prices={"peak_flops": peak_flops, "devices": devices, "price_per_hour": price_per_hour},
        core=dict(core or {}),
    )


def _is_controlled(word: str) -> bool:
    arm = read_arm(word)
    return arm is not None and arm.controller is not None


def write_json(analysis: Analysis, out: Path) -> list[str]:
    """Write the JSON files.

    Args:
        analysis: to write.
        out: folder; ``metrics`` is made in it.

    Returns:
        The names of the files, relative to ``out``.
    """
    grid = analysis.grid
    contents: dict[str, Any] = {
        "training_log.json": training_log(analysis.settings, analysis.records, analysis.logs),
        "scaling_laws.json": {
            "claims": [claim.to_dict() for claim in analysis.claims],
            "comparisons": [comparison.to_dict() for comparison in analysis.comparisons],
            "savings": [saving.to_dict() for saving in analysis.savings],
            "grid": None if grid is None else grid.to_dict(),
            "arms": [law.to_dict() for law in analysis.laws],
        },
        "cost_analysis.json": {
            **analysis.prices,
            "models": [cost.to_dict() for cost in analysis.costs],
            "on_paper": analysis.plans,
        },
    }
    if analysis.core:
        contents["core.json"] = analysis.core
    folder = out / METRICS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_atomically(folder / name, json.dumps(content, indent=2, allow_nan=False) + "\n")
    return [f"{METRICS_FOLDER}/{name}" for name in contents]
