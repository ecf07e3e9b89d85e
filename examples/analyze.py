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
    try:
        from analysis.cli import parse_arguments, run
        from trainer.errors import UsageError
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("analysis", "ars", "trainer"):
            raise
        print(
            f"error: the module {error.name} is missing: pip install 'ars-triton[examples]'",
            file=sys.stderr,
        )
        return 2
    arguments = parse_arguments(argv)
    try:
        print(run(arguments))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: writing to {arguments.out} failed ({error.strerror or error}): make room "
            "there or name another folder with --out",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
