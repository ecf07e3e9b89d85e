"""The progress bar of an experiment, on standard error."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from experiment.design import Job
from trainer.bars import drawing_interval

__all__ = ["Progress"]

_FILE_SECONDS = 60.0  # it lasts an hour


class Progress:
    """Models that are finished, weighed by their operations; tqdm adds the remaining time.

    Series differ in length by an order of magnitude, so their number would foretell nothing.

    Args:
        out: folder of the experiment; what is finished there already does not count as speed.
        jobs: the series.
    """

    def __init__(self, out: Path, jobs: Sequence[Job]) -> None:
        self._costs = {
            path: plan.flops
            for job in jobs
            for path, plan in zip(job.model_files(out), job.plans, strict=True)
        }
        self._models = len(self._costs)
        total = sum(self._costs.values())
        self._interval = drawing_interval(_FILE_SECONDS)
        self._drawn = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=self._finished(),
            smoothing=0,
            dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {elapsed} and about {remaining} to go{postfix}",
        )

    def _finished(self) -> int:
        """Operations of the models finished since the last call."""
        return sum(self._costs.pop(path) for path in list(self._costs) if path.exists())

    def show(self, running: Iterable[Job]) -> None:
        """Draw if it is time to.

        Args:
            running: series in training.
        """
        if time.monotonic() - self._drawn < self._interval:
            return
        self._drawn = time.monotonic()
        self._draw(running)

    def _draw(self, running: Iterable[Job]) -> None:
        self._bar.n += self._finished()
        done = f"{self._models - len(self._costs)} of {self._models} models"
        self._bar.set_postfix_str("; ".join([done, *(job.name for job in running)]))

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._draw(())
        self._bar.close()
