"""Learn permuted digits one permutation after another, and measure what each method forgets.

    python examples/continual_digits.py            # all methods, 5 and 10 tasks, 5 seeds
    python examples/continual_digits.py --quick    # the same path in well under a minute
    python examples/continual_digits.py --help

Exit status: 0 done; 2 the command line or the output folder is wrong; 130 or 143 interrupted.
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
        from common.output_folder import OutputFolder
        from common.program import StopRequest
        from continual.digits_options import parse_options
        from continual.digits_results import check_folder, run_all, write_report
    except ModuleNotFoundError as error:
        return missing_module(error)
    options = parse_options(argv)
    out, settings = options.folder, options.settings

    def work() -> None:
        check_folder(out, settings)
        with OutputFolder(out) as output:
            output.hold()
            done = check_folder(out, settings)  # once more: nobody changes it now
            with StopRequest() as stop:
                records = run_all(output, settings, options.runs, done, options.threads, stop)
            table = write_report(out, settings, records, sweep=options.sweep)
            output.check()
        print(table, end="")
        print(f"\nResults are in {out}: results.json, table.md and figures.")

    return exit_status(out, work)


if __name__ == "__main__":
    sys.exit(main())
