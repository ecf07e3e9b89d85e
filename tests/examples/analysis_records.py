"""Records and logs of small made-up series, as the trainer writes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.step_log import StepLog

# Of an old trainer: without devices and tokens of the lineage.
DEMO = Path(__file__).with_name("old_demo_metrics.json")

OWN_TOKENS = 50_000
TRUNK_TOKENS = 40_000  # of a parent, which its child inherits


def byte_tokens(text: str) -> list[int]:
    """The UTF-8 bytes of a text, tokens of a byte-level model."""
    return list(text.encode())


def entry(name: str, bpb: float, parent: str | None = None, seed: int = 0) -> dict[str, Any]:
    """One record; ``name`` is such as "d3-grown"."""
    depth, arm = name[1:].split("-", 1)
    inherited = 0 if parent is None else TRUNK_TOKENS * (int(depth) - 2)
    return {
        "name": name,
        "depth": int(depth),
        "arm": arm,
        "parent": parent,
        "params": 1000 * int(depth),
        "tokens": OWN_TOKENS,
        "lineage_tokens": OWN_TOKENS + inherited,
        "flops": 10**9 * int(depth),
        "fisher_flops": 0 if parent is None else 10**8,
        "lineage_flops": 2 * 10**9 * int(depth),
        "seconds": 10.0 * int(depth),
        "val_bpb": bpb,
        "warnings": [],
        "seed": seed,
    }


def chain_of(
    arm: str, root: str, losses: Sequence[float], seed: int = 0, first: int = 3
) -> list[dict[str, Any]]:
    """d3, d4 ... of a grown arm, with these losses, out of d2 of ``root``."""
    records, parent = [], f"d{first - 1}-{root}"
    for depth, bpb in enumerate(losses, start=first):
        records.append(entry(f"d{depth}-{arm}", bpb, parent, seed))
        parent = records[-1]["name"]
    return records


def two_arms(seed: int = 0, gain: float = 0.1) -> list[dict[str, Any]]:
    """d2, d3 and d4 from scratch, d3 and d4 grown with ``gain`` fewer bits per byte."""
    scratch = [entry(f"d{d}-scratch", bpb, seed=seed) for d, bpb in ((2, 3.0), (3, 2.5), (4, 2.2))]
    grown = chain_of("grown", "scratch", [2.5 - gain, 2.2 - gain], seed)
    return [scratch[0], grown[0], scratch[1], grown[1], scratch[2]]


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
