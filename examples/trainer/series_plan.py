"""Which models a series trains, and what each costs.

Costs are floating point operations of training: a step costs ``flops_per_token`` of the model times
the tokens of a batch, and what the arm adds to it; a Fisher pass one forward and backward for each
of its sequences; growing four operations a parameter. Evaluating is not counted.

A model from scratch is trained for ``--ratio`` tokens a parameter in matrix products, or for
``--steps``. It is the twin of the grown models of its size, whose steps are shares of its own.
Every model is a trunk at the peak rate and a cooled branch out of it. A branch at the share s has
s times the twin's steps in all, the trunk up to there included:

    step < warmup              peak (step + 1) / warmup
    step < trunk               peak
    step < trunk + cooldown    peak (1 - sqrt(x)), or peak (1 - x),  x = (step - trunk) / cooldown

The trunk of a model goes on to its last branch, which is the model. Branches at smaller shares are
measurements: each begins at a state of the trunk that was kept, reads what the trunk reads next,
and nothing depends on it.

A child grows out of the trunk, where the rate is still the peak, and never out of a cooled branch:
warming up again would throw away what cooling gained. It reads on where its parent's trunk was left
and so repeats nothing that its ancestors have read.

There are two accounts. In that of a single model everything that went into it counts, its lineage:
the trunks of all its parents up to where they were left, every Fisher pass and growth on the way,
its own trunk and cooled branch. In that of a series every model is wanted, so each trunk is paid
once, by its own model.

Batch, learning rates and decay follow the size where the user says "rule". With width D, N
parameters in matrix products and N_0 those of depth 12 and width 768 with the same vocabulary, B
tokens a step and B_0 = 2^19,

    B             = 2^round(log2(B_0 (N / N_0)^0.383))           tokens a step, a power of two
    lr            = 6e-4 sqrt(B / B_0) sqrt(768 / D)             AdamW
    muon_lr       = 0.02 sqrt(B / B_0)                           Muon
    muon_adamw_lr = 0.008 sqrt(B / B_0) sqrt(768 / D)            AdamW beside Muon
    decay         = 0.1 sqrt(B / B_0) N_0 / N                    decoupled, of either

These are nanochat's: batch and decay follow the tokens D of a model's training, of which every
size has equally many a parameter, so D / D_0 = N / N_0; two of the rates follow the width. 6e-4
with 0.5 million tokens is GPT-3's rate for the width of depth 12, 0.02 and 0.008 (its head's) are
nanochat's. They are a start for large batches and were not tuned here. Whoever names a batch gets
the others for that batch. A named rate is that of the first size; of a size with N' times its N it
is divided by N'^p, p the rate exponent, which is 0 unless it is named.

References:
    Karpathy, "nanochat", github.com/karpathy/nanochat, scripts/base_train.py. Bergsma et al.,
    arXiv:2505.13738 (the batch). Wang and Aitchison, arXiv:2405.13698 (the decay). Brown et al.,
    arXiv:2005.14165, table 2.1 (the rate of AdamW). Haegele et al., arXiv:2405.18392 (constant
    rates and the cooldown 1 - sqrt).
"""

import dataclasses
import math
import os
from dataclasses import dataclass
from functools import cache

import torch

from ars.models import GPT, GPTConfig, miniseries_config
from common.errors import UsageError
from trainer.arms import GROWTH_OPERATIONS, Arm, Shape, parse_arm, step_overhead
from trainer.settings import RULE, CooldownShape, Machine, SeriesConfig, Size

__all__ = [
    "ModelPlan", "Settings", "checked_plans", "learning_rate", "plans_of", "settings_of",
    "shape_of",
]  # fmt: skip

