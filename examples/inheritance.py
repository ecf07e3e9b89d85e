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

from common.program import Begun, program


@program
def main(argv: Sequence[str] | None) -> Begun:
    """Run the experiment."""
    from experiment.experiment_run import parse_options, run_experiment

    options = parse_options(argv)
    return options.folder, lambda: print(run_experiment(options), end="")


if __name__ == "__main__":
    sys.exit(main())
