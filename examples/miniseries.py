"""Grow a miniseries of GPTs, each out of its predecessor, and compare with training from scratch.

    python examples/miniseries.py            # d2 -> d3 -> d4 on two CPU cores, about five minutes
    python examples/miniseries.py --quick    # the same path in under a minute
    python examples/miniseries.py --help

Exit status: 0 done; 2 the command line or the output folder is wrong; 130 or 143 interrupted.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

# The checkout this file lies in, so that it runs without installing the package.
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the series and return the exit status.

    Args:
        argv: the words after the program's name; ``None`` for those of this process.
    """
    from trainer.program import exit_status, missing_module, quit_on_signals

    quit_on_signals()
    from trainer.cli import parse_arguments

    arguments = parse_arguments(argv)
    try:
        from trainer.prepare import prepare
        from trainer.series import run_series
        from trainer.signals import StopRequest
    except ModuleNotFoundError as error:
        return missing_module(error)
    out = arguments.out

    def work() -> None:
        config, corpus = prepare(arguments)
        with StopRequest() as stop:
            table, nothing_to_do = run_series(out, config, corpus, stop)
        print(table, end="")
        if nothing_to_do:
            print(f"\nEvery model was already trained in {out}; delete it to train again.")
        else:
            print(f"\nResults are in {out}: table.md, metrics.json, loss_*.png, checkpoints/.")

    return exit_status(out, work)


if __name__ == "__main__":
    sys.exit(main())
