"""Train a GPT on one text, then on another, and measure what each method keeps of the first.

    python examples/protect.py            # all methods, on two texts that come with Python
    python examples/protect.py --quick    # the same path in about a minute
    python examples/protect.py --help

Exit status: 0 done; 2 the command line, a text or the output folder is wrong; 130 or 143
interrupted.
"""

import sys
from collections.abc import Sequence

from common.program import Begun, program


@program
def main(argv: Sequence[str] | None) -> Begun:
    """Do the runs."""
    from protection.protect_options import parse_options
    from protection.protect_run import run_all

    options = parse_options(argv)
    return options.folder, lambda: print(run_all(options), end="")


if __name__ == "__main__":
    sys.exit(main())
