"""Learn permuted digits one permutation after another, and measure what each method forgets.

    python examples/continual_digits.py            # all methods, 5 and 10 tasks, 5 seeds
    python examples/continual_digits.py --quick    # the same path in well under a minute
    python examples/continual_digits.py --help

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
    """Do the runs and return the exit status.

    Args:
        argv: the words after the program's name; ``None`` for those of this process.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _quit_before_training)
    from continual.cli import parse_arguments
    from trainer.errors import RunInterruptedError, UsageError

    arguments = parse_arguments(argv)
    out = arguments.out
    try:
        import torch

        from continual.report import write_report
        from continual.series import check_folder, run_all
        from trainer.prepare import check_writable
        from trainer.signals import StopRequest
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("ars", "continual", "trainer"):
            raise
        print(
            f"error: the module {error.name} is missing: pip install 'ars-triton[examples]'",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(arguments.threads)
    try:
        check_writable(out)
        done = check_folder(out, arguments.settings)
        with StopRequest() as stop:
            records = run_all(out, arguments.settings, arguments.runs, done, stop)
        table = write_report(out, arguments.settings, records, sweep=arguments.sweep)
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
        print(f"interrupted: run `{command}` again to go on", file=sys.stderr)
        return 128 + stopped.signum
    print(table, end="")
    print(f"\nResults are in {out}: results.json, table.md and figures.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
