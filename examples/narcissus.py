"""Lose a run on purpose, and see which optimizer saves it.

    python examples/narcissus.py --workers 2     # all scenarios and arms, ten seeds
    python examples/narcissus.py --quick         # under three minutes
    python examples/narcissus.py --sensitivity   # the default controller with other settings
    python examples/narcissus.py --help

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
    """Run the stress tests and return the exit status.

    Args:
        argv: the words after the program's name; ``None`` for those of this process.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _quit_before_training)
    try:
        import torch

        from stress.cli import SENSITIVITY_PAIRS, parse_arguments
        from stress.figures import draw_scenarios, draw_sensitivity
        from stress.summary import tables, write_summary
        from stress.sweep import run_jobs
        from trainer.data import load_file, load_standard_library
        from trainer.errors import RunInterruptedError, UsageError
        from trainer.prepare import check_writable
        from trainer.signals import StopRequest
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("ars", "trainer", "stress"):
            raise
        print(
            f"error: the module {error.name} is missing: pip install 'ars-triton[examples]'",
            file=sys.stderr,
        )
        return 2
    arguments = parse_arguments(argv)
    out, jobs, data = arguments.out, arguments.jobs, arguments.data
    command = shlex.join(["python", *sys.orig_argv[1:]])
    try:
        if arguments.size.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--size gpu needs a CUDA device and torch finds none: name another")
        check_writable(out)
        length = arguments.size.sequence_len
        corpus = load_standard_library() if data is None else load_file(data, length)
        with StopRequest() as stop:
            records = run_jobs(out / "runs", jobs, corpus, arguments.workers, stop)
            rows = write_summary(out, jobs, records, corpus, command)
            if arguments.sensitivity:
                draw_sensitivity(out / "sensitivity.png", rows, SENSITIVITY_PAIRS)
            else:
                draw_scenarios(out, jobs, records)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"error: writing to {out} failed ({error.strerror or error}): make room there or name "
            "another folder with --out",
            file=sys.stderr,
        )
        return 2
    except RunInterruptedError as stopped:
        print(f"interrupted: run `{command}` again to resume", file=sys.stderr)
        return 128 + stopped.signum
    print(tables(rows))
    print(f"Results are in {out}: tables.md, runs.csv, summary.json, figures, runs/.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
