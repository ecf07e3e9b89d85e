"""One progress bar a model, on standard error."""

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from tqdm import tqdm

from trainer.plan import ModelPlan

__all__ = ["Progress"]

_TERMINAL_SECONDS = 0.2  # between two drawings
_FILE_SECONDS = 15.0  # in a log file every drawing stays


class Progress:
    """Loss, speed, controller and penalty of a model in training; tqdm adds the remaining time.

    Args:
        plan: of the model.
        done: steps already done.
        seconds: that they took.
        tokens: tokens a step.
    """

    def __init__(self, plan: ModelPlan, done: int, seconds: float, tokens: int) -> None:
        interval = _TERMINAL_SECONDS if sys.stderr.isatty() else _FILE_SECONDS
        self._tokens = tokens
        self._start = done, seconds
        self._bar = tqdm(
            total=plan.steps,
            initial=done,
            desc=plan.name,
            unit="step",
            mininterval=interval,
            maxinterval=2 * interval,
            dynamic_ncols=True,
        )

    def show(self, row: Mapping[str, Any]) -> None:
        """Advance to the step of a log row."""
        if row.get("loss") is None:
            return
        step, seconds = self._start
        speed = (row["step"] - step) * self._tokens / max(row["seconds"] - seconds, 1e-9)
        self._bar.set_postfix_str(
            f"loss {row['loss']:.3f}, {speed / 1e3:.1f}k tokens/s, "
            f"Phi {row['phi']:.2f}, Psi {row['psi']:.2f}, EWC {row['penalty']:.1e}",
            refresh=False,
        )
        self._bar.update(row["step"] - self._bar.n)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
