"""Grow a miniseries of GPTs, each out of its predecessor, and compare with training from scratch.

    python examples/miniseries.py            # four small models on two CPU cores, some minutes
    python examples/miniseries.py --quick    # the same path in under a minute
    python examples/miniseries.py plan       # what that will cost, without training
    python examples/miniseries.py sample --checkpoint FILE --prompt "def "
    python examples/miniseries.py --help

Exit status: 0 done; 2 the command line or the output folder is wrong; 3 done, and the loss of a
model is not a number; 130 or 143 interrupted.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.series_run import Run


def main(argv: Sequence[str] | None = None) -> int:
    """Train, plan or sample, and return the exit status.

    Args:
        argv: the words after the program's name; ``None`` for those of this process.
    """
    from common.program import missing_module, quit_on_signals

    words = list(sys.argv[1:] if argv is None else argv)
    mode = words.pop(0) if words and not words[0].startswith("-") else "train"
    quit_on_signals() if mode == "train" else quit_on_signals("interrupted")
    try:
        if mode not in _MODES:
            from common.command_line import nearest

            print(f"error: there is no mode {mode}; {nearest(mode, _MODES)}", file=sys.stderr)
            return 2
        return _MODES[mode](words)
    except ModuleNotFoundError as error:
        return missing_module(error)


def _train(words: Sequence[str]) -> int:
    from trainer.arguments import parse_arguments

    arguments = parse_arguments(words)
    from common.output_folder import OutputFolder
    from common.program import StopRequest, exit_status
    from trainer.series_run import prepare
    from trainer.train_series import run_series

    out = arguments.out

    def work() -> None:
        with StopRequest() as stop, OutputFolder(out) as output:
            run = prepare(arguments, stop, output)
            try:
                if run.parallel.is_first:
                    print(_resolved(run), end="", file=sys.stderr)
                table, nothing_to_do = run_series(run)
                if not run.parallel.is_first:
                    return
            finally:
                run.parallel.close()
            if not nothing_to_do or not (out / "report.html").exists():
                output.check()
                _write_analysis(run)
            output.check()
        print(table, end="")
        if any(word.startswith("grown") for word in run.config.arms):
            print(f"\n{_account(out)}", end="")
        if nothing_to_do:
            print(f"\nEvery model was already trained in {out}; delete it to train again.")
        else:
            print(
                f"\nResults are in {out}: report.html, table.md, metrics.json, metrics/, "
                "log_*.csv, checkpoints/."
            )
        _check_finite(out)

    return exit_status(out, work)


def _account(out: Path) -> str:
    """What the series cost beside its twins, and the share of theirs at equal loss."""
    from analysis.records import read_metrics
    from analysis.series_account import describe_account

    return describe_account(read_metrics([out / "metrics.json"]))


def _check_finite(out: Path) -> None:
    """See that every model has a loss; raise `DivergedError` if not."""
    from common.errors import DivergedError
    from common.plain_files import read_json

    records = read_json(out / "metrics.json", remedy="run the same command again")
    if names := [record["name"] for record in records if record["diverged"]]:
        raise DivergedError(
            f"{', '.join(names)} diverged, the loss is not a number: lower the learning rate or a "
            "strength, and name another folder with --out"
        )


def _resolved(run: "Run") -> str:
    from trainer.series_plan import plans_of
    from trainer.series_report import models_table, settings_table

    length = run.config.sequence_len
    plans = plans_of(run.config, run.corpus.vocab_size)
    return f"{settings_table(plans, length)}\n{models_table(plans, length)}"


def _write_analysis(run: "Run") -> None:
    from analysis.run_report import write_run_analysis
    from common.errors import UsageError

    try:
        write_run_analysis(run.folder, peak_flops=run.machine.peak_flops)
    except UsageError as error:
        if run.machine.peak_flops is None:
            raise
        # Everything has been trained: a wrong peak must not cost its report.
        print(f"warning: {error}; the report has no MFU", file=sys.stderr)
        write_run_analysis(run.folder)


def _plan(words: Sequence[str]) -> int:
    from trainer.arguments import parse_plan

    asked = parse_plan(words)
    from analysis.planned_series import describe_plan

    return _print(lambda: describe_plan(asked))


def _sample(words: Sequence[str]) -> int:
    from trainer.arguments import parse_sample

    asked = parse_sample(words)
    from trainer.sample import describe_samples

    return _print(lambda: describe_samples(asked))


def _print(make: Callable[[], str]) -> int:
    from common.program import exit_status

    return exit_status(None, lambda: print(make(), end=""))


_MODES = {"train": _train, "plan": _plan, "sample": _sample}


if __name__ == "__main__":
    sys.exit(main())
