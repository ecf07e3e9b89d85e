"""One update: a batch, its gradient over micro-batches and processes, the optimizer's step."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from corpus import batch
from trainer.plan import ModelPlan
from trainer.run import Run
from trainer.schedule import learning_rate
from trainer.state import TrainingState

__all__ = ["Update", "micro_batch_size", "step"]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
        state.step, peak=1.0, warmup=plan.warmup, trunk=plan.trunk, cooldown=plan.cooldown
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
