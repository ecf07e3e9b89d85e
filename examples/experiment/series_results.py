"""What the runs of the experiment say: one JSON file, one page of tables and one figure.

Everything here is made from the records of the runs alone, of those that are there: a series counts
in the seeds in which its chain and all its twins are finished.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from analysis import report_figures
from analysis.records import Record, read_metrics
from analysis.series_account import SeriesAccount, account_of
from ars.atomic import replacing
from common.plain_files import write_atomically
from common.statistics import Estimate
from common.tables import markdown
from experiment.series_design import (
    DESIGNS,
    PREDICTION,
    SEEDS_TO_REPORT,
    STAGES,
    Design,
    Stage,
    brackets_of,
    jobs_of,
)  # fmt: skip

__all__ = ["records_of", "write_results"]

_RUNS = "runs"
_SCRATCH, _GROWN = "scratch", "grown"
Runs = Mapping[str, Sequence[Record]]


def records_of(name: str, results: Path) -> Path:
    """Where the records of a run lie, its settings beside them.

    Args:
        name: of the run.
        results: folder of the results.
    """
    return results / _RUNS / name / "metrics.json"


def write_results(results: Path, design: Design, name: str) -> str:
    """Sum up the runs that are there.

    Args:
        results: folder with their records; for a design ``half``, ``half.json``, ``half.md`` and
            two figures, ``half.png`` and ``half-shares.png``, are written there, and
            ``series.json``: the savings that count and the efficiencies, of all designs there.
        design: of the experiment.
        name: of the design.

    Returns:
        What to tell the user.
    """
    runs = _read(results, design)
    accounts = dict(_accounts(runs, design))
    content = {
        "prediction": PREDICTION,
        "saving": {
            series: _saving(account) for series, account in accounts.items() if series in _REPORTED
        },
        "efficiency": [_efficiency(series, account) for series, account in accounts.items()],
        "same_budget": _same_budget(runs, design),
        "brackets": _brackets(runs, design),
        "accounts": {series: account.to_dict() for series, account in accounts.items()},
    }
    results.mkdir(parents=True, exist_ok=True)
    write_atomically(
        results / f"{name}.json", json.dumps(content, indent=1, allow_nan=False) + "\n"
    )
    whole = json.dumps(_of_all_designs(results), indent=1, allow_nan=False)
    write_atomically(results / "series.json", whole + "\n")
    page = _page(accounts, content)
    write_atomically(results / f"{name}.md", page)
    reported = [accounts[account] for account in _REPORTED if account in accounts]
    if reported:
        figures = {
            f"{name}.png": report_figures.series_costs(reported),
            f"{name}-shares.png": report_figures.cooled_branches(reported),
        }
        for file, figure in figures.items():
            with replacing(results / file) as unfinished:
                unfinished.write_bytes(figure)
    return page


_REPORTED = ("adamw", "muon")  # names of the series' own accounts


def _of_all_designs(results: Path) -> dict[str, Any]:
    """Of each optimizer the saving of the longest series with seeds enough, and all efficiencies.

    Where no series has seeds enough, the one with the most seeds counts.
    """
    saving: dict[str, dict[str, Any]] = {}
    efficiency: dict[tuple[str, int], dict[str, Any]] = {}
    for path in (results / f"{name}.json" for name in DESIGNS):
        if not path.exists():
            continue
        content = json.loads(path.read_text("utf-8"))
        for series, found in content["saving"].items():
            this = {"design": path.stem, **found}
            saving[series] = max(saving.get(series, this), this, key=_weight)
        for found in content["efficiency"]:
            efficiency.setdefault((found["series"], found["members"]), found)
    return {"prediction": PREDICTION, "saving": saving, "efficiency": list(efficiency.values())}


def _weight(saving: Mapping[str, Any]) -> tuple[int, int]:
    return min(saving["seeds"], SEEDS_TO_REPORT), saving["members"]


def _read(results: Path, design: Design) -> dict[str, list[Record]]:
    names = [job.name for stage in STAGES for job in jobs_of(stage, design)]
    paths = {name: records_of(name, results) for name in names}
    return {name: read_metrics([path]) for name, path in paths.items() if path.exists()}


def _records(runs: Runs, design: Design, stage: Stage) -> list[Record]:
    """Of all runs of a stage that are there."""
    names = [job.name for job in jobs_of(stage, design)]
    return [record for name in names for record in runs.get(name, ())]


def _accounts(runs: Runs, design: Design) -> Iterator[tuple[str, SeriesAccount]]:
    adamw, muon = _records(runs, design, "miniature"), _records(runs, design, "muon")
    uniform = _records(runs, design, "uniform")
    half = _records(runs, design, "point")
    search = _records(runs, design, "search")
    found: dict[str, SeriesAccount | None] = {
        "adamw": account_of("grown", "scratch", adamw, adamw),
        "muon": account_of("grown+muon", "scratch+muon", muon, muon),
        "muon beside AdamW's twins": account_of("grown+muon", "scratch", muon, adamw),
        "grown at a half of the trunk": account_of("grown", "scratch", half, adamw),
        "one share for all": account_of("grown", "scratch", uniform, uniform),
    }
    later = [record for record in adamw if record.size != design.base.depths[0]]
    for name in design.subsets:  # their first member is its own twin, trained like it
        chain = _named(runs, f"factor/{name}-of-")
        found[name] = account_of("grown", "scratch", chain, [*later, *chain])
    twins = [record for record in search if record.parent is None]
    for name in design.search:
        chain = _named(runs, f"search/chain-{name}-seed-")
        found[f"search: {name}"] = account_of("grown", "scratch", chain, twins)
    for name, account in found.items():
        if account is not None:
            yield name, account


def _named(runs: Runs, beginning: str) -> list[Record]:
    """Of the runs whose names begin so."""
    return [r for name, records in runs.items() if name.startswith(beginning) for r in records]


def _saving(account: SeriesAccount) -> dict[str, Any]:
    saving = account.saving
    low, high = saving.interval or (None, None)
    return {
        "mean": saving.mean,
        "low": low,
        "high": high,
        "members": len(account.members),
        "seeds": account.seeds,
        "at_equal_loss": account.at_equal_loss,
        "worse": account.worse,
        "compared": account.compared,
        "deficit": account.deficit if not account.diverged else None,
    }


def _efficiency(name: str, account: SeriesAccount) -> dict[str, Any]:
    e = account.efficiency
    low, high = (None, None) if e is None or e.interval is None else e.interval
    return {
        "series": name,
        "members": len(account.members),
        "growth_factor": account.growth_factor,
        "e": None if e is None else e.value,
        "bound": None if e is None else e.bound,
        "low": low,
        "high": high,
        "paid": account.paid.mean,
        "deficit": account.deficit if not account.diverged else None,
    }


def _same_budget(runs: Runs, design: Design) -> list[dict[str, Any]]:
    """Members beside models from scratch of about the same steps: what growing itself is worth."""
    share = design.base.scratch_shares[0]
    records = _records(runs, design, "miniature")
    rows = []
    for size in dict.fromkeys(r.size for r in records if r.arm == _GROWN and r.parent is not None):
        grown = {r.seed: r for r in records if (r.size, r.arm) == (size, _GROWN)}
        short = {
            r.seed: branch.val_bpb
            for r in records if (r.size, r.arm) == (size, _SCRATCH)
            for branch in r.cooled if branch.share == share
        }  # fmt: skip
        both = [seed for seed in grown if seed in short]
        if both:
            found = Estimate.of([grown[seed].val_bpb - short[seed] for seed in both])
            low, high = found.interval or (None, None)
            rows.append({
                "size": size,
                "seeds": len(both),
                "share_grown": grown[both[0]].cooled[-1].share,
                "share_scratch": share,
                "difference": found.mean,
                "low": low,
                "high": high,
            })  # fmt: skip
    return rows


def _brackets(runs: Runs, design: Design) -> list[dict[str, Any]]:
    """Each setting of a model from scratch, one at a time, at three sizes and two batches."""
    stages: tuple[Stage, ...] = ("twin", "first-twin")
    rows = []
    for stage, size in product(stages, design.bracket_sizes):
        jobs = {job.name: job for job in jobs_of(stage, design)}
        usual = f"{stage}/{size}-as-reported"
        for setting, values in brackets_of(stage, design).items():
            found = {}
            for value in values:
                own = value == getattr(jobs[usual].config, setting)
                name = usual if own else f"{stage}/{size}-{setting}-{value:g}"
                if name in runs:
                    found[f"{value:g}"] = runs[name][0].val_bpb
            if len(found) > 1:
                batch = jobs[usual].config.batch_size
                row = {"size": size, "batch_size": batch, "setting": setting}
                rows.append({**row, "bits_per_byte": found})
    return rows


def _page(accounts: Mapping[str, SeriesAccount], content: Mapping[str, Any]) -> str:
    parts = ["# What growing saves: results of examples/inheritance.py"]
    for name, account in accounts.items():
        table = markdown(account.rows, "lrlr", padded=True)
        parts += [f"## {name}", table, " ".join(account.sentences)]
    tables = {
        "Growth factor and efficiency": _efficiency_rows(content["efficiency"]),
        "The twin's settings, one at a time": _bracket_rows(content["brackets"]),
        "About the same steps from random weights": _budget_rows(content["same_budget"]),
    }
    for title, rows in tables.items():
        if len(rows) > 1:
            parts += [f"## {title}", markdown(rows, "lr", padded=True)]
    if len(parts) == 1:
        parts.append("No series is complete yet.")
    return "\n\n".join(parts) + "\n"


def _efficiency_rows(found: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("series", "members", "growth", "e", "paid", "largest deficit")]
    for row in found:
        e = "" if row["e"] is None else f"{row['bound']} {row['e']:.2f}".strip()
        deficit = "diverged" if row["deficit"] is None else f"{row['deficit']:+.4f}"
        paid = f"{row['paid']:.3f}"
        growth = f"{row['growth_factor']:.2f}"
        rows.append((row["series"], f"{row['members']}", growth, e, paid, deficit))
    return rows


def _bracket_rows(found: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("size", "batch", "setting", "bits per byte at each value")]
    for row in found:
        shown = ", ".join(f"{value}: {bpb:.4f}" for value, bpb in row["bits_per_byte"].items())
        rows.append((f"{row['size']}", f"{row['batch_size']}", row["setting"], shown))
    return rows


def _budget_rows(found: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("size", "its share", "the other's", "grown minus it", "seeds")]
    for row in found:
        interval = "" if row["low"] is None else f" [{row['low']:+.4f}, {row['high']:+.4f}]"
        difference = f"{row['difference']:+.4f}{interval}"
        shares = f"{row['share_grown']:.2f}", f"{row['share_scratch']:.2f}"
        rows.append((row["size"], *shares, difference, f"{row['seeds']}"))
    return rows
