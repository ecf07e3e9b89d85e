"""One progress bar a model, on standard error."""

import sys
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from tqdm import tqdm

from common.program import drawing_interval
from trainer.plan import ModelPlan
from trainer.run import Run
from trainer.state import TrainingState

__all__ = ["Progress"]


class Progress:
    """Loss, speed, controller and penalty of a model in training; tqdm adds the remaining time.

    Args:
        plan: of the model.
        state: where it begins.
        run: only its first process draws.
    """

    def __init__(self, plan: ModelPlan, state: TrainingState, run: Run) -> None:
        interval = drawing_interval()
        self._tokens = plan.settings.batch_size * run.config.sequence_len
        self._start = state.step, state.seconds
        self._name = plan.name
        self._bar = tqdm(
            total=plan.steps,
            initial=state.step,
            desc=plan.name,
            unit="step",
            mininterval=interval,
            maxinterval=2 * interval,
            dynamic_ncols=True,
            disable=not run.parallel.is_first,
        )

    def show(self, row: Mapping[str, Any]) -> None:
        """Advance to the step of a log row."""
        if row.get("loss") is None or self._bar.disable:
            return
        step, seconds = self._start
        speed = (row["step"] - step) * self._tokens / max(row["seconds"] - seconds, 1e-9)
        words = [f"loss {row['loss']:.3f}", f"{speed / 1e3:.1f}k tokens/s"]
        for key, title, form in (
            ("mfu", "MFU", ".1%"), ("phi", "Phi", ".2f"), ("psi", "Psi", ".2f"),
            ("penalty", "penalty", ".1e"),
        ):  # fmt: skip
            if row.get(key) is not None:
                words.append(f"{title} {row[key]:{form}}")
        self._bar.set_postfix_str(", ".join(words), refresh=False)
        self._bar.update(row["step"] - self._bar.n)

    def say(self, warnings: Iterable[str]) -> None:
        """Print warnings above the bar."""
        for text in warnings:
            if not self._bar.disable:
                self._bar.write(f"warning: {self._name}: {text}", file=sys.stderr)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
