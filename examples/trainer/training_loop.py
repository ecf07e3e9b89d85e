"""The training loop of one model, the same for every arm: steps, evaluation, what is saved when."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from corpus import batch, validation_windows
from trainer.kept_states import Keeper
from trainer.parallel import Parallel
from trainer.recorder import Health, Progress, Recorder, Update, open_tensorboard
from trainer.series_plan import ModelPlan, learning_rate
from trainer.series_run import Run
from trainer.step_log import StepLog
from trainer.training_state import TrainingState

__all__ = ["Pace", "bits_per_byte", "step", "train"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_MOST_STEPS = 20  # between two times that the device is waited for
_SECONDS = 2.0  # a stretch that took longer is halved: torchrun kills 30 s after a signal


def train(
    state: TrainingState, plan: ModelPlan, run: Run, keeper: Keeper, *, resumed: bool
) -> float:
    """Train to the end of the cooled branch, leaving states and a log behind.

    Args:
        state: where to start; advanced in place.
        plan: of this model.
        run: asked to stop after every step that is waited for.
        keeper: of the model's states, and of those that branches and children begin with.
        resumed: whether ``state`` came from a checkpoint, whose log is to be continued.

    Returns:
        Validation bits per byte of the finished model.

    Raises:
        RunInterruptedError: a signal arrived; the state is saved.
    """
    config, corpus = run.config, run.corpus
    windows = validation_windows(corpus.validation, config.sequence_len, config.eval_windows)
    curve_windows = validation_windows(corpus.validation, config.sequence_len, config.curve_windows)
    # What fits the training fits the evaluation, and on a CPU its activations fit the cache.
    score = partial(bits_per_byte, batch_size=micro_batch_size(plan, run), parallel=run.parallel)
    every = max(1, plan.steps // config.curve_points)
    health = Health(state)
    log_path = run.folder / f"log_{plan.name}.csv" if run.parallel.is_first else None
    with (
        StepLog(log_path, state.step if resumed else None, state.log) as log,
        open_tensorboard(run, plan, state.step) as report,
        Progress(plan, state, run) as progress,
    ):
        recorder = Recorder(state, log, progress, report, plan, run)
        if log.warning is not None:
            progress.say([log.warning])
            state.warnings.append(log.warning)
        pace = Pace(state, plan, run.parallel)

        def measure() -> float:
            return score(state.model, curve_windows, corpus.token_bytes)

        def keep(content: dict[str, Any]) -> None:
            state.log = recorder.flush()
            keeper.save({**content, "log": state.log})

        if not resumed:
            if plan.branch_of is None:
                progress.say(state.warnings)  # of how it was grown
            recorder.add(state, None, measure())
            recorder.read(state)
        saved_at = time.monotonic()
        started = time.perf_counter()
        compiling = run.machine.compile  # in the first step, which `pace` waits for
        while state.step < plan.steps:
            update = step(state, plan, run)
            kept = state.step in plan.kept
            is_point = kept or state.step % every == 0 or state.step in (plan.trunk, plan.steps)
            if not (is_point or pace.is_due(state.step)):
                recorder.add(state, update, None)
                continue
            update.loss.item()  # waits, so that all that was spent on the steps has been spent
            state.seconds += 0.0 if compiling else time.perf_counter() - started
            compiling = False
            measured = None
            if is_point:
                measured = measure()
                progress.say(health.look(state, update, measured))
                state.note_pulls()
            recorder.add(state, update, measured)
            recorder.read(state)
            pace.waited(state)
            due = time.monotonic() - saved_at >= run.machine.checkpoint_seconds
            due, asked = run.parallel.any(due), run.parallel.any(run.stop.requested)
            if asked or due or kept or state.step == plan.steps:
                content = run.parallel.gathered(state.to_dict())
                run.parallel.from_first(partial(keep, content))
                saved_at = time.monotonic()
            if asked:
                run.stop.leave()
            started = time.perf_counter()
        leave = partial(run.parallel.leave_together, run.stop)
        return score(state.model, windows, corpus.token_bytes, between=leave)


class Pace:
    """Chooses the steps after which the device is waited for, the same in every process.

    On the CPU nothing runs ahead, so that is every step.

    Args:
        state: where training begins.
        plan: of the model, whose last step is waited for.
        parallel: the processes, which agree on the steps.
    """

    def __init__(self, state: TrainingState, plan: ModelPlan, parallel: Parallel) -> None:
        self._last = plan.steps
        self._parallel = parallel
        self._most = 1 if parallel.device.type == "cpu" else _MOST_STEPS
        self._stretch = 1
        self._begun = state.step, state.seconds

    def is_due(self, step: int) -> bool:
        """Whether to wait after this step."""
        return step >= self._begun[0] + self._stretch or step == self._last

    def waited(self, state: TrainingState) -> None:
        """Begin the next stretch, half as long as one that took long and else twice as long.

        Args:
            state: after a step that was waited for, the same step in every process.
        """
        step, seconds = self._begun
        done = state.step - step
        if self._most > 1:
            slow = self._parallel.any(state.seconds - seconds > _SECONDS)
            self._stretch = max(1, done // 2) if slow else min(2 * done, self._most)
        self._begun = state.step, state.seconds


@torch.no_grad()
def bits_per_byte(
    model: nn.Module,
    windows: Tensor,
    token_bytes: Tensor,
    *,
    batch_size: int = 32,
    between: Callable[[], None] = lambda: None,
    parallel: Parallel | None = None,
) -> float:
    """Mean code length of the bytes: sum of nats / ln 2 / bytes.

    The first token of a window is context only, and tokens that stand for no bytes are left out.
    Logits and losses are fp32, their sum fp64.

    Args:
        model: (B, T) int64 -> logits (B, T, V).
        windows: (n, T + 1) int64.
        token_bytes: (V,) int64, the bytes of each token.
        batch_size: windows at a time in a process; bounds the memory.
        between: called before every batch, as often in every process; may raise to stop.
        parallel: the processes that divide the windows and get the same result; ``None`` for this
            one alone.
    """
    device = next(model.parameters()).device
    token_bytes = token_bytes.to(device)
    was_training = model.training
    model.eval()
    nats = torch.zeros((), dtype=torch.float64, device=device)
    try:
        for part in windows.split(batch_size * (1 if parallel is None else parallel.world_size)):
            between()
            own = part if parallel is None else part[parallel.part(len(part))]
            if len(own) == 0:
                if parallel is not None and parallel.divides:  # the others need its weights
                    model(part[:1, :-1].to(device))
                continue
            part = own.to(device)
            logits = model(part[:, :-1]).float()
            targets = part[:, 1:].flatten()
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
            nats += losses.where(token_bytes[targets] > 0, 0.0).sum(dtype=torch.float64)
    finally:
        model.train(was_training)
    if parallel is not None:
        parallel.sum(nats)
    return nats.item() / math.log(2) / int(token_bytes[windows[:, 1:].to(device)].sum())


def micro_batch_size(plan: ModelPlan, run: Run) -> int:
    """Sequences that a process differentiates at a time."""
    return run.machine.device_batch_size or plan.settings.batch_size // run.parallel.world_size


def step(state: TrainingState, plan: ModelPlan, run: Run) -> Update:
    """Advance a model by one update.

    Args:
        state: advanced in place.
        plan: of the model.
        run: whose next batch it is.
    """
    share = learning_rate(
        state.step,
        peak=1.0,
        warmup=plan.warmup,
        trunk=plan.trunk,
        cooldown=plan.cooldown,
        shape=run.config.cooldown_shape,
    )
    state.optimizer.set_rate(share)
    state.optimizer.zero_grad()
    size = plan.settings.batch_size // run.parallel.world_size
    inputs, targets = batch(
        run.corpus.train,
        stream=f"train {run.config.seed}",
        step=-(-plan.first_sample // plan.settings.batch_size) + state.step,
        batch_size=size,
        sequence_len=run.config.sequence_len,
        rank=run.parallel.rank,
        world_size=run.parallel.world_size,
    )
    device = run.parallel.device
    if device.type == "cuda":  # copied from pageable memory, a batch is waited for
        inputs, targets = inputs.pin_memory(), targets.pin_memory()
    micro = list(zip(*(x.to(device, non_blocking=True).split(micro_batch_size(plan, run))
                       for x in (inputs, targets)), strict=True))  # fmt: skip
    totals = torch.zeros(2, device=device)  # the task's loss and the distillation's
    for index, (x, y) in enumerate(micro):
        with _synchronised(state.forward, last=index == len(micro) - 1):
            part = len(x) / size
            loss, extra = _losses(state, x, y, run)
            whole = (loss if extra is None else loss + extra) * part
            (whole if state.scaler is None else state.scaler.scale(whole)).backward()
            totals[0] += loss.detach() * part
            if extra is not None:
                totals[1] += extra.detach() * part
    total, distillation = run.parallel.mean(totals).unbind()
    state.optimizer.step(total, state.scaler)
    if state.scaler is not None:
        state.scaler.update()
    state.step += 1
    has_teacher = state.inheritance.distillation is not None
    return Update(total, state.optimizer.rate, distillation if has_teacher else None)


def _losses(state: TrainingState, x: Tensor, y: Tensor, run: Run) -> tuple[Tensor, Tensor | None]:
    dtype = _AUTOCAST.get(run.config.precision)
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        logits = state.forward(x)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        distillation = state.inheritance.distillation
        extra = None if distillation is None else distillation.value(x, logits)
    return loss, extra


def _synchronised(forward: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
    """Average gradients over the processes in the last micro-batch only."""
    if isinstance(forward, nn.parallel.DistributedDataParallel) and not last:
        return forward.no_sync()
    return nullcontext()
