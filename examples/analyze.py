"""Analyse a trained miniseries: scaling laws, costs, arms compared, one HTML report.

    python examples/analyze.py --metrics out/demo/metrics.json
    python examples/analyze.py --help

Exit status: 0 done; 2 the command line, the input or the output folder is wrong; 130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# The checkout this file lies in, so that it runs without installing the package.
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the analysis and return the exit status.

    Args:
        argv: the words after the program's name; ``None`` for those of this process.
    """
    from trainer.program import exit_status, missing_module

    try:  # all that `run` takes, so that a missing package is reported before anything else
        import analysis.checkpoints  # noqa: F401
        import analysis.run_report  # noqa: F401
    except ModuleNotFoundError as error:
        return missing_module(error, "analysis")
    arguments = parse_arguments(argv)
    try:
        return exit_status(arguments.out, lambda: print(run(arguments)))
    except KeyboardInterrupt:
        print("interrupted: run the same command again", file=sys.stderr)
        return 130


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; a mistake ends the program with status 2.

    Args:
        argv: the words after the program's name; ``None`` for those of this process.
    """
    from trainer.arguments import Parser, integer, number
    from trainer.peak_flops import PEAK_FLOPS

    parser = Parser(
        prog="analyze.py",
        description="Compare the arms of a trained series, decide the proposal's claims, fit "
        "scaling laws, count costs, and write report.html and, in metrics/, training_log.json, "
        "scaling_laws.json and cost_analysis.json.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--metrics", type=Path, nargs="+", required=True, metavar="FILE",
        help="metrics.json of a run of miniseries.py; several for several seeds, or further arms "
        "of the same seed. Logs beside it are read too")  # fmt: skip
    add("--out", type=Path, default=Path("out/analysis"), metavar="DIR",
        help="output folder (default: %(default)s)")  # fmt: skip
    peak = parser.add_mutually_exclusive_group()
    peak.add_argument("--device", choices=sorted(PEAK_FLOPS),
                      help="device it was trained on, for its peak bfloat16 FLOP/s "
                      "(default: unknown, no MFU)")  # fmt: skip
    peak.add_argument("--peak-flops", type=number(1, 1e18), metavar="X",
                      help="the peak itself, of one device (default: not used)")  # fmt: skip
    add("--devices", type=integer(1, 1_000_000), metavar="N",
        help="devices that worked at once (default: as recorded)")  # fmt: skip
    add("--price", type=number(0, 1e6), metavar="P",
        help="price of a device hour (default: unknown, no prices)")  # fmt: skip
    add("--bootstraps", type=integer(0, 100_000), default=1000, metavar="N",
        help="resamples behind the intervals of the laws (default: %(default)s)")  # fmt: skip
    add("--eval-bundle", type=Path, metavar="DIR",
        help="evaluation bundle to score --checkpoint on; examples/analysis/mini_bundle is a tiny "
        "one (default: none)")  # fmt: skip
    add("--checkpoint", type=Path, nargs="+", default=[], metavar="FILE",
        help="models to evaluate, each with its run's tokenizer (default: none)")  # fmt: skip
    add("--sequence-len", type=integer(8, 65536), metavar="T",
        help="longest prompt in tokens, the beginning of longer ones is dropped "
        "(default: as trained, by the run's config.json)")  # fmt: skip
    add("--eval-device", default="cpu", metavar="D",
        help="evaluates the checkpoints: cpu, cuda or cuda:N (default: %(default)s)")  # fmt: skip
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
    from analysis.bundle import load_bundle
    from analysis.checkpoints import evaluate_checkpoint
    from analysis.comparisons import headlines
    from analysis.run_report import REPORT_FILE, analyze_runs, render_report, write_json
    from trainer.checkpoint import write_atomically
    from trainer.folder import OutputFolder, check_writable
    from trainer.parallel import use_device
    from trainer.peak_flops import PEAK_FLOPS

    out: Path = arguments.out
    check_writable(out)
    core = {}
    if arguments.eval_bundle:
        use_device(arguments.eval_device, "--eval-device")
        tasks = load_bundle(arguments.eval_bundle)
        stems = [path.stem for path in arguments.checkpoint]
        for path in arguments.checkpoint:
            # Models of several runs have the same names.
            name = path.stem if stems.count(path.stem) == 1 else str(path)
            core[name] = evaluate_checkpoint(
                path,
                tasks,
                device=arguments.eval_device,
                sequence_len=arguments.sequence_len,
                max_per_task=arguments.max_per_task,
            ).to_dict()
    analysis = analyze_runs(
        arguments.metrics,
        bootstraps=arguments.bootstraps,
        peak_flops=PEAK_FLOPS[arguments.device] if arguments.device else arguments.peak_flops,
        price_per_hour=arguments.price,
        devices=arguments.devices,
        core=core,
    )
    report = render_report(analysis)
    with OutputFolder(out) as output:
        output.hold()
        written = write_json(analysis, out)
        write_atomically(out / REPORT_FILE, report)
        output.check()
    lines = headlines(analysis.comparisons)
    lines += [f"{claim.verdict}: {claim.claim}." for claim in analysis.claims]
    lines += [f"warning: {name}, seed {seed}: {text}" for name, seed, text in analysis.warnings]
    return "\n".join([*lines, f"Written to {out}: {', '.join([*written, REPORT_FILE])}."])


if __name__ == "__main__":
    sys.exit(main())
