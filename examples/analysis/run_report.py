"""Everything that is known of one or more runs: found once, written as JSON and as one HTML file.

The HTML file has everything in it: tables, figures as base64, no script, nothing fetched.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from analysis import report_figures
from analysis.claims import Claim, decide_claims
from analysis.comparisons import QUESTIONS, Comparison, compare_arms, headlines, read_arm
from analysis.costs import CostAnalyzer, ModelCost
from analysis.planned_series import plan_cost, plan_depths, plan_doubling
from analysis.power_laws import ChinchillaLaw, ComputeLaw
from analysis.records import (
    Logs,
    Record,
    read_logs,
    read_metrics,
    run_settings,
    sizes_of,
    training_log,
)
from analysis.scaling_laws import ArmLaws, ScalingLawValidator, fit_series
from analysis.series_account import ACCOUNT_NOTE, SeriesAccount, find_accounts, own_accounts
from common.errors import UsageError
from common.plain_files import write_atomically
from common.statistics import count_seeds
from trainer.recorder import numbers_apart

__all__ = [
    "REPORT_FILE", "Analysis", "analyze_runs", "gate_rows", "render_report", "write_json",
    "write_run_analysis",
]  # fmt: skip

REPORT_FILE = "report.html"

_METRICS_FOLDER = "metrics"
_RUN_BOOTSTRAPS = 50  # enough to see how wide an interval is; analyze.py takes 1000
_LAWS = {
    "chinchilla": ("E + A/N^alpha + B/D^beta", ChinchillaLaw.shown),
    "compute": ("E + K C^-gamma", ComputeLaw.shown),
    "isoflop": ("isoFLOP, N* ~ C^a and D* ~ C^b", ("a", "b")),
}


@dataclass(frozen=True)
class Analysis:
    """What is known of a set of runs.

    Args:
        settings: of each run, as far as known.
        records: of all models.
        logs: of their steps, as far as there are any.
        comparisons: of the arms.
        accounts: of the grown series, beside their twins.
        claims: decided.
        laws: of every arm.
        costs: of every arm and seed.
        prices: what costs were counted with; the devices are ``None`` where those recorded were.
        core: name of a model -> `analysis.core.CoreResult.to_dict`.
    """

    settings: list[dict[str, Any]]
    records: list[Record]
    logs: Logs
    comparisons: list[Comparison]
    accounts: list[SeriesAccount]
    claims: list[Claim]
    laws: list[ArmLaws]
    costs: list[ModelCost]
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
    accounts = find_accounts(records)
    return Analysis(
        settings=run_settings(paths),
        records=records,
        logs=logs,
        comparisons=compare_arms(records),
        accounts=accounts,
        claims=decide_claims(records, logs, accounts),
        laws=fit_series(healthy, ScalingLawValidator(bootstraps=bootstraps)),
        costs=costs,
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
    contents: dict[str, Any] = {
        "training_log.json": training_log(analysis.settings, analysis.records, analysis.logs),
        "scaling_laws.json": {
            "claims": [asdict(claim) for claim in analysis.claims],
            "comparisons": [comparison.to_dict() for comparison in analysis.comparisons],
            "arms": [law.to_dict() for law in analysis.laws],
        },
        "cost_analysis.json": {
            **analysis.prices,
            "series": [account.to_dict() for account in analysis.accounts],
            "models": [asdict(cost) for cost in analysis.costs],
            "on_paper": analysis.plans,
        },
    }
    if analysis.core:
        contents["core.json"] = analysis.core
    folder = out / _METRICS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_atomically(folder / name, json.dumps(content, indent=2, allow_nan=False) + "\n")
    return [f"{_METRICS_FOLDER}/{name}" for name in contents]


def render_report(analysis: Analysis) -> str:
    """The report as HTML."""
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
    fitted, refused = _law_rows(analysis.laws)
    compared = {
        words: [c for c in analysis.comparisons if c.question == question]
        for question, words in QUESTIONS.items()
    }
    return environment.get_template("report.html.j2").render(
        records=analysis.records,
        seeds=sorted({record.seed for record in analysis.records}),
        trained=_what_was_trained(analysis.records),
        gains=[" ".join(account.sentences) for account in _most_saving_first(analysis.accounts)],
        answers=headlines(analysis.comparisons),
        claims=analysis.claims,
        warnings=_grouped(analysis.warnings),
        comparisons={words: rows for words, rows in compared.items() if rows},
        count=len(analysis.comparisons),
        accounts=analysis.accounts,
        account_note=ACCOUNT_NOTE,
        fitted=fitted,
        refused=refused,
        costs=analysis.costs,
        plans=analysis.plans,
        gates=gate_rows(analysis.records, analysis.logs),
        core=analysis.core,
        figures={
            name: base64.b64encode(content).decode()
            for name, content in _figures(analysis).items()
            if content is not None
        },
    )


def _figures(analysis: Analysis) -> dict[str, bytes | None]:
    records, logs = analysis.healthy, analysis.logs
    drawn: dict[str, bytes | None] = {}
    if records:
        drawn = {
            "sizes": report_figures.losses_by_size(records, analysis.comparisons),
            "scaling": report_figures.scaling(analysis.laws),
            "cost": report_figures.costs(analysis.costs, records),
            "gates": report_figures.gates(logs, records),
            "pulls": report_figures.pulls(records),
            "curves": report_figures.loss_curves(logs, records),
        }
    if records and (accounts := own_accounts(analysis.accounts)):
        drawn["series"] = report_figures.series_costs(accounts)
        drawn["cooled"] = report_figures.cooled_branches(accounts)
    return drawn


def _what_was_trained(records: Sequence[Record]) -> str:
    """The models in a sentence."""
    sizes = sizes_of(records)
    of_sizes = sizes[0] if len(sizes) == 1 else f"{len(sizes)} sizes, {sizes[0]} to {sizes[-1]}"
    of_sizes += " (layers x width)" if "x" in sizes[0] else ""
    params = sorted({record.params for record in records})
    many = f"{params[0]:,}" if len(params) == 1 else f"{params[0]:,} to {params[-1]:,}"
    models = "1 model" if len(records) == 1 else f"{len(records)} models"
    seeds = count_seeds(len({record.seed for record in records}))
    seconds = sum(record.seconds for record in records)
    return f"{models} of {of_sizes}, {many} parameters, {seeds}, {_duration(seconds)} of training."


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _most_saving_first(accounts: Sequence[SeriesAccount]) -> list[SeriesAccount]:
    return sorted(accounts, key=lambda account: (not account.at_equal_loss, account.paid.mean))


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


def gate_rows(records: Sequence[Record], logs: Logs) -> list[dict[str, Any]]:
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


def write_run_analysis(
    folder: Path, *, peak_flops: float | None = None, price_per_hour: float | None = None
) -> list[str]:
    """Write ``metrics/*.json`` and ``report.html`` from what lies in a run's folder.

    Args:
        folder: with ``metrics.json``, ``config.json`` and the logs of a series, which may not be
            finished.
        peak_flops: operations a second of one device; ``None`` gives no MFU.
        price_per_hour: of one device; ``None`` gives no prices.

    Returns:
        The names of the files, relative to the folder.

    Raises:
        UsageError: the files are not as they should be, or the peak cannot be true.
    """
    analysis = analyze_runs(
        [folder / "metrics.json"],
        bootstraps=_RUN_BOOTSTRAPS,
        peak_flops=peak_flops,
        price_per_hour=price_per_hour,
    )
    written = write_json(analysis, folder)
    write_atomically(folder / REPORT_FILE, render_report(analysis))
    return [*written, REPORT_FILE]
