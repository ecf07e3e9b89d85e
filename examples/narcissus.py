"""Lose a run on purpose, and see which optimizer saves it.

    python examples/narcissus.py --workers 2     # all scenarios and arms, ten seeds
    python examples/narcissus.py --quick         # under three minutes
    python examples/narcissus.py --sensitivity   # the default controller with other settings
    python examples/narcissus.py --oscillation   # weights that explode while the loss falls
    python examples/narcissus.py --anchor        # the feedback loop held by penalties, and watched
    python examples/narcissus.py --help

Exit status: 0 done; 2 the command line or the output folder is wrong; 130 or 143 interrupted.
"""

import sys
from collections.abc import Sequence

from common.program import Begun, program


@program
def main(argv: Sequence[str] | None) -> Begun:
    """Run the stress tests."""
    import torch

    from common.errors import UsageError
    from common.output_folder import OutputFolder
    from common.program import StopRequest, command
    from stress.anchored_loop import identity_of, run_loop
    from stress.loop_report import write_loop
    from stress.oscillation import write_oscillations
    from stress.scenarios import SIZES, load_file, load_standard_library
    from stress.stress_options import SENSITIVITY_PAIRS, parse_options
    from stress.stress_report import draw_scenarios, draw_sensitivity, tables, write_summary
    from stress.stress_run import run_all, run_kept

    options = parse_options(argv)
    out, jobs, size = options.folder, options.jobs, SIZES[options.size]

    def work() -> None:
        if size.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--size gpu needs a CUDA device and torch finds none: name another")
        with OutputFolder(out) as output:
            output.hold()
            if options.oscillation:
                table = write_oscillations(out, options.seed_range)
                output.check()
                print(table)
                print(f"Results are in {out}: tables.md, oscillation.csv, oscillation.png.")
                return
            data = options.data
            corpus = load_standard_library() if data is None else load_file(data, size.sequence_len)
            with StopRequest() as stop:
                if options.anchor:
                    loops, workers = options.loop_jobs, options.workers
                    found = run_kept(output, loops, corpus, workers, stop, run_loop, identity_of)
                    table = write_loop(out, dict(zip(loops, found, strict=True)))
                    output.check()
                    print(f"{table}\nResults are in {out}: loop.md, loop.json, loop.png, runs/.")
                    return
                records = run_all(output, jobs, corpus, options.workers, stop)
                rows = write_summary(out, jobs, records, corpus, command())
                if options.sensitivity:
                    draw_sensitivity(out / "sensitivity.png", rows, SENSITIVITY_PAIRS)
                else:
                    draw_scenarios(out, jobs, records)
            output.check()
        print(tables(rows))
        print(f"Results are in {out}: tables.md, runs.csv, summary.json, figures, runs/.")

    return out, work


if __name__ == "__main__":
    sys.exit(main())
