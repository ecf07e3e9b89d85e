"""The training loop of one model: the same for every arm."""

import time
from functools import partial

from corpus import validation_windows
from trainer.evaluate import bits_per_byte
from trainer.health import Health
from trainer.keep import Keeper
from trainer.log import StepLog
from trainer.pace import Pace
from trainer.plan import ModelPlan
from trainer.progress import Progress
from trainer.recorder import Recorder
from trainer.run import Run
from trainer.state import TrainingState
from trainer.step import micro_batch_size, step
from trainer.tracking import open_tensorboard

__all__ = ["train"]


def train(
    state: TrainingState, plan: ModelPlan, run: Run, keeper: Keeper, *, resumed: bool
) -> float:
    """Train to the end of the cooled branch, leaving states and a log behind.

    Args:
        state: where to start; advanced in place.
        plan: of this model.
        run: asked to stop after every step that is waited for.
        keeper: of the model's states, and of the one at the end of the trunk, which a child grows
            from.
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
    score = partial(bits_per_byte, batch_size=micro_batch_size(plan, run))
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

        def keep(*, at_trunk_end: bool) -> None:
            state.log = recorder.flush()
            keeper.save(state, at_trunk_end=at_trunk_end)

        if not resumed:
            progress.say(state.warnings)  # of how it was grown
            recorder.add(state, None, measure())
            recorder.read(state)
        saved_at = time.monotonic()
        started = time.perf_counter()
        compiling = run.machine.compile  # in the first step, which `pace` waits for
        while state.step < plan.steps:
            update = step(state, plan, run)
            is_point = state.step % every == 0 or state.step in (plan.trunk, plan.steps)
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
            recorder.add(state, update, measured)
            recorder.read(state)
            pace.waited(state)
            at_trunk_end = state.step == plan.trunk and plan.has_child
            due = time.monotonic() - saved_at >= run.machine.checkpoint_seconds
            due, asked = run.parallel.any(due), run.parallel.any(run.stop.requested)
            if asked or due or at_trunk_end or state.step == plan.steps:
                run.parallel.from_first(partial(keep, at_trunk_end=at_trunk_end))
                saved_at = time.monotonic()
            if asked:
                run.stop.leave()
            started = time.perf_counter()
        return score(state.model, windows, corpus.token_bytes, between=run.stop.check)
