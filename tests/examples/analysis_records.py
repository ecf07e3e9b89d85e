"""Records and logs of small made-up series, as the trainer writes them."""

import json
from pathlib import Path
from typing import Any

from trainer.step_log import StepLog

# Of an old trainer: without devices and tokens of the lineage.
DEMO = Path(__file__).with_name("old_demo_metrics.json")


def byte_tokens(text: str) -> list[int]:
    """The UTF-8 bytes of a text, tokens of a byte-level model."""
    return list(text.encode())


def trained(
    name: str,
    losses: float | dict[float, float],
    parent: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    fisher: int = 0,
    extra: int = 0,
) -> dict[str, Any]:
    """The record of a model as the trainer writes it, in round numbers.

    A model dN has 1000 N parameters in products. From scratch it is trained for 100 steps, 10 of
    them cooled, of 100 N tokens, at 6 operations a parameter and token.

    Args:
        name: such as "d3-grown".
        losses: of its cooled branches by their shares; a number alone is that of share 1.
        parent: record of the model that it grew out of, at the end of its trunk.
        seed: of the run.
        fisher: operations of the Fisher pass.
        extra: operations a step that the arm adds.
    """
    depth, arm = int(name[1:].split("-", 1)[0]), name.split("-", 1)[1]
    branches = losses if isinstance(losses, dict) else {1.0: losses}
    tokens, flops = 100 * depth, 6 * 1000 * depth * 100 * depth + extra
    cooled = [
        {"share": share, "start": round(100 * share) - 10, "steps": round(100 * share),
         "tokens": round(100 * share) * tokens, "flops": round(100 * share) * flops,
         "seconds": share * depth**2, "val_bpb": bpb}
        for share, bpb in branches.items()
    ]  # fmt: skip
    last = cooled[-1]
    growth = 0 if parent is None else 4 * 2000 * depth
    prior_flops = prior_tokens = 0
    if parent is not None:
        trunk = parent["trunk_steps"]
        prior_flops = parent["prior_flops"] + trunk * parent["flops_per_step"] + growth + fisher
        prior_tokens = parent["prior_tokens"] + trunk * parent["tokens"] // parent["steps"]
    return {
        "name": name,
        "size": f"d{depth}",
        "depth": depth,
        "width": 64 * depth,
        "arm": arm,
        "parent": None if parent is None else parent["name"],
        "params": 2000 * depth,
        "scaling_params": 1000 * depth,
        "share": last["share"],
        "full_steps": 100,
        "trunk_steps": last["start"],
        "steps": last["steps"],
        "tokens": last["tokens"],
        "prior_tokens": prior_tokens,
        "lineage_tokens": prior_tokens + last["tokens"],
        "cooled": cooled,
        "flops_per_step": flops,
        "flops": last["flops"],
        "fisher_flops": fisher,
        "growth_flops": growth,
        "prior_flops": prior_flops,
        "lineage_flops": prior_flops + last["flops"],
        "seconds": last["seconds"],
        "val_bpb": last["val_bpb"],
        "warnings": [],
        "seed": seed,
        "devices": 1,
    }


def grown_series(
    seed: int = 0, gain: float = 0.05, arm: str = "grown", root: str = "scratch", **more: int
) -> list[dict[str, Any]]:
    """d2, d4 and d6 from scratch and grown, these better by ``gain`` at 0.4 of the steps."""
    twins = [trained(f"d{d}-{root}", bpb, seed=seed) for d, bpb in ((2, 3.0), (4, 2.5), (6, 2.2))]
    records, parent = [twins[0]], twins[0]
    for twin in twins[1:]:
        bpb = twin["val_bpb"] - gain
        losses = {0.2: bpb + 0.2, 0.4: bpb}
        parent = trained(f"{twin['size']}-{arm}", losses, parent, seed=seed, **more)
        records += [parent, twin]
    return records


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    """Write a ``metrics.json``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def curve(
    record: dict[str, Any], start: float, trunk: float, *, points: int = 8, cooled: int = 2
) -> list[dict[str, Any]]:
    """Rows of a log: linear from ``start`` to ``trunk``, then down to the record's loss.

    Args:
        record: whose operations and tokens they are.
        start: loss before the first step.
        trunk: loss at the trunk's end.
        points: steps.
        cooled: of these, the cooled branch.
    """
    prior_flops = record["lineage_flops"] - record["flops"]
    prior_tokens = record["lineage_tokens"] - record["tokens"]
    end = points - cooled
    rows: list[dict[str, Any]] = []
    for step in range(points + 1):
        share, down = min(1.0, step / end), max(0.0, (step - end) / cooled)
        rows.append({
            "step": step,
            "tokens": prior_tokens + step * record["tokens"] // points,
            "flops": prior_flops + step * record["flops"] // points,
            "seconds": record["seconds"] * step / points,
            "lr": None if step == 0 else 1e-3 * min(1.0, (points - step + 1) / cooled),
            "loss": None if step == 0 else 2.0,
            "val_bpb": start + share * (trunk - start) + down * (record["val_bpb"] - trunk),
        })  # fmt: skip
    return rows


def write_run(folder: Path, records: list[dict[str, Any]], **settings: Any) -> Path:
    """A run's folder: metrics, settings and a log of every model; returns the metrics."""
    path = write(folder / "metrics.json", records)
    by_name = {record["name"]: record for record in records}
    depths = sorted({record["depth"] for record in records})
    arms = list(dict.fromkeys(r["arm"] for r in records if r["depth"] == depths[-1]))
    content = {"settings": {"depths": depths, "arms": arms, **settings}, "data": {"kind": "text"}}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    for record in records:
        parent = by_name.get(record["parent"] or "")
        start = 8.0 if parent is None else parent["val_bpb"] + 0.2
        rows = curve(record, start, record["val_bpb"] + 0.2)
        with StepLog(folder / f"log_{record['name']}.csv", None) as log:
            for row in rows:
                log.write(row)
    return path
