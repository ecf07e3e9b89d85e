"""The states of a model in training that are kept, and what is done about one that is damaged.

    checkpoints/d3-grown/00000120.pt         the states after so many steps, the last few
    checkpoints/d3-grown-trunk-00000096.pt   a state of the trunk that cooled branches or children
                                             begin with; it goes when all of them are finished
    checkpoints/d3-grown.pt                  the finished model and its record; then the states go

A state that is damaged, or of another run, is put aside under another name and the one before it
is used: nothing of the user's is overwritten.
"""

import sys
from pathlib import Path
from typing import Any

from ars.atomic import drop_unfinished
from common.checkpoint_file import load_checkpoint, save_checkpoint
from common.errors import DamagedError, UsageError, understanding
from common.output_folder import put_aside
from trainer.series_plan import ModelPlan
from trainer.series_report import check_record
from trainer.series_run import Run
from trainer.step_log import check_log

__all__ = ["Keeper"]


class Keeper:
    """Writes and finds the checkpoints of one model.

    Args:
        plan: of the model.
        run: whose first process alone reads and writes.
    """

    def __init__(self, plan: ModelPlan, run: Run) -> None:
        self.run = run
        self._name = plan.name
        self._model = plan.name, plan.depth, plan.arm.name
        self._kept = plan.kept
        self._fingerprint = run.fingerprint(plan)
        self._states = run.checkpoints / plan.name
        self._used: Path | None = None  # the state that `latest` gave
        self._whole: set[int] = set()  # states of the trunk that have been read or written
        self._final = run.checkpoints / f"{plan.name}.pt"

    def save(self, state: dict[str, Any]) -> None:
        """Keep a state, and drop later ones and those older than the last few.

        Args:
            state: what `TrainingState.to_dict` returned, gathered; what others begin with is kept
                for them too.
        """
        if not self.run.parallel.is_first:
            return
        self.run.output.check()
        content, step = {**state, "run": self._fingerprint}, state["step"]
        if step in self._kept:
            save_checkpoint(self._trunk(step), content)
            self._whole.add(step)
        self._states.mkdir(exist_ok=True)
        self._drop_unfinished()
        for path in self._found():
            if int(path.stem) > step:  # the trunk before it was lost, and is trained again
                path.unlink()
        save_checkpoint(self._states / f"{step:08d}.pt", content)
        for old in self._found()[: -self.run.machine.keep]:
            old.unlink()

    def finish(self, model: dict[str, Any], record: dict[str, Any]) -> None:
        """Keep the finished model; the moments have done their work.

        Args:
            model: what `TrainingState.model_dict` returned, gathered.
            record: what is known of it.
        """
        if not self.run.parallel.is_first:
            return
        self.run.output.check()
        save_checkpoint(self._final, {**model, "record": record, "run": self._fingerprint})
        self.clear()

    def clear(self) -> None:
        """Drop the states of a finished model; what was put aside stays."""
        if not self._states.exists():
            return
        self._drop_unfinished()
        for path in self._found():
            path.unlink()
        if not any(self._states.iterdir()):
            self._states.rmdir()

    def record(self) -> dict[str, Any] | None:
        """What is known of the model, if it is finished."""
        content = self._usable(self._final)
        if content is None:
            return None
        check_log(self.run.folder / f"log_{self._name}.csv", content.get("log"))
        return self._checked(content.get("record"))

    def _checked(self, record: Any) -> dict[str, Any] | None:
        """The record, if a report can be made of it."""
        try:
            with understanding(f"the record in {self._final}", "it is put aside"):
                if (record["name"], record["depth"], record["arm"]) != self._model:
                    raise ValueError(f"it is of another model than {self._name}")
                check_record(record)
        except UsageError as error:
            _reject(self._final, error)
            return None
        return dict(record)

    def begin_again(self) -> None:
        """Drop the finished model, if there is one: it is trained once more for its trunk."""
        if self.run.parallel.is_first and self._final.exists():
            self.run.output.check()
            self._final.unlink()

    def trunk(self, step: int) -> dict[str, Any] | None:
        """The state of the trunk at a step for branches and children, if it has been reached."""
        return self._usable(self._trunk(step))

    def has_trunk(self, step: int) -> bool:
        """Whether the state of the trunk at a step is there and whole; it is read but once."""
        if step not in self._whole and self.trunk(step) is not None:
            self._whole.add(step)
        return step in self._whole and self._trunk(step).exists()

    def drop_trunk(self, step: int) -> None:
        """Drop a state of the trunk that nothing needs any more."""
        if self._trunk(step).exists():
            self._trunk(step).unlink()

    def reject_trunk(self, step: int, error: UsageError) -> None:
        """Put the state of the trunk at a step aside, because nothing can be made of its content.

        Args:
            step: of the trunk.
            error: says why.
        """
        _reject(self._trunk(step), error)

    def _trunk(self, step: int) -> Path:
        return self.run.checkpoints / f"{self._name}-trunk-{step:08d}.pt"

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """The newest state that is whole and its step, the older behind it; ``None`` for none."""
        for path in reversed(self._found()):
            content = self._usable(path)
            if content is not None:
                self._used = path
                return int(path.stem), content
        return None

    def reject_latest(self, error: UsageError) -> None:
        """Put what `latest` gave aside, because nothing can be made of its content.

        Args:
            error: says why.
        """
        assert self._used is not None, "only what was read can be rejected"
        _reject(self._used, error)

    def _found(self) -> list[Path]:
        return sorted(path for path in self._states.glob("*.pt") if path.stem.isdigit())

    def _drop_unfinished(self) -> None:
        """Drop what a kill left of a save."""
        drop_unfinished(self._states)
        for path in self._states.glob("*.pt.tmp"):  # of an earlier version
            path.unlink()

    def _usable(self, path: Path) -> dict[str, Any] | None:
        if not path.exists():
            return None
        try:
            content = load_checkpoint(path, remedy="it is put aside")
            if content.get("run") != self._fingerprint:
                raise DamagedError(f"{path} belongs to another run: it is put aside")
        except DamagedError as error:
            _reject(path, error)
            return None
        return content


def _reject(path: Path, error: UsageError) -> None:
    aside = put_aside(path)
    print(f"warning: {error} as {aside.name}, and what was before it is used", file=sys.stderr)
