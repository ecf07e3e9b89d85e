"""Grow a miniseries of GPTs, each out of its predecessor, and compare with training from scratch.

    python examples/miniseries.py            # d2 -> d3 -> d4 on two CPU cores, about five minutes
    python examples/miniseries.py --quick    # the same path in under a minute
    python examples/miniseries.py --help

Exit status: 0 done; 2 the command line or the output folder is wrong; 130 or 143 interrupted.
"""

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

# The checkout this file lies in, so that it runs without installing the package.
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))


def _quit_before_training(signum: int, _frame: FrameType | None) -> None:
    # Not an exception: during the import of an extension module it could end as a traceback.
    os.write(2, b"interrupted before training: nothing was written\n")
    os._exit(128 + signum)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the series and return the exit status.

    Args:
        argv: the words after the program's name; ``None`` for those of this process.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _quit_before_training)
    from trainer.cli import parse_arguments
    from trainer.errors import RunInterruptedError, UsageError

    arguments = parse_arguments(argv)
    try:
        from trainer.prepare import prepare
        from trainer.series import run_series
        from trainer.signals import StopRequest
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("ars", "trainer"):
            raise
        print(
            f"error: the module {error.name} is missing: pip install 'ars-triton[examples]'",
            file=sys.stderr,
        )
        return 2
    out = arguments.out
    try:
        config, corpus = prepare(arguments)
        with StopRequest() as stop:
            table, nothing_to_do = run_series(out, config, corpus, stop)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        reason = error.strerror or error
        print(
            f"error: writing to {out} failed ({reason}): make room there or name another folder "
            "with --out",
            file=sys.stderr,
        )
        return 2
    except RunInterruptedError as stopped:
        command = shlex.join(["python", *sys.orig_argv[1:]])
        print(f"interrupted: run `{command}` again to resume", file=sys.stderr)
        return 128 + stopped.signum
    print(table, end="")
    if nothing_to_do:
        print(f"\nEvery model was already trained in {out}; delete it to train again.")
    else:
        print(f"\nResults are in {out}: table.md, metrics.json, loss_*.png, checkpoints/.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
