"""Reporting to TensorBoard, where asked for."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from common.errors import UsageError
from trainer.plan import ModelPlan
from trainer.run import Run

__all__ = ["check_tensorboard", "open_tensorboard"]

_NOT_DRAWN = ("step",)


def check_tensorboard(*, asked: bool) -> None:
    """See whether what is asked for is installed.

    Args:
        asked: whether event files are.

    Raises:
        UsageError: it is not.
    """
    if asked:
        try:
            import tensorboardX  # noqa: F401
        except ModuleNotFoundError:
            raise UsageError(
                "--tensorboard needs the package tensorboardX: pip install tensorboardX"
            ) from None


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
