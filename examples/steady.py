"""Train through faults that happen, by the package's default and by what others use.

    python examples/steady.py --quick                      # the same path in under a minute
    python examples/steady.py --tune --workers 2           # each peer's settings, on other seeds
    python examples/steady.py --tuned out/steady-tune/tuning.json --workers 2
    python examples/steady.py --help

Exit status: 0 done; 2 the command line, a file or the output folder is wrong; 130 or 143
interrupted.
"""

import sys
from collections.abc import Sequence

from common.program import Begun, program


@program
def main(argv: Sequence[str] | None) -> Begun:
    """Do the runs."""
    import torch

    from common.errors import UsageError
    from common.output_folder import OutputFolder
    from common.program import StopRequest, command
    from stress.scenarios import SIZES, load_file, load_standard_library
    from stress.steady_options import parse_options, read_tuned
    from stress.steady_report import write_comparison, write_tuning
    from stress.step_times import kept_times
    from stress.stress_run import run_all

    options = parse_options(argv)
    out, size = options.folder, SIZES[options.size_name]

    def work() -> None:
        if size.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--size gpu needs a CUDA device and torch finds none: name another")
        tuned = {} if options.tuned is None else read_tuned(options.tuned, options.networks)
        with OutputFolder(out) as output:
            output.hold()
            data = options.data
            corpus = load_standard_library() if data is None else load_file(data, size.sequence_len)
            with StopRequest() as stop:
                jobs = options.tuning_jobs if options.tune else options.jobs(tuned)
                records = run_all(output, jobs, corpus, options.workers, stop)
                if options.tune:
                    text = write_tuning(out, jobs, records, corpus, command())
                else:
                    rounds, times = 10 if options.quick else 200, {}
                    for network in dict.fromkeys(job.network for job in jobs):
                        arms = {a: tuned.get(network, {}).get(a, ()) for a in options.arm_names}
                        file = out / f"times-{network}.json"
                        times[network] = kept_times(file, arms, network, size, corpus, rounds, stop)
                    text = write_comparison(out, jobs, records, corpus, command(), times)
            output.check()
        print(text)
        files = "tuning.json" if options.tune else "tables.md, steady.png, steady.json, runs.csv"
        print(f"Results are in {out}: {files}, runs/.")

    return out, work


if __name__ == "__main__":
    sys.exit(main())
