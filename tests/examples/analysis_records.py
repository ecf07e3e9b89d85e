"""Records of small made-up series, as the trainer writes them."""

import json
from pathlib import Path
from typing import Any

DEMO = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "demo" / "metrics.json"


def entry(name: str, bpb: float, parent: str | None = None, seed: int = 0) -> dict[str, Any]:
    """One record; ``name`` is such as "d3-inherited"."""
    depth, arm = name[1:].split("-", 1)
    return {
        "name": name,
        "depth": int(depth),
        "arm": arm,
        "parent": parent,
        "params": 1000 * int(depth),
        "tokens": 50_000,
        "flops": 10**9 * int(depth),
        "fisher_flops": 0 if parent is None else 10**8,
        "lineage_flops": 2 * 10**9 * int(depth),
        "seconds": 10.0 * int(depth),
        "val_bpb": bpb,
        "seed": seed,
    }


def two_arms(seed: int = 0, gain: float = 0.1) -> list[dict[str, Any]]:
    """d2, d3 and d4 from scratch, d3 and d4 inherited with ``gain`` fewer bits per byte."""
    return [
        entry("d2-scratch", 3.0, seed=seed),
        entry("d3-inherited", 2.5 - gain, "d2-scratch", seed),
        entry("d3-scratch", 2.5, seed=seed),
        entry("d4-inherited", 2.2 - gain, "d3-inherited", seed),
        entry("d4-scratch", 2.2, seed=seed),
    ]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    """Write a ``metrics.json``."""
    path.write_text(json.dumps(records), encoding="utf-8")
    return path
