"""The training loop of one model: the same for both arms."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.checkpoint import save_checkpoint
from trainer.config import SeriesConfig
from trainer.data import Corpus, batch, validation_windows
from trainer.evaluate import bits_per_byte
from trainer.log import StepLog
from trainer.plan import ModelPlan
from trainer.progress import Progress
from trainer.schedule import learning_rate
from trainer.signals import StopRequest
from trainer.state import TrainingState

__all__ = ["CHECKPOINT_SECONDS", "train"]

CHECKPOINT_SECONDS = 15.0  # what a kill can cost at most
_CURVE_POINTS = 10  # validation measurements on the way
_GPU_LOG_EVERY = 20  # steps between two reads of the device, each of which waits for it


def train(
    state: TrainingState,
    plan: ModelPlan,
    config: SeriesConfig,
    corpus: Corpus,
    folder: Path,
    stop: StopRequest,
    *,
    resumed: bool,
) -> float:
    """Train to the end of the cooled branch, leaving checkpoints and a log behind.

    ``checkpoints/<name>.pt`` is the latest state; ``checkpoints/<name>-trunk.pt`` the state at the
    end of the trunk, which a child grows from.

    Args:
        state: where to start; advanced in place.
        plan: of this model.
        config: the settings.
        corpus: the data.
        folder: output folder.
        stop: asked after every step.
        resumed: whether ``state`` came from a checkpoint, whose log is to be continued.

    Returns:
        Validation bits per byte of the finished model.

    Raises:
        RunInterruptedError: a signal arrived; the state is saved.
    """
    latest = folder / "checkpoints" / f"{plan.name}.pt"
    windows = validation_windows(corpus.validation, config.sequence_len, config.eval_windows)
    curve_windows = validation_windows(corpus.validation, config.sequence_len, config.curve_windows)
    every = max(1, plan.steps // _CURVE_POINTS)
    tokens = config.batch_size * config.sequence_len
    with (
        StepLog(folder / f"log_{plan.name}.csv", state.step if resumed else None) as log,
        Progress(plan, state.step, state.seconds, tokens) as progress,
    ):
        recorder = _Recorder(log, progress, plan, config)
        if not resumed:
            recorder.add(state, None, None, bits_per_byte(state.model, curve_windows))
        saved_at = time.monotonic()
        while state.step < plan.steps:
            started = time.perf_counter()
            loss, rate = _step(state, plan, config, corpus)
            measured = None
            if state.step % every == 0 or state.step in (plan.trunk, plan.steps):
                loss.item()  # waits for the device: evaluation is not charged for the steps before
                state.seconds += time.perf_counter() - started
                measured = bits_per_byte(state.model, curve_windows)
                started = time.perf_counter()
            recorder.add(state, loss, rate, measured)
            state.seconds += time.perf_counter() - started
            at_trunk_end = state.step == plan.trunk and plan.has_child
            due = time.monotonic() - saved_at >= CHECKPOINT_SECONDS
            if stop.requested or due or at_trunk_end or state.step == plan.steps:
                recorder.flush()
                content = {**state.to_dict(), "record": None}
                if at_trunk_end:
                    save_checkpoint(latest.with_name(f"{plan.name}-trunk.pt"), content)
                save_checkpoint(latest, content)
                saved_at = time.monotonic()
            stop.check()
        return bits_per_byte(state.model, windows, between=stop.check)


def _step(
    state: TrainingState, plan: ModelPlan, config: SeriesConfig, corpus: Corpus
) -> tuple[Tensor, float]:
    inputs, targets = batch(
        corpus.train,
        stream=f"train {config.seed}",
        step=plan.first_batch + state.step,
        batch_size=config.batch_size,
        sequence_len=config.sequence_len,
    )
    rate = learning_rate(
        state.step, peak=config.lr, warmup=plan.warmup, trunk=plan.trunk, cooldown=plan.cooldown
    )
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    logits = state.model(inputs.to(config.device))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.to(config.device).flatten())
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    loss = loss.detach()
    state.optimizer.step(loss=loss)
    state.step += 1
    return loss, rate


class _Recorder:
    """Collects what a step reports and reads it from the device in groups."""

    def __init__(
        self, log: StepLog, progress: Progress, plan: ModelPlan, config: SeriesConfig
    ) -> None:
        self._log = log
        self._progress = progress
        self._plan = plan
        self._tokens = config.batch_size * config.sequence_len
        self._every = 1 if config.device == "cpu" else _GPU_LOG_EVERY
        self._waiting: list[tuple[dict[str, Any], Tensor | None]] = []

    def add(
        self, state: TrainingState, loss: Tensor | None, rate: float | None, measured: float | None
    ) -> None:
        row = {
            "step": state.step,
            "tokens": state.step * self._tokens,
            "flops": self._plan.prior_flops + state.step * self._plan.flops_per_step,
            "seconds": round(state.seconds, 3),
            "lr": rate,
            "val_bpb": measured,
        }
        values = None
        if loss is not None:
            shown = state.optimizer.diagnostics
            values = torch.stack(
                [
                    value.detach().to(torch.float64)
                    for value in (loss, shown["phi"], shown["psi"], shown["penalty"])
                ]
            )  # a copy: the optimizer overwrites its diagnostics
        self._waiting.append((row, values))
        if len(self._waiting) >= self._every:
            self._read()

    def flush(self) -> None:
        self._read()
        self._log.flush()

    def _read(self) -> None:
        for row, values in self._waiting:
            if values is not None:
                row |= dict(zip(("loss", "phi", "psi", "penalty"), values.tolist(), strict=True))
            self._log.write(row)
            self._progress.show(row)
        self._waiting.clear()
