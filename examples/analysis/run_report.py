"""What a training run leaves in its own folder besides the models: metrics and a report."""

from pathlib import Path

from analysis.assemble import analyze_runs, write_json
from analysis.report_html import write_report

__all__ = ["write_run_analysis"]

_BOOTSTRAPS = 50  # enough to see how wide an interval is; analyze.py takes 1000


def write_run_analysis(
    folder: Path, *, peak_flops: float | None = None, price_per_hour: float | None = None
) -> list[str]:
    """Write ``metrics/*.json`` and ``report.html`` from what lies in a run's folder.

    Args:
        folder: with ``metrics.json``, ``config.json`` and the logs of a series, which may not be
            finished.
        peak_flops: operations a second of one device; ``None`` gives no MFU.
        price_per_hour: of one device; ``None`` gives no prices.

    Returns:
        The names of the files, relative to the folder.

    Raises:
        UsageError: the files are not as they should be, or the peak cannot be true.
    """
    analysis = analyze_runs(
        [folder / "metrics.json"],
        bootstraps=_BOOTSTRAPS,
        peak_flops=peak_flops,
        price_per_hour=price_per_hour,
    )
    return [*write_json(analysis, folder), write_report(analysis, folder)]
