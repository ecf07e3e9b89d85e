"""The whole series: what is done, what is next, and what it amounts to.

The checkpoints are the only memory. A model whose ``checkpoints/<name>.pt`` is there is finished;
one that has states in ``checkpoints/<name>/`` is continued; the report is rebuilt from the records.
"""

import json
import platform
import time
from functools import partial
from typing import Any

import torch

from ars.atomic import drop_unfinished
from common.errors import DamagedError, UsageError
from common.plain_files import write_atomically
from corpus import validation_windows
from trainer import series_report
from trainer.kept_states import Keeper
from trainer.series_plan import ModelPlan, plans_of
from trainer.series_run import CONFIG_FILE, TOKENIZER_FILE, Run
from trainer.training_loop import train
from trainer.training_state import TrainingState, build_from_scratch, inherit, restore

__all__ = ["Series", "run_series"]


def run_series(run: Run) -> tuple[str, bool]:
    """Train whatever is not yet trained and write the report.

    Args:
        run: whose folder `check_folder` accepted and is held.

    Returns:
        The table, and whether everything had been trained before.

    Raises:
        RunInterruptedError: a signal arrived; what was reached is saved.
        UsageError: the settings make no series.
    """
    series = Series(run)
    if run.parallel.is_first:
        run.output.check()
        drop_unfinished(run.folder)
        if not (run.folder / CONFIG_FILE).exists():
            data = {"sha256": run.corpus.sha256, **run.corpus.facts}
            stored = {"settings": run.config.to_dict(), "data": data}
            write_atomically(
                run.folder / CONFIG_FILE, json.dumps(stored, indent=2, allow_nan=False) + "\n"
            )
        run.corpus.tokenizer.save(run.folder / TOKENIZER_FILE)
        run.checkpoints.mkdir(exist_ok=True)
        drop_unfinished(run.checkpoints)
    return series.train_all()


class Series:
    """One series in one folder.

    Args:
        run: with the settings.

    Raises:
        UsageError: the settings make no series.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.plans = plans_of(run.config, run.corpus.vocab_size)
        self._keepers = {plan.name: Keeper(plan, run) for plan in self.plans}

    def train_all(self) -> tuple[str, bool]:
        """Finish every model in order; return the table and whether there was nothing to do."""
        run = self.run
        records = []
        nothing_to_do = True
        for plan in self.plans:
            record = run.parallel.from_first(partial(self._finished, plan))
            if record is None:
                nothing_to_do = False
                if run.parallel.any(run.stop.requested):
                    run.stop.leave()
                record = self._train(plan)
            records.append(record)
            if not nothing_to_do and run.parallel.is_first:
                run.output.check()
                series_report.write_metrics(run.folder, records)
        if not run.parallel.is_first:
            return "", nothing_to_do
        if nothing_to_do:
            series_report.write_metrics(run.folder, records)
        return series_report.write_report(run.folder, records, self.plans), nothing_to_do

    def _trunk_is_missing(self, plan: ModelPlan) -> bool:
        """Whether a child still has to grow out of a trunk that is not on the disk."""
        children = [p for p in self.plans if p.parent == plan.name]
        needed = any(self._keepers[child.name].record() is None for child in children)
        return needed and self._keepers[plan.name].trunk() is None

    def _finished(self, plan: ModelPlan) -> dict[str, Any] | None:
        record = self._keepers[plan.name].record()
        if record is None or self._trunk_is_missing(plan):
            return None
        self._keepers[plan.name].clear()  # a kill may have come before that
        return record

    def _begin(self, plan: ModelPlan) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """The state to go on from, or else the parent's trunk."""
        content = self._keepers[plan.name].latest()
        if content is not None and content["step"] >= plan.trunk and self._trunk_is_missing(plan):
            content = None  # only a new run of the trunk can bring it back
        if content is not None or plan.parent is None:
            return content, None
        return None, self._keepers[plan.parent].trunk()

    def _train(self, plan: ModelPlan) -> dict[str, Any]:
        run = self.run
        keeper = self._keepers[plan.name]
        content, trunk = run.parallel.from_first(partial(self._begin, plan))
        state = None
        while content is not None and state is None:
            try:
                state = restore(plan, run, content)
            except DamagedError as error:
                run.parallel.from_first(partial(keeper.reject, error))
                content, trunk = run.parallel.from_first(partial(self._begin, plan))
        resumed = state is not None
        if state is None:
            state = self._new(plan, trunk)
        bpb = train(state, plan, run, keeper, resumed=resumed)
        record = self._record(plan, state, bpb)
        run.parallel.from_first(partial(keeper.finish, state, record))
        return record

    def _new(self, plan: ModelPlan, trunk: dict[str, Any] | None) -> TrainingState:
        """A model that begins: from random weights, or grown out of its parent's trunk."""
        run = self.run
        if plan.parent is None:
            return build_from_scratch(plan, run)
        started = time.perf_counter()
        parent = next(p for p in self.plans if p.name == plan.parent)
        try:
            if trunk is None:  # it was there when the parent's turn came
                raise DamagedError(f"the trunk of {plan.parent} is gone")
            grown = inherit(plan, run, restore(parent, run, trunk))
        except DamagedError as error:
            if trunk is not None:
                run.parallel.from_first(partial(self._keepers[plan.parent].reject, error))
            raise UsageError(
                f"{plan.name} cannot grow, because {error}: run the same command again, which "
                f"trains {plan.parent} once more"
            ) from None
        grown.seconds = time.perf_counter() - started
        return grown

    def _record(self, plan: ModelPlan, state: TrainingState, bpb: float) -> dict[str, Any]:
        config = self.run.config
        tokens = plan.steps * plan.settings.batch_size * config.sequence_len
        muon = plan.arm.has("muon")
        return {
            "name": plan.name,
            "depth": plan.depth,
            "arm": plan.arm.name,
            "parent": plan.parent,
            "params": state.model.num_parameters(),
            "scaling_params": state.model.num_scaling_parameters(),
            "tokens": tokens,
            "lineage_tokens": plan.prior_tokens + tokens,
            "steps": plan.steps,
            "batch_size": plan.settings.batch_size,
            "lr": plan.settings.muon_adamw_lr if muon else plan.settings.lr,  # of AdamW
            "muon_lr": plan.settings.muon_lr if muon else None,
            "muon_adamw_lr": plan.settings.muon_adamw_lr if muon else None,
            "flops": plan.flops,
            "fisher_flops": plan.fisher_flops,
            "growth_flops": plan.growth_flops,
            "lineage_flops": plan.lineage_flops,
            "seconds": round(state.seconds, 3),
            "val_bpb": bpb,
            "val_bytes": self._validation_bytes(),
            "warnings": state.warnings,
            "seed": config.seed,
            "devices": self.run.parallel.world_size,
            "data_sha256": self.run.corpus.sha256,
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # a subclass of str that a checkpoint cannot hold
        }

    def _validation_bytes(self) -> int:
        config, corpus = self.run.config, self.run.corpus
        windows = validation_windows(corpus.validation, config.sequence_len, config.eval_windows)
        return int(corpus.token_bytes[windows[:, 1:]].sum())
