"""What a step reports: collected on the device, read in groups, told to everyone who listens.

The host knows when a group began and when it ended, not when the device did each of its steps: they
share its time evenly.
"""

import resource
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainer.log import StepLog
from trainer.plan import ModelPlan
from trainer.progress import Progress
from trainer.run import Run
from trainer.state import TrainingState
from trainer.step import Update

__all__ = ["Recorder"]

_MIB = 2**20


class Recorder:
    """Rows of the log, from the state of a model.

    Args:
        state: where training begins.
        log: takes every row.
        progress: shows the newest.
        report: takes every row.
        plan: of the model.
        run: of which the model is.
    """

    def __init__(
        self,
        state: TrainingState,
        log: StepLog,
        progress: Progress,
        report: Callable[[dict[str, Any]], None],
        plan: ModelPlan,
        run: Run,
    ) -> None:
        self._listeners = (log.write, report, progress.show)
        self._log = log
        self._plan = plan
        self._run = run
        self._tokens = plan.settings.batch_size * run.config.sequence_len
        self._waiting: list[tuple[dict[str, Any], list[str], Tensor | None]] = []
        self._read_at = state.step, state.seconds

    def add(self, state: TrainingState, update: Update | None, measured: float | None) -> None:
        """Take note of a step.

        Args:
            state: after it.
            update: of the step; ``None`` before the first one.
            measured: validation bits per byte, where measured.
        """
        plan = self._plan
        row = {
            "step": state.step,
            "tokens": plan.prior_tokens + state.step * self._tokens,
            "flops": plan.prior_flops + state.step * plan.flops_per_step,
            "lr": None if update is None else update.rate,
            "val_bpb": measured,
        }
        names: list[str] = []
        values = None
        if update is not None:
            shown = {"loss": update.loss, **state.optimizer.shown()}
            if update.distillation is not None:
                shown["penalty"] = shown.get("penalty", 0.0) + update.distillation
            names = list(shown)
            # A copy: the optimizer overwrites its diagnostics.
            device = update.loss.device
            values = torch.stack([v.detach().to(device, torch.float64) for v in shown.values()])
        self._waiting.append((row, names, values))

    def read(self, state: TrainingState) -> None:
        """Tell what has been noted.

        Args:
            state: after the last step that was noted, which the device has done.
        """
        step, seconds = self._read_at
        steps, spent = state.step - step, state.seconds - seconds
        group = {"memory": self._memory(), **self._speed(steps, spent)} if steps else {}
        for row, names, values in self._waiting:
            done = (row["step"] - step) / steps if steps else 1.0
            row["seconds"] = round(seconds + done * spent, 3)
            if values is not None:
                row |= dict(zip(names, values.tolist(), strict=True)) | group
            for listener in self._listeners:
                listener(row)
        self._waiting.clear()
        self._read_at = state.step, state.seconds

    def flush(self) -> dict[str, Any] | None:
        """Put every row that was told on the disk; return what `StepLog.flush` does."""
        return self._log.flush()

    def _speed(self, steps: int, seconds: float) -> dict[str, float]:
        if seconds <= 0:
            return {}
        found = {"tokens_per_second": round(steps * self._tokens / seconds, 1)}
        if self._run.machine.peak_flops is not None:
            peak = self._run.machine.peak_flops * self._run.parallel.world_size
            found["mfu"] = round(steps * self._plan.flops_per_step / seconds / peak, 5)
        return found

    def _memory(self) -> float:
        device = self._run.parallel.device
        if device.type == "cuda":
            return round(torch.cuda.max_memory_allocated(device) / _MIB, 1)
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MIB, 1)
