"""Measure what the ways to squared gradients cost on this CPU, and fit the prices of each.

    python benchmarks/fisher_prices.py out/prices.json                       # about 15 minutes
    python benchmarks/fisher_prices.py out/prices.json --families mlp gpt    # goes on with these
    python benchmarks/fisher_prices.py benchmarks/results/fisher/prices.json --fit

`ars.regularizers.fisher.per_sample` predicts by these prices which way is the fastest. A model is
fitted by each way on five batches, the least processor time of three, one thread. `--fit` measures
nothing: it fits the prices to what is in the file, by least squares of relative errors, and says
how much longer than the fastest way the chosen one takes.
"""

import argparse
import copy
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from fisher_families import IMAGES, OTHERS, TRANSFORMERS, batch_of, model_of
from scipy.optimize import nnls

from ars.atomic import replacing
from ars.regularizers import DiagonalFisher
from ars.regularizers.fisher import per_sample
from ars.regularizers.fisher.per_sample import Cost

WIDTHS, LENGTHS, BATCHES = (32, 64, 128, 256), (16, 64, 128), 5
WAYS = ("hooks", "vmap", "loop")
OPERATION = 2e-11  # seconds


def cases(families: list[str]) -> list[tuple[str, int, int, int]]:
    """Return family, width, length and samples a batch of what is measured."""
    found = []
    for family in families:
        lengths = (16,) if family == "mlp" else (16, 64) if family in IMAGES else LENGTHS
        samples = (8,) if family in TRANSFORMERS else (8, 32)
        widths = (64, 256) if family in TRANSFORMERS else WIDTHS
        found += [(family, *sizes) for sizes in itertools.product(widths, lengths, samples)]
    return found


def seconds(run: Callable[[], object]) -> float:
    """Return the processor time of a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measured(family: str, width: int, length: int, samples: int) -> dict[str, Any]:
    """Fit one model by each way."""
    model = model_of(family, width, length)
    batches = [batch_of(family, width, length, samples) for _ in range(BATCHES)]
    fishers = {way: DiagonalFisher(copy.deepcopy(model), "empirical", method=way) for way in WAYS}
    least: dict[str, float] = {}
    for _ in range(3):
        for way in list(fishers):
            try:
                taken = seconds(lambda way=way: fishers[way].fit(batches))
            except RuntimeError:  # it cannot differentiate the model
                del fishers[way]
            else:
                least[way] = min(least.get(way, taken), taken)
    costs: list[Cost] = []

    def watched(cost: Cost, *_: int) -> str:
        costs.append(cost)
        return "loop"

    with mock.patch.object(per_sample, "fastest_on_cpu", watched):
        DiagonalFisher(model, "empirical").fit(batches[:1])
    return {
        "family": family, "width": width, "length": length, "samples": samples,
        "parameters": sum(p.numel() for p in model.parameters()), "cost": list(costs[0]),
        "seconds": {way: round(taken, 5) for way, taken in least.items()},
    }  # fmt: skip


def terms(row: dict[str, Any], way: str) -> tuple[float, np.ndarray]:
    """Return the operations of products of a sample, and what each price is multiplied by."""
    cost, samples = Cost(*row["cost"]), row["samples"]
    together = {"hooks": samples, "vmap": min(samples, per_sample.VMAP_CHUNK), "loop": 1}[way]
    parameters = row["parameters"] / (samples if way == "hooks" else 1)
    each = [3 * cost.written, parameters, cost.operators / together, 1 / together]
    return 3.0 * cost.operations, np.array(each)


def fitted(rows: list[dict[str, Any]], way: str) -> np.ndarray:
    """Return the prices of a byte, a parameter, a call, and what is fixed, in operations."""
    left, right = [], []
    for row in rows:
        if way in row["seconds"]:
            taken = row["seconds"][way] / BATCHES / row["samples"] / OPERATION
            products, multiplied = terms(row, way)
            left.append(multiplied / taken)
            right.append(1 - products / taken)
    return nnls(np.array(left), np.array(right))[0]


def choices(rows: list[dict[str, Any]]) -> list[tuple[str, str, float]]:
    """Return for each model the way that is chosen, the fastest, and the ratio of their times."""
    found = []
    for row in rows:
        samples, taken = row["samples"], row["seconds"]
        chunk = min(samples, per_sample.VMAP_CHUNK)
        way = per_sample.fastest_on_cpu(Cost(*row["cost"]), row["parameters"], samples, chunk)
        if way in taken:
            best = min(taken, key=taken.__getitem__)
            found.append((way, best, taken[way] / taken[best]))
    return found


def report(rows: list[dict[str, Any]]) -> None:
    """Print prices and choices."""
    for way in WAYS:
        names = per_sample._Prices._fields
        prices = zip(names, fitted(rows, way), strict=True)
        print(f"{way:6}", ", ".join(f"{name} {price:.2g}" for name, price in prices))
    found = choices(rows)
    for row, (way, best, ratio) in zip(rows, found, strict=False):
        if ratio > 1.1:
            size = "{family} {width} x {length}, {samples} samples".format(**row)
            print(f"{size}: {way} takes {ratio:.2f} times as long as {best}")
    ratios = [ratio for *_, ratio in found]
    print(
        f"{len(found)} models: {np.mean(ratios):.3f} times the fastest, at most {max(ratios):.2f}"
    )


def main() -> None:
    """Measure, and fit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    everything = [*OTHERS, *(name for name in TRANSFORMERS if name != "mixtral")]
    parser.add_argument("file", type=Path, help="where rows are kept")
    parser.add_argument("--families", nargs="+", choices=everything, default=everything)
    parser.add_argument("--fit", action="store_true", help="measure nothing")
    options = parser.parse_args()
    rows = json.loads(options.file.read_text())["rows"] if options.file.exists() else []
    if not options.fit:
        torch.set_num_threads(1)
        done = {(r["family"], r["width"], r["length"], r["samples"]) for r in rows}
        for case in cases(options.families):
            if case not in done:
                rows.append(measured(*case))
                print(rows[-1], flush=True)
                text = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
                head = f'"torch": "{torch.__version__}", "threads": 1'
                with replacing(options.file) as file:
                    file.write_text(f'{{{head}, "rows": [\n{text}\n]}}\n')
    if not rows:
        sys.exit(f"{options.file} has no rows: measure first, without --fit")
    report(rows)


if __name__ == "__main__":
    main()
