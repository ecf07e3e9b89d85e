"""What growing saves: each member of a series from scratch, and grown out of the one before.

    python examples/inheritance.py --design half --stage miniature --workers 2
    python examples/inheritance.py --design quick    # the same path in two minutes
    python examples/inheritance.py --results benchmarks/results/miniseries --stage none
                                                     # tables and figures from the committed records

Exit status: 0 done; 2 the command line, the text or a folder is wrong; 130 or 143 interrupted, or
the minutes are over: the same command goes on.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

# The checkout this file lies in, so that it runs without installing the package.
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment and return the exit status.

    Args:
        argv: the words after the program's name; ``None`` for those of this process.
    """
    from common.program import exit_status, missing_module, quit_on_signals

    quit_on_signals()
    try:
        from experiment.experiment_run import parse_options, run_experiment
    except ModuleNotFoundError as error:
        return missing_module(error)
    options = parse_options(argv)
    return exit_status(options.folder, lambda: print(run_experiment(options), end=""))


if __name__ == "__main__":
    sys.exit(main())