# The rule: what holds at this size and batch, and how the batch grows.
_DEPTH = 12
_WIDTH = 768
_BATCH_TOKENS = 2**19
_BATCH_EXPONENT = 0.383
_LR = 6e-4
_MUON_LR = 0.02
_MUON_ADAMW_LR = 0.008
_WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class Settings:
    """What depends on the size of a model.

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


def settings_of(model: GPTConfig, config: SeriesConfig, growth: float = 1.0) -> Settings:
    """The settings of a size: the user's where named, the rule's elsewhere.

    Args:
        model: of that size.
        config: of the series.
        growth: how many times the parameters in matrix products of the series' first size it has;
            of that the named rates are.

    Example:
        >>> from ars.models import miniseries_config
        >>> from trainer.settings import SeriesConfig
        >>> config = SeriesConfig(batch_size="rule", lr="rule", sequence_len=2048)
        >>> chosen = settings_of(miniseries_config(12), config)
        >>> chosen.batch_size * 2048 == 2**19, chosen.lr
        (True, 0.0006)
    """
    reference = dataclasses.replace(model, n_layer=_DEPTH, n_embd=_WIDTH, n_head=_DEPTH)
    horizon = shape_of(model).scaling_params / shape_of(reference).scaling_params
    if config.batch_size == RULE:
        tokens = 2 ** round(math.log2(_BATCH_TOKENS * horizon**_BATCH_EXPONENT))
        batch_size = max(1, tokens // config.sequence_len)
    else:
        batch_size = int(config.batch_size)
    share = math.sqrt(batch_size * config.sequence_len / _BATCH_TOKENS)
    narrow = math.sqrt(_WIDTH / model.n_embd)

    def chosen(value: float | str, rule: float, factor: float = 1.0) -> float:
        return rule if value == RULE else float(value) * factor

    slower = growth**-config.rate_exponent
    return Settings(
        batch_size=batch_size,
        lr=chosen(config.lr, _LR * share * narrow, slower),
        muon_lr=chosen(config.muon_lr, _MUON_LR * share, slower),
        muon_adamw_lr=chosen(config.muon_adamw_lr, _MUON_ADAMW_LR * share * narrow, slower),
        weight_decay=chosen(config.weight_decay, _WEIGHT_DECAY * share / horizon),
    )


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup: int,
    trunk: int,
    cooldown: int,
    shape: CooldownShape = "1-sqrt",
) -> float:
    """The rate of the update that follows ``step`` earlier ones.

    Example:
        >>> [learning_rate(s, peak=1.0, warmup=2, trunk=4, cooldown=4) for s in (0, 1, 3, 4, 5, 8)]
        [0.5, 1.0, 1.0, 1.0, 0.5, 0.0]
    """
    if step < trunk:
        return peak * min(1.0, (step + 1) / warmup) if warmup else peak
    done = min(1.0, (step - trunk) / cooldown)
    return peak * (1.0 - (math.sqrt(done) if shape == "1-sqrt" else done))


@dataclass(frozen=True)
class ModelPlan:
    """One model of the series, or a cooled branch beside it.

    Args:
        size: label of its size, such as ``d3`` or ``4x56``.
        model: its sizes.
        arm: how it is trained.
        parent: name of the model it is grown from, or ``None``.
        parent_model: sizes of that model, or ``None``.
        grown_at: step of the parent's trunk at which it grows; 0 without a parent.
        settings: batch, learning rates and weight decay.
        full_steps: of the model from scratch of its size.
        share: of these steps, its own.
        trunk: steps at the constant rate (warm-up included).
        cooldown: steps of the cooled branch.
        warmup: steps of warm-up; 0 for a grown model.
        branches: share and first step of the cooled branches at smaller shares.
        kept: steps at which the state of the trunk is kept, for branches and children.
        branch_of: name of the model whose trunk this branches off, ``None`` for a model.
        first_sample: where in the order of the data it begins: behind what its ancestors have read,
            after a whole number of its own batches.
        flops_per_step: of one training step, what the arm adds included.
        fisher_flops: of the Fisher pass on the parent.
        growth_flops: of growing.
        prior_flops: of the lineage before this model's first step, its own Fisher pass and growth
            included.
        prior_tokens: that the lineage has been trained on before.
    """

    size: str
    model: GPTConfig
    arm: Arm
    parent: str | None
    parent_model: GPTConfig | None
    grown_at: int
    settings: Settings
    full_steps: int
    share: float
    trunk: int
    cooldown: int
    warmup: int
    branches: tuple[tuple[float, int], ...]
    kept: tuple[int, ...]
    branch_of: str | None
    first_sample: int
    flops_per_step: int
    fisher_flops: int
    growth_flops: int
    prior_flops: int
    prior_tokens: int

    @property
    def name(self) -> str:
        """Stem of the model's files, such as ``d3-grown+ewc``, and ``d3-grown@0.2`` of a branch."""
        return f"{self.size}-{self.arm.name}" + (f"@{self.share}" if self.branch_of else "")

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.model.n_layer

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

    @property
    def branch_plans(self) -> tuple["ModelPlan", ...]:
        """The cooled branches at smaller shares, each as a model of its own."""
        return tuple(
            dataclasses.replace(
                self, share=share, trunk=start, branches=(), kept=(), branch_of=self.name
            )
            for share, start in self.branches
        )


