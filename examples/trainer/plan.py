"""Which models a series trains, and what each may cost.

Costs are floating point operations of training: a step costs ``flops_per_token`` of the model times
the tokens of a batch, and what the arm adds to it; a Fisher pass one forward and backward for each
of its sequences; growing four operations a parameter. Evaluating is not counted.

The lineage of a grown model is everything that went into it: the trunks of all its parents, every
Fisher pass and growth on the way, its own trunk and its own cooled branch. The parents' cooled
branches are for their own reports and nothing grows out of them.

All arms have one budget at each depth: the lineage of a chain that is grown and nothing else. What
an arm adds it pays for with steps of its own, rounded down; a model from scratch has the whole
budget, rounded up to a whole step. So what is compared with is never given less. Where no arm is
grown there is no chain to compare with, and the budget of a depth is that of its own steps.
"""

from collections.abc import Callable
from dataclasses import dataclass

from common.errors import UsageError
from trainer.arms import Arm, parse_arm
from trainer.overhead import GROWTH_OPERATIONS, Shape, step_overhead
from trainer.rules import Settings, settings_of
from trainer.schedule import cooldown_steps, split_steps
from trainer.settings import SeriesConfig

__all__ = ["ModelPlan", "plan_series"]


@dataclass(frozen=True)
class ModelPlan:
    """One model of the series.

    Args:
        depth: number of layers.
        arm: how it is trained.
        parent: name of the model it is grown from, or ``None``.
        parent_depth: layers of that model, or ``None``.
        has_child: whether a later model is grown from this one's trunk.
        settings: batch, learning rates and weight decay.
        trunk: steps at the constant rate (warm-up included).
        cooldown: steps of the cooled branch.
        warmup: steps of warm-up; 0 for a grown model.
        first_sample: where in the order of the data it begins: behind what its ancestors have read,
            after a whole number of its own batches.
        flops_per_step: of one training step, what the arm adds included.
        fisher_flops: of the Fisher pass on the parent.
        growth_flops: of growing.
        prior_flops: of the lineage before this model's first step, its own Fisher pass and growth
            included.
        prior_tokens: that the lineage has been trained on before.
    """

    depth: int
    arm: Arm
    parent: str | None
    parent_depth: int | None
    has_child: bool
    settings: Settings
    trunk: int
    cooldown: int
    warmup: int
    first_sample: int
    flops_per_step: int
    fisher_flops: int
    growth_flops: int
    prior_flops: int
    prior_tokens: int

    @property
    def name(self) -> str:
        """Stem of the model's files, such as ``d3-grown+ewc``."""
        return f"d{self.depth}-{self.arm.name}"

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


def plan_series(config: SeriesConfig, shape_of: Callable[[int], Shape]) -> tuple[ModelPlan, ...]:
    """The models of a series in the order they are trained: depth by depth, parents first.

    The first model of a chain has nothing to grow out of, so chains whose first models are trained
    alike share it, and it is the model from scratch of that depth.

    Args:
        config: the settings.
        shape_of: sizes and operations of the model of a depth, be it one of the series or not.

    Raises:
        UsageError: an arm is none, what it adds costs more than a whole trunk, or there is but one
            depth and nothing to grow.
    """
    series = _Planner(config, shape_of)
    for depth in config.depths:
        for arm in series.arms:
            series.add(depth, arm)
    return tuple(series.plans.values())


