"""The runs of the experiment: what is tuned, what is swept and what is compared.

Sizes are chosen for two CPU cores and an hour. The forward and backward passes are in bfloat16,
which these cores multiply faster; weights and moments are fp32. Learning rates are the defaults of
the trainer, which the stage "tune" found.
"""

import math
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal, get_args

from trainer.series_plan import ModelPlan, plans_of
from trainer.settings import Machine, SeriesConfig

__all__ = ["SIZES", "STAGES", "Job", "Stage", "jobs_of"]

Stage = Literal["tune", "grid", "sizes", "arms"]
STAGES: tuple[Stage, ...] = get_args(Stage)

# The penalties have the strengths of the proposal; the grid has weaker and stronger ones.
METHODS = (
    "scratch", "scratch+muon", "grown", "grown+ewc=1", "grown+ewc=1+subspace=0.1",
    "grown+distill=0.03",
)  # fmt: skip
_SEEDS = (0, 1, 2)
_TUNING_SEED = 100
_GRID_SEEDS = (100, 101, 102)
_RATES = (1e-3, 2e-3, 3e-3, 6e-3)
_MUON_RATES = (1e-2, 2e-2, 4e-2)
_MUON_ADAMW_RATES = (6e-3, 1.2e-2, 2.4e-2)
# The proposal's three pairs lie on the diagonal of the middle.
_LAMBDAS = (None, 0.01, 0.5, 1.0, 2.0)
_GAMMAS = (None, 0.05, 0.1, 0.2)
_DISTILL = (0.03, 0.1, 0.3)
_BYTES = 256

_CPU = SeriesConfig(steps=(380, 200, 200), precision="bf16")
_QUICK = SeriesConfig(
    depths=(1, 2, 3),
    steps=(24, 24, 24),
    batch_size=8,
    sequence_len=64,
    fisher_samples=16,
)
_GPU = SeriesConfig(
    depths=(4, 5, 6, 7, 8, 9, 10),
    steps=None,
    ratio=8.0,
    batch_size=128,
    sequence_len=512,
    precision="bf16",
    lr=2e-3,
    warmup_steps=100,
)
SIZES = {"cpu": _CPU, "quick": _QUICK, "gpu": _GPU}


@dataclass(frozen=True)
class Job:
    """One series: a folder, its settings and the machine's.

    Args:
        name: folder of its results below the experiment's.
        config: the settings.
        machine: what it is trained with.
    """

    name: str
    config: SeriesConfig
    machine: Machine

    @property
    def title(self) -> str:
        """What the progress bar and messages call it."""
        return self.name

    @property
    def plans(self) -> tuple[ModelPlan, ...]:
        """Its models, in the order they are trained."""
        return plans_of(self.config, _BYTES)

    def model_files(self, out: Path) -> tuple[Path, ...]:
        """Where its finished models lie, in the same order.

        Args:
            out: folder of the experiment.
        """
        folder = out / self.name / "checkpoints"
        return tuple(folder / f"{plan.name}.pt" for plan in self.plans)


def jobs_of(stage: Stage, size: str) -> tuple[Job, ...]:
    """The series of a stage, in the order they begin.

    Args:
        stage: "tune" for the learning rates and the distillation, "grid" for the strengths on one
            transition, "sizes" for smaller models from scratch with all operations of the largest,
            "arms" for the comparison.
        size: a name of `SIZES`.

    Example:
        >>> [job.name for job in jobs_of("arms", "cpu")][:2]
        ['arms/seed-0', 'arms/seed-0-ars']
    """
    base = SIZES[size]
    gpu = size == "gpu"
    machine = Machine(threads=1)
    if gpu:  # writing the state of d10 takes seconds
        machine = Machine(device="cuda", compile=True, checkpoint_seconds=120)
    seeds = _SEEDS if size != "quick" else _SEEDS[:1]
    jobs: list[Job] = []

    def add(name: str, config: SeriesConfig) -> None:
        jobs.append(Job(f"{stage}/{name}", config, machine))

    if stage == "arms":
        for seed in seeds:
            for suffix in ("", "+ars"):
                arms = tuple(method + suffix for method in METHODS)
                add(f"seed-{seed}{suffix.replace('+', '-')}", replace(base, arms=arms, seed=seed))
    elif stage == "tune":
        # From scratch, the largest model alone, with the budget that it has in the comparison.
        tuned = replace(_with_all(base, base.depths[-1]), seed=_TUNING_SEED)
        for rate in _RATES if size != "quick" else _RATES[:2]:
            add(f"lr-{rate:g}", replace(tuned, arms=("scratch",), lr=rate))
        for rate in _MUON_RATES if size != "quick" else _MUON_RATES[:2]:
            add(f"muon-lr-{rate:g}", replace(tuned, arms=("scratch+muon",), muon_lr=rate))
        for rate in _MUON_ADAMW_RATES if size != "quick" else ():
            if rate != base.muon_adamw_lr:
                muon = replace(tuned, arms=("scratch+muon",), muon_adamw_lr=rate)
                add(f"muon-adamw-lr-{rate:g}", muon)
        arms = ("grown", *(f"grown+distill={strength:g}" for strength in _DISTILL))
        add("distill", replace(_first_two(base), arms=arms, seed=_TUNING_SEED))
    elif stage == "sizes":
        for seed, depth in product(seeds, base.depths[:-1]):
            alone = replace(_with_all(base, depth), arms=("scratch",), seed=seed)
            add(f"d{depth}-seed-{seed}", alone)
    else:
        lambdas = _LAMBDAS if size != "quick" else (None, 1.0)
        gammas = _GAMMAS if size != "quick" else (None, 0.1)
        # A series for each lambda, so that they share the machine's cores.
        for seed, strength in product(_GRID_SEEDS if size != "quick" else _GRID_SEEDS[:1], lambdas):
            ewc = "" if strength is None else f"+ewc={strength:g}"
            arms = tuple(
                f"grown{ewc}" + ("" if gamma is None else f"+subspace={gamma:g}")
                for gamma in gammas
            )
            name = f"lambda-{0.0 if strength is None else strength:g}-seed-{seed}"
            add(name, replace(_first_two(base), arms=arms, seed=seed))
    return tuple(jobs)


def _first_two(config: SeriesConfig) -> SeriesConfig:
    steps = None if config.steps is None else config.steps[:2]
    return replace(config, depths=config.depths[:2], steps=steps)


def _with_all(config: SeriesConfig, depth: int) -> SeriesConfig:
    """One model from scratch with the operations that the largest has in the comparison."""
    plans = plans_of(replace(config, arms=("scratch", "grown")), _BYTES)
    scratch = {plan.depth: plan for plan in plans if not plan.arm.grown}
    largest, own = scratch[config.depths[-1]], scratch[depth]
    steps = largest.steps * largest.flops_per_step / own.flops_per_step
    trunk = math.ceil(steps / (1 + config.cooldown))  # the branch comes on top
    return replace(config, depths=(depth,), steps=(trunk,))
