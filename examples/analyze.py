"""Analyse a trained miniseries: scaling laws, costs, arms compared, one HTML report.

    python examples/analyze.py --metrics out/demo/metrics.json
    python examples/analyze.py --help

Exit status: 0 done; 2 the command line, the input or the output folder is wrong; 130 interrupted.
"""

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

    try:
        from analysis.cli import parse_arguments, run
    except ModuleNotFoundError as error:
        return missing_module(error, "analysis")
    arguments = parse_arguments(argv)
    try:
        return exit_status(arguments.out, lambda: print(run(arguments)))
    except KeyboardInterrupt:
        print("interrupted: run the same command again", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
