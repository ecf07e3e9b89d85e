"""The whole series: what is done, what is next, and what it amounts to.

The checkpoints are the only memory. A model whose ``checkpoints/<name>.pt`` is there is finished;
one that has states in ``checkpoints/<name>/`` is continued; the report is rebuilt from the records.
A cooled branch beside a model is trained after it like a model of its own, ``<name>@<share>``.
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
        self.models = plans_of(run.config, run.corpus.vocab_size)
        self.plans = [each for plan in self.models for each in (plan, *plan.branch_plans)]
        self._keepers = {plan.name: Keeper(plan, run) for plan in self.plans}
        self._read: dict[str, dict[str, Any]] = {}  # records of models that were found finished
        self._done: dict[str, dict[str, Any]] = {}  # records of those whose turn is over

    def train_all(self) -> tuple[str, bool]:
        """Finish every model in order; return the table and whether there was nothing to do."""
        run = self.run
        nothing_to_do = True
        for plan in self.plans:
            record = run.parallel.from_first(partial(self._finished, plan))
            if record is None:
                nothing_to_do = False
                if run.parallel.any(run.stop.requested):
                    run.stop.leave()
                record = self._train(plan)
            self._done[plan.name] = record
            if run.parallel.is_first:
                run.output.check()
                self._drop_trunks()
                if not nothing_to_do:
                    series_report.write_metrics(run.folder, self._records())
        if not run.parallel.is_first:
            return "", nothing_to_do
        records = self._records()
        if nothing_to_do:
            series_report.write_metrics(run.folder, records)
        return series_report.write_report(run.folder, records, self.models), nothing_to_do

    def _records(self) -> list[dict[str, Any]]:
        """One record a model, with the cooled branches beside it that are finished."""
        records = []
        for plan in self.models:
            if plan.name not in self._done:
                continue
            own = self._done[plan.name]
            branches = [self._done[b.name] for b in plan.branch_plans if b.name in self._done]
            cooled = [each["cooled"] for each in (*branches, own)]
            said = own.get("warnings", [])
            more = [
                f"at the share {branch['share']:g}: {text}"
                for branch in branches
                for text in branch.get("warnings", [])
                if text not in said  # the trunk up to there was warned of, too
            ]
            records.append({**own, "cooled": cooled, "warnings": [*said, *more]})
        return records

    def _needing(self, plan: ModelPlan) -> dict[int, list[str]]:
        """The steps of a trunk that are kept, and the models that begin with each."""
        users: dict[int, list[str]] = {step: [] for step in plan.kept}
        for branch in plan.branch_plans:
            users[branch.trunk].append(branch.name)
        for child in self.models:
            if child.parent == plan.name:
                users[child.grown_at].append(child.name)
        return users

    def _trunk_is_missing(self, plan: ModelPlan, upto: int | None = None) -> bool:
        """Whether a model still has to begin with a state of a trunk that is not on the disk.

        Args:
            plan: of the trunk.
            upto: only states up to this step count; ``None`` for all.
        """
        return any(
            (upto is None or step <= upto)
            and not self._keepers[plan.name].has_trunk(step)
            and any(map(self._has_to_begin, names))
            for step, names in self._needing(plan).items()
        )

    def _has_to_begin(self, name: str) -> bool:
        """Whether a model has to be trained and has no state to go on from."""
        plan = self._plan_of(name)
        return self._has_to_be_trained(plan) and self._own_state(plan) is None

    def _has_to_be_trained(self, plan: ModelPlan) -> bool:
        """Whether a model is not finished, or its trunk is needed and gone."""
        if plan.name in self._done:
            return False
        if plan.name not in self._read:
            record = self._keepers[plan.name].record()
            if record is None:
                return True
            self._read[plan.name] = record
        return self._trunk_is_missing(plan)

    def _own_state(self, plan: ModelPlan) -> dict[str, Any] | None:
        """The newest state of a model, unless a state before it is gone that others begin with."""
        found = self._keepers[plan.name].latest()
        if found is None or self._trunk_is_missing(plan, upto=found[0]):
            return None
        return found[1]

    def _plan_of(self, name: str) -> ModelPlan:
        return next(plan for plan in self.plans if plan.name == name)

    def _drop_trunks(self) -> None:
        """Drop the states of trunks whose branches and children are all finished."""
        for plan in self.models:
            for step, names in self._needing(plan).items():
                if all(name in self._done for name in names):
                    self._keepers[plan.name].drop_trunk(step)

    def _finished(self, plan: ModelPlan) -> dict[str, Any] | None:
        if self._has_to_be_trained(plan):
            return None
        self._keepers[plan.name].clear()  # a kill may have come before that
        return self._read[plan.name]

    def _begin(self, plan: ModelPlan) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """The state to go on from, or else that of the trunk it begins with."""
        content = self._own_state(plan)
        source, step = self._origin(plan)
        if content is not None or source is None:
            return content, None
        return None, self._keepers[source].trunk(step)

    def _origin(self, plan: ModelPlan) -> tuple[str | None, int]:
        """The model whose trunk another begins with, and the step of it."""
        if plan.branch_of is not None:
            return plan.branch_of, plan.trunk
        return plan.parent, plan.grown_at

    def _train(self, plan: ModelPlan) -> dict[str, Any]:
        run = self.run
        keeper = self._keepers[plan.name]
        content, trunk = run.parallel.from_first(partial(self._begin, plan))
        state = None
        while content is not None and state is None:
            try:
                state = restore(plan, run, content)
            except DamagedError as error:
                run.parallel.from_first(partial(keeper.reject_latest, error))
                content, trunk = run.parallel.from_first(partial(self._begin, plan))
        resumed = state is not None
        if state is None:
            state = self._new(plan, trunk)
            run.parallel.from_first(keeper.begin_again)
        bpb = train(state, plan, run, keeper, resumed=resumed)
        record = self._record(plan, state, bpb)
        model = run.parallel.gathered(state.model_dict())
        run.parallel.from_first(partial(keeper.finish, model, record))
        return record

    def _new(self, plan: ModelPlan, trunk: dict[str, Any] | None) -> TrainingState:
        """A model that begins: from random weights, or with a state of a trunk."""
        run = self.run
        source, step = self._origin(plan)
        if source is None:
            return build_from_scratch(plan, run)
        started = time.perf_counter()
        origin = self._plan_of(source)
        try:
            if trunk is None:  # it was there when the origin's turn came
                raise DamagedError(f"the trunk of {source} is gone")
            begun = restore(origin, run, trunk)
            if plan.branch_of is None:
                begun = inherit(plan, run, begun)
        except DamagedError as error:
            if trunk is not None:
                reject = self._keepers[source].reject_trunk
                run.parallel.from_first(partial(reject, step, error))
            raise UsageError(
                f"{plan.name} cannot begin, because {error}: run the same command again, which "
                f"trains {source} once more"
            ) from None
        if plan.branch_of is None:
            begun.seconds = time.perf_counter() - started
        return begun

    def _record(self, plan: ModelPlan, state: TrainingState, bpb: float) -> dict[str, Any]:
        config = self.run.config
        per_step = plan.settings.batch_size * config.sequence_len
        tokens = plan.steps * per_step
        muon = plan.arm.has("muon")
        seconds = round(state.seconds, 3)
        return {
            "name": plan.name,
            "size": plan.size,
            "depth": plan.depth,
            "width": plan.model.n_embd,
            "arm": plan.arm.name,
            "parent": plan.parent,
            "params": state.model.num_parameters(),
            "scaling_params": state.model.num_scaling_parameters(),
            "tokens": tokens,
            "prior_tokens": plan.prior_tokens,
            "lineage_tokens": plan.prior_tokens + tokens,
            "share": plan.share,
            "full_steps": plan.full_steps,
            "trunk_steps": plan.trunk,
            "steps": plan.steps,
            "cooled": {
                "share": plan.share,
                "start": plan.trunk,
                "steps": plan.steps,
                "tokens": tokens,
                "flops": plan.flops,
                "seconds": seconds,
                "val_bpb": bpb,
            },
            "batch_size": plan.settings.batch_size,
            "lr": plan.settings.muon_adamw_lr if muon else plan.settings.lr,  # of AdamW
            "muon_lr": plan.settings.muon_lr if muon else None,
            "muon_adamw_lr": plan.settings.muon_adamw_lr if muon else None,
            "flops_per_step": plan.flops_per_step,
            "flops": plan.flops,
            "fisher_flops": plan.fisher_flops,
            "growth_flops": plan.growth_flops,
            "prior_flops": plan.prior_flops,
            "lineage_flops": plan.lineage_flops,
            "seconds": seconds,
            "val_bpb": bpb,
            "val_bytes": self._validation_bytes(),
            "warnings": state.warnings,
            "pulls": state.pulls,
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
