"""What a step reports: collected on the device, read in groups, told to everyone who listens."""

import resource
import sys
from typing import Any

import torch
from torch import Tensor

from trainer.log import StepLog
from trainer.plan import ModelPlan
from trainer.progress import Progress
from trainer.run import Run
from trainer.state import TrainingState
from trainer.step import Update
from trainer.tracking import Tracker

__all__ = ["Recorder"]

_GPU_LOG_EVERY = 20  # steps between two reads of the device, each of which waits for it
_MIB = 2**20


class Recorder:
    """Rows of the log, from the state of a model.

    Args:
        log: takes every row.
        progress: shows the newest.
        tracker: takes every row.
        plan: of the model.
        run: of which the model is.
    """

    def __init__(
        self, log: StepLog, progress: Progress, tracker: Tracker, plan: ModelPlan, run: Run
    ) -> None:
        self._listeners = (log.write, tracker.write, progress.show)
        self._log = log
        self._plan = plan
        self._run = run
        self._tokens = plan.settings.batch_size * run.config.sequence_len
        self._every = 1 if run.parallel.device.type == "cpu" else _GPU_LOG_EVERY
        self._waiting: list[tuple[dict[str, Any], list[str], Tensor | None]] = []
        self._before: tuple[int, float] | None = None

    def is_due(self, step: int) -> bool:
        """Whether the device is read after this step, so that waiting costs nothing more."""
        return step % self._every == 0 or step == self._plan.steps

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
            "seconds": round(state.seconds, 3),
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
        if self.is_due(state.step):
            self._read()

    def flush(self) -> None:
        """Put every row on the disk."""
        self._read()
        self._log.flush()

    def _read(self) -> None:
        for row, names, values in self._waiting:
            if values is not None:
                row |= dict(zip(names, values.tolist(), strict=True))
                row |= self._speed(row)
            for listener in self._listeners:
                listener(row)
        self._waiting.clear()

    def _speed(self, row: dict[str, Any]) -> dict[str, float | None]:
        step, seconds = self._before or (row["step"], row["seconds"])
        self._before = row["step"], row["seconds"]
        found: dict[str, float | None] = {"memory": self._memory()}
        if row["seconds"] > seconds:
            steps_per_second = (row["step"] - step) / (row["seconds"] - seconds)
            found["tokens_per_second"] = round(steps_per_second * self._tokens, 1)
            peak = self._run.machine.peak_flops
            if peak is not None:
                flops = steps_per_second * self._plan.flops_per_step
                found["mfu"] = round(flops / (peak * self._run.parallel.world_size), 5)
        return found

    def _memory(self) -> float:
        device = self._run.parallel.device
        if device.type == "cuda":
            return round(torch.cuda.max_memory_allocated(device) / _MIB, 1)
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MIB, 1)
