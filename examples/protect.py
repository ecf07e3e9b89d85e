"""Train a GPT on one text, then on another, and measure what each method keeps of the first.

    python examples/protect.py            # all methods, on two texts that come with Python
    python examples/protect.py --quick    # the same path in under a minute
    python examples/protect.py --help

Exit status: 0 done; 2 the command line, a text or the output folder is wrong; 130 or 143
interrupted.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

# The checkout this file lies in, so that it runs without installing the package.
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))


def main(argv: Sequence[str] | None = None) -> int:
    """Do the runs and return the exit status.

    Args:
        argv: the words after the program's name; ``None`` for those of this process.
    """
    from common.program import exit_status, missing_module, quit_on_signals

    quit_on_signals()
    try:
        from protection.protect_options import parse_options
        from protection.protect_run import run_all
    except ModuleNotFoundError as error:
        return missing_module(error)
    options = parse_options(argv)

    def work() -> None:
        print(run_all(options), end="")

    return exit_status(options.folder, work)


if __name__ == "__main__":
    sys.exit(main())
