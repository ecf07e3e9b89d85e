"""Learn digits task after task, and measure what each method forgets.

    python examples/continual_digits.py             # permutations, all methods, 5 and 10 tasks
    python examples/continual_digits.py --by-class  # two classes after the other, ten seeds
    python examples/continual_digits.py --quick     # the same path in well under a minute
    python examples/continual_digits.py --help

Exit status: 0 done; 2 the command line or the output folder is wrong; 130 or 143 interrupted.
"""

import sys
from collections.abc import Sequence

from common.program import Begun, program


@program
def main(argv: Sequence[str] | None) -> Begun:
    """Do the runs."""
    from common.output_folder import OutputFolder
    from common.program import StopRequest
    from continual.digits_options import parse_options
    from continual.digits_results import check_folder, run_all, write_report

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

    return out, work


if __name__ == "__main__":
    sys.exit(main())
