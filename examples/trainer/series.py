"""The whole series: what is done, what is next, and what it amounts to.

The checkpoints are the only memory. A model whose ``checkpoints/<name>.pt`` holds a record is
finished; one whose file holds a state is continued; the report is rebuilt from the records.
"""

import json
import platform
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer import report
from trainer.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from trainer.config import SeriesConfig
from trainer.data import Corpus
from trainer.errors import UsageError
from trainer.plan import ModelPlan, plan_series
from trainer.signals import StopRequest
from trainer.state import TrainingState, build_from_scratch, flops_per_token, inherit, restore
from trainer.train import train

__all__ = ["Series", "check_folder", "run_series"]

CONFIG_FILE = "config.json"


def check_folder(folder: Path, config: SeriesConfig, corpus: Corpus) -> None:
    """See whether a run with these settings may use an output folder; write nothing.

    Args:
        folder: may or may not exist.
        config: the settings.
        corpus: the data.

    Raises:
        UsageError: the folder holds something else, or a run with other settings or data.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"--out {folder} is a file: name a folder")
    stored_path = folder / CONFIG_FILE
    if not stored_path.exists():
        if any(folder.iterdir()):
            raise UsageError(
                f"--out {folder} holds files that are not a run of this program: "
                "name a new or empty folder"
            )
        return
    try:
        stored = json.loads(stored_path.read_text(encoding="utf-8"))
        settings, data_sha256 = dict(stored["settings"]), stored["data"]["sha256"]
    except (ValueError, KeyError, TypeError, OSError):
        raise UsageError(
            f"{stored_path} is damaged: delete the folder or name another with --out"
        ) from None
    changes = [
        f"{key} {settings.get(key)} (now {value})"
        for key, value in config.to_dict().items()
        if settings.get(key) != value
    ]
    if data_sha256 != corpus.sha256:
        changes.append("other training data")
    if changes:
        raise UsageError(
            f"{folder} holds a run with {', '.join(changes)}: "
            "repeat its settings, name another folder with --out, or delete this one"
        )


def run_series(
    folder: Path, config: SeriesConfig, corpus: Corpus, stop: StopRequest
) -> tuple[str, bool]:
    """Train whatever is not yet trained and write the report.

    Args:
        folder: output folder, accepted by `check_folder`; created if absent.
        config: the settings.
        corpus: the data.
        stop: asked at every safe point.

    Returns:
        The table, and whether everything had been trained before.

    Raises:
        RunInterruptedError: a signal arrived; what was reached is saved.
        UsageError: a checkpoint is damaged.
    """
    series = Series(folder, config, corpus, stop)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    if not (folder / CONFIG_FILE).exists():
        stored = {"settings": config.to_dict(), "data": {"sha256": corpus.sha256, **corpus.facts}}
        write_atomically(folder / CONFIG_FILE, json.dumps(stored, indent=2) + "\n")
    return series.run()


class Series:
    """One series in one folder.

    Args:
        folder: output folder.
        config: the settings.
        corpus: the data.
        stop: asked at every safe point.
    """

    def __init__(
        self, folder: Path, config: SeriesConfig, corpus: Corpus, stop: StopRequest
    ) -> None:
        self.folder = folder
        self.config = config
        self.corpus = corpus
        self.stop = stop
        self.plans = plan_series(config, partial(flops_per_token, sequence_len=config.sequence_len))

    def run(self) -> tuple[str, bool]:
        """Finish every model in order; return the table and whether there was nothing to do."""
        records = []
        nothing_to_do = True
        for plan in self.plans:
            record = self._finished(plan)
            if record is None:
                nothing_to_do = False
                self.stop.check()
                record = self._train(plan)
            records.append(record)
            if not nothing_to_do:
                report.write_metrics(self.folder, records)
        if nothing_to_do:
            report.write_metrics(self.folder, records)
        return report.write_report(self.folder, records, self.plans), nothing_to_do

    def _path(self, plan: ModelPlan) -> Path:
        return self.folder / "checkpoints" / f"{plan.name}.pt"

    def _trunk_path(self, name: str) -> Path:
        return self.folder / "checkpoints" / f"{name}-trunk.pt"

    def _load(self, path: Path) -> dict[str, Any] | None:
        if not path.exists():
            return None
        return load_checkpoint(path, remedy="delete it and run the same command again")

    def _trunk_is_missing(self, plan: ModelPlan) -> bool:
        """Whether a child still has to grow out of a trunk that is not on the disk."""
        children = [p for p in self.plans if p.parent == plan.name]
        needed = any(not self._path(child).exists() for child in children)
        return needed and not self._trunk_path(plan.name).exists()

    def _finished(self, plan: ModelPlan) -> dict[str, Any] | None:
        content = self._load(self._path(plan))
        if content is None or content["record"] is None or self._trunk_is_missing(plan):
            return None
        return dict(content["record"])

    def _train(self, plan: ModelPlan) -> dict[str, Any]:
        content = self._load(self._path(plan))
        past_trunk = content is not None and content["step"] >= plan.trunk
        if past_trunk and self._trunk_is_missing(plan):
            content = None  # only a new run of the trunk can bring it back
        state = self._start(plan) if content is None else restore(plan, self.config, content)
        bpb = train(
            state,
            plan,
            self.config,
            self.corpus,
            self.folder,
            self.stop,
            resumed=content is not None,
        )
        record = self._record(plan, state, bpb)
        # The moments have done their work: what is kept is the model and what is known of it.
        finished = {"step": state.step, "model": state.model.state_dict(), "record": record}
        save_checkpoint(self._path(plan), finished)
        return record

    def _start(self, plan: ModelPlan) -> TrainingState:
        if plan.parent is None:
            return build_from_scratch(plan, self.config)
        parent = next(p for p in self.plans if p.name == plan.parent)
        content = self._load(self._trunk_path(parent.name))
        assert content is not None, "models are trained in order, parents first"
        started = time.perf_counter()
        state = inherit(
            plan,
            self.config,
            restore(parent, self.config, content),
            self.corpus,
            self.stop.check,
        )
        state.seconds = time.perf_counter() - started
        return state

    def _record(self, plan: ModelPlan, state: TrainingState, bpb: float) -> dict[str, Any]:
        return {
            "name": plan.name,
            "depth": plan.depth,
            "arm": plan.arm,
            "parent": plan.parent,
            "params": state.model.num_parameters(),
            "tokens": plan.steps * self.config.batch_size * self.config.sequence_len,
            "steps": plan.steps,
            "flops": plan.flops,
            "fisher_flops": plan.fisher_flops,
            "lineage_flops": plan.lineage_flops,
            "seconds": round(state.seconds, 3),
            "val_bpb": bpb,
            "val_bytes": self._validation_bytes(),
            "seed": self.config.seed,
            "data_sha256": self.corpus.sha256,
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # a subclass of str that a checkpoint cannot hold
        }

    def _validation_bytes(self) -> int:
        length = self.config.sequence_len
        available = (self.corpus.validation.numel() - 1) // length
        return min(self.config.eval_windows, available) * length