@cache
def shape_of(model: GPTConfig) -> Shape:
    """Sizes and operations of a model, without making one.

    Example:
        >>> from ars.models import miniseries_config
        >>> shape_of(miniseries_config(2)).params
        458752
    """
    with torch.device("meta"):  # shapes only: no memory, no initial values
        made = GPT(model)
    inside = [w for name, w in made.named_parameters() if name.startswith("blocks.")]
    return Shape(
        params=made.num_parameters(),
        scaling_params=made.num_scaling_parameters(),
        flops_per_token=made.flops_per_token(),
        matrices=tuple((w.shape[0], w.shape[1]) for w in inside),
    )


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
        by_rule = f", {plan.size}'s by rule," if config.batch_size == RULE else ""
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


def plans_of(config: SeriesConfig, vocab_size: int) -> tuple[ModelPlan, ...]:
    """The models of a series over a vocabulary, in the order they are trained.

    That is size by size, parents first. The first model of a chain has nothing to grow out of, so
    chains whose first models are trained alike share it. It is the model from scratch of that size,
    unless the chain goes by what a lineage has read.

    Args:
        config: the settings.
        vocab_size: number of token values.

    Raises:
        UsageError: an arm is none, a branch has no step of its own, or there is but one size and
            nothing to grow.
    """
    series = _Planner(config, vocab_size)
    for size in config.depths:
        for arm in series.arms:
            series.add(size, arm)
    return series.finished()


@dataclass(frozen=True)
class _Member:
    label: str
    model: GPTConfig
    shape: Shape
    settings: Settings
    tokens_per_step: int
    steps: int