class _Planner:
    def __init__(self, config: SeriesConfig, shape_of: Callable[[int], Shape]) -> None:
        self.config = config
        self.arms = [parse_arm(word) for word in config.arms]
        grown = next((arm.name for arm in self.arms if arm.grown), None)
        if len(config.depths) == 1 and grown is not None:
            raise UsageError(
                f"--depths {config.depths[0]} is one depth, out of which nothing grows, and "
                f"{grown} asks for growing: give two or more depths, or --arms scratch"
            )
        self.plans: dict[str, ModelPlan] = {}
        self.shapes = {depth: shape_of(depth) for depth in config.depths}
        self.settings = {depth: settings_of(depth, config, shape_of) for depth in config.depths}
        self.trunks, self.cooldowns = self._reference_steps()
        # Of the chain without overhead: what its trunks cost before each depth's own begins.
        self.priors: dict[int, int] = {}
        for depth in config.depths:
            parent = self._parent_depth(depth)
            self.priors[depth] = (
                0 if parent is None else self.priors[parent] + self._trunk_budget(parent)
            )

    def _reference_steps(self) -> tuple[dict[int, int], dict[int, int]]:
        config = self.config
        if config.steps is not None:
            trunks = dict(zip(config.depths, config.steps, strict=True))
            return trunks, {d: cooldown_steps(n, config.cooldown) for d, n in trunks.items()}
        pairs = {}
        for depth in config.depths:
            tokens = config.ratio * self.shapes[depth].scaling_params
            total = max(2, round(tokens / self._batch_tokens(depth)))
            pairs[depth] = split_steps(total, config.cooldown)
        return {d: pair[0] for d, pair in pairs.items()}, {d: pair[1] for d, pair in pairs.items()}

    def _batch_tokens(self, depth: int) -> int:
        return self.settings[depth].batch_size * self.config.sequence_len

    def _step_flops(self, depth: int) -> int:
        return self.shapes[depth].flops_per_token * self._batch_tokens(depth)

    def _overhead(self, depth: int, arm: Arm, parent: Shape | None) -> int:
        tokens, strength = self._batch_tokens(depth), self.config.ewc_strength
        return step_overhead(arm, self.shapes[depth], parent, tokens, strength)

    def _trunk_budget(self, depth: int) -> int:
        return self.trunks[depth] * self._step_flops(depth)

    def _parent_depth(self, depth: int) -> int | None:
        if not any(arm.grown for arm in self.arms):
            return None
        allowed = self.config.depths if self.config.parents is None else self.config.parents
        return max((d for d in allowed if d < depth), default=None)

    def add(self, depth: int, arm: Arm) -> None:
        parent_depth = self._parent_depth(depth)
        if not arm.grown or parent_depth is None:
            plan = self._from_scratch(depth, arm.root)
        else:
            plan = self._grown(depth, arm, self._parent(parent_depth, arm))
        self.plans.setdefault(plan.name, plan)

    def _parent(self, depth: int, arm: Arm) -> ModelPlan:
        is_root = self._parent_depth(depth) is None
        name = f"d{depth}-{(arm.root if is_root else arm).name}"
        return self.plans[name]

    def _has_child(self, depth: int, arm: Arm) -> bool:
        is_root = self._parent_depth(depth) is None
        mine = [a for a in self.arms if a.grown and (a.root if is_root else a) == arm]
        return bool(mine) and any(self._parent_depth(d) == depth for d in self.config.depths)

    def _from_scratch(self, depth: int, arm: Arm) -> ModelPlan:
        step = self._step_flops(depth) + self._overhead(depth, arm, None)
        if step == self._step_flops(depth) and self._parent_depth(depth) is None:
            trunk, cooldown = self.trunks[depth], self.cooldowns[depth]
        else:
            total = max(2, -(-self._budget(depth) // step))  # rounded up
            trunk, cooldown = split_steps(total, self.config.cooldown)
        return ModelPlan(
            depth=depth,
            arm=arm,
            parent=None,
            parent_depth=None,
            has_child=self._has_child(depth, arm),
            settings=self.settings[depth],
            trunk=trunk,
            cooldown=cooldown,
            warmup=min(self.config.warmup_steps, trunk),
            first_sample=0,
            flops_per_step=step,
            fisher_flops=0,
            growth_flops=0,
            prior_flops=0,
            prior_tokens=0,
        )

    def _budget(self, depth: int) -> int:
        """Operations of the lineage of every model of a depth."""
        own = self.trunks[depth] + self.cooldowns[depth]
        return self.priors[depth] + own * self._step_flops(depth)

    def _grown(self, depth: int, arm: Arm, parent: ModelPlan) -> ModelPlan:
        config, shape, old = self.config, self.shapes[depth], self.shapes[parent.depth]
        step = self._step_flops(depth) + self._overhead(depth, arm, old)
        fisher = 0
        if arm.has("ewc") and arm.strength("ewc", config.ewc_strength) > 0:
            fisher = old.flops_per_token * config.sequence_len * config.fisher_samples
        growth = GROWTH_OPERATIONS * shape.params
        prior = parent.prior_flops + parent.trunk * parent.flops_per_step + fisher + growth
        total = (self._budget(depth) - prior) // step  # rounded down
        if total < 2:
            raise UsageError(
                f"the Fisher pass and growth of d{depth}-{arm.name} cost as much as its training: "
                "lower --fisher-samples or raise --steps or --ratio"
            )
        trunk, cooldown = split_steps(total, config.cooldown)
        parent_sequences = parent.trunk * parent.settings.batch_size
        batch_size = self.settings[depth].batch_size
        batches_before = -(-(parent.first_sample + parent_sequences) // batch_size)  # rounded up
        return ModelPlan(
            depth=depth,
            arm=arm,
            parent=parent.name,
            parent_depth=parent.depth,
            has_child=self._has_child(depth, arm),
            settings=self.settings[depth],
            trunk=trunk,
            cooldown=cooldown,
            warmup=0,
            first_sample=batches_before * batch_size,
            flops_per_step=step,
            fisher_flops=fisher,
            growth_flops=growth,
            prior_flops=prior,
            prior_tokens=parent.prior_tokens + parent_sequences * config.sequence_len,
        )
