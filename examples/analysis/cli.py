"""The command line of the analysis: every mistake is one line that says what to do."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.bundle import load_bundle
from analysis.checkpoints import evaluate_checkpoint
from analysis.cost import PEAK_FLOPS, CostAnalyzer
from analysis.paper import plan_cost, plan_depths, plan_doubling
from analysis.records import read_logs, read_metrics
from analysis.report_html import render_report
from analysis.savings import find_savings
from analysis.scaling import ScalingLawValidator
from analysis.series_laws import fit_series
from analysis.verdict import compare_arms, headlines
from trainer.arguments import Parser, integer, number
from trainer.checkpoint import write_atomically
from trainer.errors import UsageError

__all__ = ["parse_arguments", "run"]

_BASELINE = "scratch"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; a mistake ends the program with status 2.

    Args:
        argv: the words after the program's name; ``None`` for those of this process.
    """
    parser = Parser(
        prog="analyze.py",
        description="Fit scaling laws to a trained series, count its costs, compare its arms, and "
        "write scaling_laws.json, cost_analysis.json and report.html.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--metrics", type=Path, nargs="+", required=True, metavar="FILE",
        help="metrics.json of a run of miniseries.py; several for several seeds. Logs beside it "
        "are drawn too")  # fmt: skip
    add("--out", type=Path, default=Path("out/analysis"), metavar="DIR",
        help="output folder (default: %(default)s)")  # fmt: skip
    peak = parser.add_mutually_exclusive_group()
    peak.add_argument("--device", choices=sorted(PEAK_FLOPS),
                      help="device it was trained on, for its peak bfloat16 FLOP/s "
                      "(default: unknown, no MFU)")  # fmt: skip
    peak.add_argument("--peak-flops", type=number(1, 1e18), metavar="X",
                      help="the peak itself, of one device (default: not used)")  # fmt: skip
    add("--devices", type=integer(1, 1_000_000), default=1, metavar="N",
        help="devices that worked at once (default: %(default)s)")  # fmt: skip
    add("--price", type=number(0, 1e6), metavar="P",
        help="price of a device hour (default: unknown, no prices)")  # fmt: skip
    add("--bootstraps", type=integer(0, 100_000), default=1000, metavar="N",
        help="resamples behind the intervals of the laws (default: %(default)s)")  # fmt: skip
    add("--eval-bundle", type=Path, metavar="DIR",
        help="evaluation bundle to score --checkpoint on; examples/analysis/mini_bundle is a tiny "
        "one (default: none)")  # fmt: skip
    add("--checkpoint", type=Path, nargs="+", default=[], metavar="FILE",
        help="byte-level models to evaluate (default: none)")  # fmt: skip
    add("--sequence-len", type=integer(8, 65536), default=256, metavar="T",
        help="longest prompt in bytes, the beginning of longer ones is dropped "
        "(default: %(default)s)")  # fmt: skip
    add("--max-per-task", type=integer(1, 10**9), metavar="N",
        help="items of each task at most (default: all)")  # fmt: skip
    arguments = parser.parse_args(argv)
    if bool(arguments.eval_bundle) != bool(arguments.checkpoint):
        parser.error("--eval-bundle and --checkpoint need each other")
    return arguments


def run(arguments: argparse.Namespace) -> str:
    """Analyse and write; nothing is written before everything is known.

    Args:
        arguments: of `parse_arguments`.

    Returns:
        What to tell the user.

    Raises:
        UsageError: the input or the output folder is not as it should be.
    """
    out: Path = arguments.out
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file: name a folder")
    records = read_metrics(arguments.metrics)
    peak = PEAK_FLOPS[arguments.device] if arguments.device else arguments.peak_flops
    analyzer = CostAnalyzer(
        peak_flops=peak, price_per_hour=arguments.price, devices=arguments.devices
    )
    try:
        costs = analyzer.analyze(records)
    except ValueError as error:
        raise UsageError(str(error)) from None
    laws = fit_series(records, ScalingLawValidator(bootstraps=arguments.bootstraps))
    comparisons = compare_arms(records, _BASELINE)
    core = {}
    if arguments.eval_bundle:
        tasks = load_bundle(arguments.eval_bundle)
        for path in arguments.checkpoint:
            core[path.stem] = evaluate_checkpoint(
                path,
                tasks,
                sequence_len=arguments.sequence_len,
                max_per_task=arguments.max_per_task,
            ).to_dict()
    plans = {
        "d10 ... d20 on paper (8 tokens a parameter, as the first nanochat miniseries)": plan_cost(
            plan_depths()
        ),
        "7M ... 7.2B on paper (20 tokens a parameter, C = 6 N D)": plan_cost(plan_doubling()),
    }
    logs = read_logs(arguments.metrics, records)
    savings = find_savings(records, logs, _BASELINE)
    report = render_report(records, logs, comparisons, savings, laws, costs, plans, core)
    compared = [comparison.to_dict() for comparison in comparisons]
    contents: dict[str, Any] = {
        "scaling_laws.json": {
            "arms": [law.to_dict() for law in laws],
            "comparisons": compared,
            "savings": [saving.to_dict() for saving in savings],
        },
        "cost_analysis.json": {
            "peak_flops": peak,
            "devices": arguments.devices,
            "price_per_hour": arguments.price,
            "models": [cost.to_dict() for cost in costs],
            "on_paper": plans,
        },
    }
    if core:
        contents["core.json"] = core
    out.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_atomically(out / name, json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_atomically(out / "report.html", report)
    written = ", ".join([*contents, "report.html"])
    return "\n".join([*headlines(comparisons), f"Written to {out}: {written}."])
