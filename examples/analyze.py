"""Analyse a trained miniseries: what growing saved, arms compared, scaling laws, one HTML report.

    python examples/analyze.py --metrics out/demo/metrics.json
    python examples/analyze.py --help

Exit status: 0 done; 2 the command line, the input or the output folder is wrong; 130 interrupted.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.command_line import CommandLine, choice, integer, number, option, path, text
from common.program import exit_status, missing_module
from trainer.settings import PEAK_FLOPS

_DESCRIPTION = """\
Say what a grown series saved, compare the arms, decide the proposal's claims, fit scaling laws,
count costs, and write report.html and, in metrics/, training_log.json, scaling_laws.json and
cost_analysis.json."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the analysis and return the exit status.

    Args:
        argv: the words after the program's name; ``None`` for those of this process.
    """
    try:  # all that `run` takes, so that a missing package is reported before anything else
        import analysis.checkpoints  # noqa: F401
        import analysis.run_report  # noqa: F401
    except ModuleNotFoundError as error:
        return missing_module(error)
    arguments = parse_arguments(argv)
    try:
        return exit_status(arguments.out, lambda: print(run(arguments)))
    except KeyboardInterrupt:
        print("interrupted: run the same command again", file=sys.stderr)
        return 130


@dataclass(frozen=True)
class Arguments:
    """What the user asked for.

    Args:
        metrics: metrics.json of a run of miniseries.py, has to be named; several for several seeds,
            or further arms of the same seed. Logs beside it are read too.
        out: output folder.
        device: device it was trained on, for its peak bfloat16 FLOP/s; ``None``: unknown, no MFU.
        peak_flops: instead of --device, the peak of one device itself.
        devices: devices that worked at once; ``None``: as recorded.
        price: price of a device hour; ``None``: unknown, no prices.
        bootstraps: resamples behind the intervals of the laws.
        eval_bundle: evaluation bundle to score --checkpoint on; examples/analysis/mini_bundle is a
            tiny one.
        checkpoint: models to evaluate, each with its run's tokenizer.
        sequence_len: longest prompt in tokens, the beginning of longer ones is dropped; ``None``:
            as trained, by the run's config.json.
        eval_device: evaluates the checkpoints: cpu, cuda or cuda:N.
        max_per_task: items of each task at most; ``None``: all.
    """

    metrics: tuple[Path, ...] = option((), path, many=True)
    out: Path = option(Path("out/analysis"), path)
    device: str | None = option(None, choice(*sorted(PEAK_FLOPS)))
    peak_flops: float | None = option(None, number(1, 1e18))
    devices: int | None = option(None, integer(1, 1_000_000))
    price: float | None = option(None, number(0, 1e6))
    bootstraps: int = option(1000, integer(0, 100_000))
    eval_bundle: Path | None = option(None, path)
    checkpoint: tuple[Path, ...] = option((), path, many=True)
    sequence_len: int | None = option(None, integer(8, 65536))
    eval_device: str = option("cpu", text)
    max_per_task: int | None = option(None, integer(1, 10**9))


def parse_arguments(words: Sequence[str] | None) -> Arguments:
    """Read the command line; a mistake ends the program with status 2.

    Args:
        words: after the program's name; ``None`` for those of this process.
    """
    line = CommandLine("analyze.py", _DESCRIPTION, rivals=[("device", "peak_flops")])
    line.add_settings("options", Arguments, in_files=False)
    arguments: Arguments = line.build(Arguments, line.parse(words))
    if not arguments.metrics:
        line.error("--metrics is missing: name the metrics.json of a run")
    if bool(arguments.eval_bundle) != bool(arguments.checkpoint):
        line.error("--eval-bundle and --checkpoint need each other")
    return arguments


def run(arguments: Arguments) -> str:
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
    from common.output_folder import OutputFolder, check_writable
    from common.plain_files import write_atomically
    from trainer.parallel import use_device

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
    lines = [" ".join(account.sentences) for account in analysis.accounts]
    lines += headlines(analysis.comparisons)
    lines += [f"{claim.verdict}: {claim.claim}." for claim in analysis.claims]
    lines += [f"warning: {name}, seed {seed}: {text}" for name, seed, text in analysis.warnings]
    return "\n".join([*lines, f"Written to {out}: {', '.join([*written, REPORT_FILE])}."])


if __name__ == "__main__":
    sys.exit(main())
