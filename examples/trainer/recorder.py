"""What a step reports: read from the device in groups, logged, drawn, and searched for warnings.

The host knows when a group began and when it ended, not when the device did each of its steps: they
share its time evenly.
"""

import math
import re
import resource
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ars.regularizers import PenaltyMonitor
from common.program import drawing_interval
from trainer.series_plan import ModelPlan
from trainer.series_run import Run
from trainer.step_log import StepLog
from trainer.training_state import TrainingState

__all__ = ["Health", "Progress", "Recorder", "Update", "numbers_apart", "open_tensorboard"]

_MIB = 2**20
_NOT_DRAWN = ("step",)
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d+(?:\.\d+)?(?:e[-+]?\d+)?|inf|nan)(?!\w)")


@dataclass(frozen=True)
class Update:
    """What a step amounts to.

    Args:
        loss: of the task on the batch, 0-d, nats a token.
        rate: AdamW's learning rate.
        distillation: value of that penalty, 0-d, or ``None``.
    """

    loss: Tensor
    rate: float
    distillation: Tensor | None


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

    def __exit__(self, *_: object) -> None:
        self._bar.close()


@contextmanager
def open_tensorboard(
    run: Run, plan: ModelPlan, step: int
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """What takes the rows of a model's log, closed at the end.

    Args:
        run: of which the model is; only its first process reports.
        plan: of the model.
        step: reports of later steps are those of an interrupted run and are dropped.
    """
    if not run.parallel.is_first or not run.machine.tensorboard:
        yield lambda _: None
        return
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(
        str(run.folder / "tensorboard" / plan.name),
        purge_step=step + 1 if step else None,
        filename_suffix=f".{step:08d}",  # the rest of its name is the second, which may recur
    )

    def write(row: Mapping[str, Any]) -> None:
        for key, value in row.items():
            if value is not None and key not in _NOT_DRAWN:
                writer.add_scalar(key, value, row["step"])

    try:
        yield write
    finally:
        writer.close()


def numbers_apart(text: str) -> tuple[str, tuple[str, ...]]:
    """A warning's kind, which is its text without numbers, and the numbers.

    Example:
        >>> numbers_apart("the penalty, 5.2, exceeds the task loss, 1e-03")
        ('the penalty, …, exceeds the task loss, …', ('5.2', '1e-03'))
    """
    return _NUMBER.sub("…", text), tuple(_NUMBER.findall(text))


class Health:
    """Looks at the loss and its parts now and then.

    A loss that is no longer a number, a penalty above the task's loss, a subspace part above half
    of it and a penalty that is identically 0 are warned of; an importance that has collapsed was,
    when it was made. Each look sees other numbers, so a warning is known by its kind.

    Args:
        state: whose list of warnings grows, and which takes along what has been seen.
    """

    def __init__(self, state: TrainingState) -> None:
        self._monitor = PenaltyMonitor()
        if state.seen is not None:
            self._monitor.load_state_dict(state.seen)
        self._said = {numbers_apart(text)[0] for text in state.warnings}

    def look(self, state: TrainingState, update: Update, measured: float) -> list[str]:
        """Compare the parts; return what has not been said of this model before.

        Args:
            state: of the model.
            update: of its last step.
            measured: validation bits per byte after it.
        """
        if not math.isfinite(measured):
            return self._new(state, [f"diverged: at step {state.step} its loss is not a number"])
        kept = state.inheritance
        if kept.penalty is None and update.distillation is None:
            return []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            penalty = 0.0 if update.distillation is None else float(update.distillation)
            if kept.penalty is not None:
                penalty += float(state.optimizer.shown()["penalty"])
            self._monitor.observe(update.loss, penalty, kept.subspace_value())
        state.seen = self._monitor.state_dict()
        return self._new(state, [str(w.message) for w in caught])

    def _new(self, state: TrainingState, texts: list[str]) -> list[str]:
        found = {numbers_apart(text)[0]: text for text in texts}
        new = [text for kind, text in found.items() if kind not in self._said]
        self._said |= found.keys()
        state.warnings += new
        return new


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
