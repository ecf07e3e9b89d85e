"""Which models a series trains, and what each may cost.

Costs are floating point operations of training: a step costs ``flops_per_token`` of the model
times the tokens of a batch, and a Fisher pass one forward and backward for each of its sequences.
Growing a model (a copy) and evaluating it are not counted.

The lineage of an inherited model is everything that went into it: the trunks of all its parents,
every Fisher pass on the way, its own trunk and its own cooled branch. The parents' cooled branches
are for their own reports and nothing grows out of them. The model of the same size from scratch
gets exactly that many operations, rounded up to whole steps, so it is never given less.
"""

from collections.abc import Callable
from dataclasses import dataclass

from trainer.config import SeriesConfig
from trainer.schedule import cooldown_steps, split_steps

__all__ = ["INHERITED", "SCRATCH", "ModelPlan", "plan_series"]

SCRATCH = "scratch"
INHERITED = "inherited"


@dataclass(frozen=True)
class ModelPlan:
    """One model of the series.

    Args:
        depth: number of layers; the width is 64 times it.
        arm: "scratch" or "inherited".
        parent: name of the model it is grown from, or ``None``.
        has_child: whether a later model is grown from this one's trunk.
        trunk: steps at the constant rate (warm-up included).
        cooldown: steps of the cooled branch.
        warmup: steps of warm-up; 0 for a grown model.
        first_batch: index of the first batch, so that a child reads on where its parent stopped.
        flops_per_step: of one training step.
        fisher_flops: of the Fisher pass on the parent.
        prior_flops: of the lineage before this model's first step, its own Fisher pass included.
    """

    depth: int
    arm: str
    parent: str | None
    has_child: bool
    trunk: int
    cooldown: int
    warmup: int
    first_batch: int
    flops_per_step: int
    fisher_flops: int
    prior_flops: int

    @property
    def name(self) -> str:
        """Stem of the model's files, such as ``d3-inherited``."""
        return f"d{self.depth}-{self.arm}"

    @property
    def steps(self) -> int:
        """Trunk and cooled branch together."""
        return self.trunk + self.cooldown

    @property
    def flops(self) -> int:
        """Of this model's own trunk and cooled branch."""
        return self.steps * self.flops_per_step

    @property
    def lineage_flops(self) -> int:
        """Of everything that went into the model."""
        return self.prior_flops + self.flops


def plan_series(
    config: SeriesConfig, flops_per_token: Callable[[int], int]
) -> tuple[ModelPlan, ...]:
    """The models of a series in the order they are trained.

    The first model has no parent, so its inherited and its scratch arm are one run, planned once
    with the arm "scratch".

    Args:
        config: the settings.
        flops_per_token: training operations a token of the model of a given depth.
    """
    plans: list[ModelPlan] = []
    parent: ModelPlan | None = None
    batch_tokens = config.batch_size * config.sequence_len
    for depth, trunk in zip(config.depths, config.steps, strict=True):
        flops_per_step = flops_per_token(depth) * batch_tokens
        fisher_flops = prior_flops = first_batch = 0
        if parent is not None:
            if config.ewc_strength > 0:
                sequences = config.fisher_samples
                fisher_flops = flops_per_token(parent.depth) * config.sequence_len * sequences
            prior_flops = parent.prior_flops + parent.trunk * parent.flops_per_step + fisher_flops
            first_batch = parent.first_batch + parent.trunk
        chain = ModelPlan(
            depth=depth,
            arm=SCRATCH if parent is None else INHERITED,
            parent=None if parent is None else parent.name,
            has_child=depth != config.depths[-1],
            trunk=trunk,
            cooldown=cooldown_steps(trunk, config.cooldown),
            warmup=min(config.warmup_steps, trunk) if parent is None else 0,
            first_batch=first_batch,
            flops_per_step=flops_per_step,
            fisher_flops=fisher_flops,
            prior_flops=prior_flops,
        )
        plans.append(chain)
        if parent is not None:
            plans.append(_from_scratch(chain, config))
        parent = chain
    return tuple(plans)


def _from_scratch(inherited: ModelPlan, config: SeriesConfig) -> ModelPlan:
    """The same size from scratch for the operations of the whole lineage."""
    total = -(-inherited.lineage_flops // inherited.flops_per_step)  # rounded up
    trunk, cooldown = split_steps(total, config.cooldown)
    return ModelPlan(
        depth=inherited.depth,
        arm=SCRATCH,
        parent=None,
        has_child=False,
        trunk=trunk,
        cooldown=cooldown,
        warmup=min(config.warmup_steps, trunk),
        first_batch=0,
        flops_per_step=inherited.flops_per_step,
        fisher_flops=0,
        prior_flops=0,
    )
