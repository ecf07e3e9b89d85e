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

The learning rate warms up, stays, and is cooled:

    step < warmup              peak (step + 1) / warmup
    step < trunk               peak
    step < trunk + cooldown    peak (trunk + cooldown - step) / cooldown

A child grows out of the end of the trunk, where the rate is still the peak, and never out of the
cooled branch: warming up again would throw away what cooling gained.

Batch, learning rates and decay follow the depth where the user says "rule". With N parameters in
matrix products and N_0 those of depth 12 with the same vocabulary, B tokens a step and B_0 = 2^19,

    B             = 2^round(log2(B_0 (N / N_0)^0.383))           tokens a step, a power of two
    lr            = 6e-4 sqrt(B / B_0) sqrt(12 / depth)          AdamW
    muon_lr       = 0.02 sqrt(B / B_0)                           Muon
    muon_adamw_lr = 0.008 sqrt(B / B_0) sqrt(12 / depth)         AdamW beside Muon
    decay         = 0.1 sqrt(B / B_0) N_0 / N                    decoupled, of either

These are nanochat's: batch and decay follow the tokens D of a model's training, of which every
depth has equally many a parameter, so D / D_0 = N / N_0; two of the rates follow the width, which
is proportional to the depth. 6e-4 with 0.5 million tokens is GPT-3's rate for the width of depth
12, 0.02 and 0.008 (its head's) are nanochat's. They are a start for large batches and were not
tuned here. Whoever names a batch gets the others for that batch.

References:
    Karpathy, "nanochat", github.com/karpathy/nanochat, scripts/base_train.py. Bergsma et al.,
    arXiv:2505.13738 (the batch). Wang and Aitchison, arXiv:2405.13698 (the decay). Brown et al.,
    arXiv:2005.14165, table 2.1 (the rate of AdamW).
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ars.models import GPT, miniseries_config
from common.errors import UsageError
from trainer.arms import GROWTH_OPERATIONS, Arm, Shape, parse_arm, step_overhead
from trainer.settings import RULE, Machine, SeriesConfig

__all__ = [
    "ModelPlan", "Settings", "checked_plans", "cooldown_steps", "learning_rate", "plan_series",
    "plans_of", "settings_of", "shape_of", "split_steps",
]  # fmt: skip

# The rule: what holds at this depth and batch, and how the batch grows.
_DEPTH = 12
_BATCH_TOKENS = 2**19
_BATCH_EXPONENT = 0.383
_LR = 6e-4
_MUON_LR = 0.02
_MUON_ADAMW_LR = 0.008
_WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Settings:
    """What depends on the depth of a model.

    Args:
        batch_size: sequences a step, over all processes.
        lr: peak learning rate of AdamW.
        muon_lr: peak learning rate of Muon.
        muon_adamw_lr: peak learning rate of the AdamW beside it.
        weight_decay: decoupled.
    """

    batch_size: int
    lr: float
    muon_lr: float
    muon_adamw_lr: float
    weight_decay: float


def settings_of(depth: int, config: SeriesConfig, shape_of: Callable[[int], Shape]) -> Settings:
    """The settings of a depth: the user's where named, the rule's elsewhere.

    Args:
        depth: layers.
        config: of the series.
        shape_of: sizes of the model of a depth.

    Example:
        >>> from trainer.settings import SeriesConfig
        >>> config = SeriesConfig(batch_size="rule", lr="rule", sequence_len=2048)
        >>> chosen = settings_of(12, config, lambda depth: Shape(depth, depth**3, 0, ()))
        >>> chosen.batch_size * 2048 == 2**19, chosen.lr
        (True, 0.0006)
    """
    horizon = shape_of(depth).scaling_params / shape_of(_DEPTH).scaling_params
    if config.batch_size == RULE:
        tokens = 2 ** round(math.log2(_BATCH_TOKENS * horizon**_BATCH_EXPONENT))
        batch_size = max(1, tokens // config.sequence_len)
    else:
        batch_size = int(config.batch_size)
    share = math.sqrt(batch_size * config.sequence_len / _BATCH_TOKENS)
    narrow = math.sqrt(_DEPTH / depth)

    def chosen(value: float | str, rule: float) -> float:
        return rule if value == RULE else float(value)

    return Settings(
        batch_size=batch_size,
        lr=chosen(config.lr, _LR * share * narrow),
        muon_lr=chosen(config.muon_lr, _MUON_LR * share),
        muon_adamw_lr=chosen(config.muon_adamw_lr, _MUON_ADAMW_LR * share * narrow),
        weight_decay=chosen(config.weight_decay, _WEIGHT_DECAY * share / horizon),
    )


def learning_rate(step: int, *, peak: float, warmup: int, trunk: int, cooldown: int) -> float:
    """The rate of the update that follows ``step`` earlier ones.

    Example:
        >>> [learning_rate(s, peak=1.0, warmup=2, trunk=4, cooldown=2) for s in range(7)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.0]
    """
    if step < trunk:
        return peak * min(1.0, (step + 1) / warmup) if warmup else peak
    return peak * (max(0, trunk + cooldown - step) / cooldown)


def cooldown_steps(trunk: int, share: float) -> int:
    """Steps of the cooled branch of a trunk, at least one.

    Example:
        >>> cooldown_steps(150, 0.25)
        38
    """
    return max(1, round(trunk * share))


def split_steps(total: int, share: float) -> tuple[int, int]:
    """Divide a total into a trunk and a cooled branch of ``share`` times the trunk.

    Example:
        >>> split_steps(250, 0.25)
        (200, 50)
    """
    trunk = min(total - 1, max(1, round(total / (1 + share))))
    return trunk, total - trunk


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


def shape_of(depth: int, vocab_size: int, sequence_len: int) -> Shape:
    """Sizes and operations of the series' model of a depth, without making one.

    Example:
        >>> shape_of(2, 256, 64).params
        458752
    """
    with torch.device("meta"):  # shapes only: no memory, no initial values
        config = miniseries_config(depth, vocab_size=vocab_size, sequence_len=sequence_len)
        model = GPT(config)
    inside = [w for name, w in model.named_parameters() if name.startswith("blocks.")]
    return Shape(
        params=model.num_parameters(),
        scaling_params=model.num_scaling_parameters(),
        flops_per_token=model.flops_per_token(),
        matrices=tuple((w.shape[0], w.shape[1]) for w in inside),
    )


def plans_of(config: SeriesConfig, vocab_size: int) -> tuple[ModelPlan, ...]:
    """The models of a series over a vocabulary, in the order they are trained.

    Args:
        config: the settings.
        vocab_size: number of token values.

    Raises:
        UsageError: the settings make no series.
    """
    shape = partial(shape_of, vocab_size=vocab_size, sequence_len=config.sequence_len)
    return plan_series(config, shape)


def checked_plans(config: SeriesConfig, machine: Machine, vocab_size: int) -> tuple[ModelPlan, ...]:
    """The models of a series, whose batches the processes of the run can share.

    Args:
        config: of the series.
        machine: that it is trained with.
        vocab_size: number of token values.

    Raises:
        UsageError: the settings make no series, or a batch cannot be divided.
    """
    plans = plans_of(config, vocab_size)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    part = machine.device_batch_size
    for plan in plans:
        batch = plan.settings.batch_size
        by_rule = f", d{plan.depth}'s by rule," if config.batch_size == RULE else ""
        if batch % world:
            raise UsageError(
                f"--batch-size {batch}{by_rule} is not divisible by the {world} processes of the "
                "run: name a multiple of them"
            )
        share = batch // world
        if part is not None and share % part:
            raise UsageError(
                f"--device-batch-size {part} does not divide the {share} sequences a step"
                f"{by_rule} of a process: name one that does"
            )
    return plans


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