class _Planner:
    def __init__(self, config: SeriesConfig, vocab_size: int) -> None:
        self.config = config
        self.arms = [parse_arm(word) for word in config.arms]
        grown = next((arm.name for arm in self.arms if arm.grown), None)
        if len(config.depths) == 1 and grown is not None:
            raise UsageError(
                f"--depths {config.depths[0]} is one size, out of which nothing grows, and "
                f"{grown} asks for growing: give two or more, or --arms scratch"
            )
        self.plans: dict[str, ModelPlan] = {}
        self.members: dict[Size, _Member] = {}
        for size in config.depths:
            self.members[size] = self._member(size, vocab_size)

    def _member(self, size: Size, vocab_size: int) -> _Member:
        config = self.config
        layers, width = config.layers_and_width(size)
        model = miniseries_config(
            layers,
            width=width,
            head_dim=config.width_of_heads,
            vocab_size=vocab_size,
            sequence_len=config.sequence_len,
        )
        shape = shape_of(model)
        first = next(iter(self.members.values())).shape if self.members else shape
        settings = settings_of(model, config, shape.scaling_params / first.scaling_params)
        tokens = settings.batch_size * config.sequence_len
        if config.steps is None:
            steps = max(2, round(config.ratio * shape.scaling_params / tokens))
        else:
            steps = config.steps[config.depths.index(size)]
        label = size if isinstance(size, str) else f"d{size}"
        return _Member(label, model, shape, settings, tokens, steps)

    def _parent_size(self, size: Size) -> Size | None:
        depths, allowed = self.config.depths, self.config.parents
        before = [s for s in depths[: depths.index(size)] if allowed is None or s in allowed]
        return before[-1] if before else None

    def add(self, size: Size, arm: Arm) -> None:
        parent_size = self._parent_size(size)
        if not arm.grown or parent_size is None:
            plan = self._plan(self.members[size], self._first(arm), None)
        else:
            is_first = self._parent_size(parent_size) is None
            name = (self._first(arm) if is_first else arm).name
            parent = self.plans[f"{self.members[parent_size].label}-{name}"]
            plan = self._plan(self.members[size], arm, parent)
        self.plans.setdefault(plan.name, plan)

    def _first(self, arm: Arm) -> Arm:
        """How the first model of an arm's chain is trained."""
        own = arm.grown and self.config.shares is None
        return dataclasses.replace(arm.root, grown=own)

    def finished(self) -> tuple[ModelPlan, ...]:
        """The plans, which now keep what their children grow out of."""
        return tuple(
            dataclasses.replace(plan, kept=tuple(sorted({*plan.kept, *self._grown_at(plan)})))
            for plan in self.plans.values()
        )

    def _branches(
        self, member: _Member, arm: Arm, prior_tokens: int
    ) -> tuple[list[float], list[int], int]:
        """Shares, first steps and length of the cooled branches, the model's own last."""
        config, steps = self.config, member.steps
        cooldown = max(1, round(config.cooldown * steps))
        if arm.grown and config.shares is None:
            assert config.lineage is not None  # one of the two is there
            inherited = prior_tokens / member.tokens_per_step
            asked, ends = config.lineage, [round(t * steps - inherited) for t in config.lineage]
            shares = [round(end / steps, 4) for end in ends]
            what = f"the parents' {inherited / steps:.2f} and up to --lineage"
            remedy = "name larger numbers, further apart"
        else:
            asked = (config.shares if arm.grown else None) or config.scratch_shares
            ends, shares = [round(share * steps) for share in asked], list(asked)
            what, remedy = "the shares", "raise --steps or --ratio, or name fewer shares"
        starts = [end - cooldown for end in ends]
        if starts[0] < 1 or len(set(starts)) < len(starts):
            shown = ",".join(f"{number:g}" for number in asked)
            raise UsageError(
                f"{member.label}-{arm.name}: the {steps} steps of a model from scratch are too few "
                f"for cooled branches of {cooldown} at {what} {shown}: {remedy}"
            )
        return shares, starts, cooldown

    def _grown_at(self, plan: ModelPlan) -> set[int]:
        return {child.grown_at for child in self.plans.values() if child.parent == plan.name}

    def _plan(self, member: _Member, arm: Arm, parent: ModelPlan | None) -> ModelPlan:
        config, shape = self.config, member.shape
        old = None if parent is None else shape_of(parent.model)
        step = shape.flops_per_token * member.tokens_per_step
        step += step_overhead(arm, shape, old, member.tokens_per_step, config.ewc_strength)
        fisher = growth = grown_at = prior = prior_tokens = first = 0
        if parent is not None and old is not None:
            if arm.has("ewc") and arm.strength("ewc", config.ewc_strength) > 0:
                fisher = old.flops_per_token * config.sequence_len * config.fisher_samples
            growth = GROWTH_OPERATIONS * shape.params
            grown_at = max(1, round(config.grow_at * parent.trunk))
            prior = parent.prior_flops + grown_at * parent.flops_per_step + fisher + growth
            sequences = grown_at * parent.settings.batch_size
            prior_tokens = parent.prior_tokens + sequences * config.sequence_len
            size = member.settings.batch_size
            first = -(-(parent.first_sample + sequences) // size) * size  # rounded up
        shares, starts, cooldown = self._branches(member, arm, prior_tokens)
        branches = tuple(zip(shares[:-1], starts[:-1], strict=True))
        return ModelPlan(
            size=member.label,
            model=member.model,
            arm=arm,
            parent=None if parent is None else parent.name,
            parent_model=None if parent is None else parent.model,
            grown_at=grown_at,
            settings=member.settings,
            full_steps=member.steps,
            share=shares[-1],
            trunk=starts[-1],
            cooldown=cooldown,
            warmup=min(config.warmup_steps, starts[-1]) if parent is None else 0,
            branches=branches,
            kept=tuple(start for _, start in branches),
            branch_of=None,
            first_sample=first,
            flops_per_step=step,
            fisher_flops=fisher,
            growth_flops=growth,
            prior_flops=prior,
            prior_tokens=prior_tokens,
        )
