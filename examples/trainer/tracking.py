"""Reporting to TensorBoard and Weights & Biases, where asked for."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from trainer.errors import UsageError
from trainer.plan import ModelPlan
from trainer.reading import read_json
from trainer.run import CONFIG_FILE, Run

__all__ = ["Tracker", "check_trackers", "open_tracker"]

_NOT_DRAWN = ("step",)


class Tracker:
    """Sends the rows of a model to those that were asked for, by the step.

    Args:
        writer: a TensorBoard writer, or ``None``.
        wandb_run: a run of Weights & Biases, or ``None``.
    """

    def __init__(self, writer: Any = None, wandb_run: Any = None) -> None:
        self._writer, self._wandb = writer, wandb_run

    def write(self, row: Mapping[str, Any]) -> None:
        """Send one row; what is ``None`` is left out."""
        values = {k: v for k, v in row.items() if v is not None and k not in _NOT_DRAWN}
        if self._writer is not None:
            for key, value in values.items():
                self._writer.add_scalar(key, value, row["step"])
        if self._wandb is not None:
            self._wandb.log(values, step=row["step"])


def check_trackers(*, tensorboard: bool, wandb: bool) -> None:
    """See whether what is asked for is installed.

    Args:
        tensorboard: whether event files are asked for.
        wandb: whether Weights & Biases is.

    Raises:
        UsageError: it is not.
    """
    for wanted, module, option in (
        (tensorboard, "tensorboardX", "--tensorboard"),
        (wandb, "wandb", "--wandb"),
    ):
        if wanted:
            try:
                __import__(module)
            except ModuleNotFoundError:
                raise UsageError(
                    f"{option} needs the package {module}: pip install {module}"
                ) from None


def _id(run: Run, plan: ModelPlan) -> str:
    """The same whenever a model of this folder goes on, and no other folder's."""
    stored = read_json(run.folder / CONFIG_FILE, remedy="restore it")  # which was whole before
    text = f"{stored.get('id')} {run.fingerprint(plan)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def open_tracker(run: Run, plan: ModelPlan, step: int) -> Iterator[Tracker]:
    """The tracker of a model, closed at the end.

    Args:
        run: of which the model is; only its first process reports.
        plan: of the model.
        step: reports of later steps are those of an interrupted run and are dropped.
    """
    machine = run.machine
    if not run.parallel.is_first or not (machine.tensorboard or machine.wandb):
        yield Tracker()
        return
    writer = wandb_run = None
    if machine.tensorboard:
        from tensorboardX import SummaryWriter

        folder = run.folder / "tensorboard" / plan.name
        writer = SummaryWriter(
            str(folder),
            purge_step=step + 1 if step else None,
            filename_suffix=f".{step:08d}",  # the rest of its name is the second, which may recur
        )
    if machine.wandb:
        import wandb

        wandb_run = wandb.init(
            project=machine.wandb,
            name=f"{plan.name} seed {run.config.seed}",
            id=_id(run, plan),
            resume="allow",
            config=run.config.to_dict(),
        )
    try:
        yield Tracker(writer, wandb_run)
    finally:
        if writer is not None:
            writer.close()
        if wandb_run is not None:
            wandb_run.finish()
