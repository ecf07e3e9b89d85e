"""Everything a model's training consists of, and the three ways to come by it.

From scratch, grown out of a parent's trunk with its whole training state, or read back from a
checkpoint. Growing takes along the weights (function-preserving), the moments of the optimizer
(m / c, v / c^2), its controller, the scale of the loss, and what the arm keeps of the parent: the
Fisher information (Omega / c^2) as an EWC penalty whose anchor is the grown model itself, a
subspace penalty, or the parent itself as a teacher.
"""

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ars.models import GPT, GPTConfig, Growth, grow
from ars.regularizers import (
    EWC,
    DiagonalFisher,
    Distillation,
    PenaltyMonitor,
    ProgressiveInheritance,
    SubspacePenalty,
)
from ars.regularizers.fisher.estimators import ESTIMATORS
from ars.sharded import part_of, reshard, sum_of_parts
from common.errors import DivergedError, UsageError, understanding
from corpus import batch
from trainer.arm_optimizer import Optimizer, build_optimizer
from trainer.arms import Arm
from trainer.parallel import is_asked
from trainer.series_plan import ModelPlan
from trainer.series_run import Run
from trainer.settings import SeriesConfig

__all__ = [
    "TrainingState", "build_from_scratch", "inherit", "inherit_penalties", "model_of", "restore",
]  # fmt: skip

_OLD_HEAD = 64
_FISHER_BATCH = 16  # sequences at a time; the result does not depend on it
Penalty = EWC | SubspacePenalty | ProgressiveInheritance


class Inheritance:
    """The penalties of a grown model.

    Args:
        penalty: in the optimizer's step, or ``None``.
        distillation: on the predictions, or ``None``.
    """

    def __init__(
        self, penalty: Penalty | None = None, distillation: Distillation | None = None
    ) -> None:
        self.penalty, self.distillation = penalty, distillation

    def subspace_value(self) -> Tensor | float:
        """Value of the subspace part, 0-d; 0 without one."""
        if isinstance(self.penalty, ProgressiveInheritance):
            return self.penalty.parts()["subspace"].detach()
        if isinstance(self.penalty, SubspacePenalty):
            return self.penalty.value().detach()
        return 0.0

    def pulls(self) -> dict[str, float]:
        """Norm of the penalty's gradient in each layer; empty without one. Waits for the device."""
        if self.penalty is None:
            return {}
        value = self.penalty.value()
        held = dict(self.penalty.named_parameters())
        layers: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        gradients = torch.autograd.grad(value, list(held.values()))
        for (name, param), gradient in zip(held.items(), gradients, strict=True):
            words = name.split(".")
            layer = ".".join(words[: 1 + words[1].isdigit()])  # wte, blocks.0, ..., lm_head
            squares, params = layers.setdefault(layer, ([], []))
            squares.append(part_of(gradient).double().square().sum())
            params.append(param)
        norms = torch.stack([sum_of_parts(*parts).sqrt() for parts in layers.values()]).tolist()
        return dict(zip(layers, norms, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """All of it as tensors, numbers and strings (the tensors are not copied)."""
        if self.distillation is not None:
            reshard(self.distillation.teacher)
        return {
            "penalty": None if self.penalty is None else self.penalty.state_dict(),
            "teacher": None
            if self.distillation is None
            else self.distillation.teacher.state_dict(),
        }


def _subspace(model: GPT, old_columns: Mapping[str, int], strength: float) -> SubspacePenalty:
    # The proposal's (I - P) dW, with P the coordinates that the parent had: what restrains the new
    # capacity. Inside any subspace of the old weights it would say what the EWC says.
    return SubspacePenalty.from_coordinates(
        model, old_columns, strength, side="input", protect="outside"
    )


def _combined(ewc: EWC | None, subspace: SubspacePenalty | None) -> Penalty | None:
    if ewc is not None and subspace is not None:
        return ProgressiveInheritance(ewc, subspace)
    return ewc if subspace is None else subspace


def _distillation(teacher: GPT, arm: Arm, config: SeriesConfig) -> Distillation:
    teacher.requires_grad_(requires_grad=False)
    strength = arm.strength("distill", config.distill_strength)
    return Distillation(teacher, strength, config.distill_temperature)


def inherit_penalties(
    growth: Growth, arm: Arm, config: SeriesConfig, importance: Mapping[str, Tensor]
) -> Inheritance:
    """The penalties of an arm towards what has just been grown.

    Args:
        growth: of the model; its parent becomes the teacher of a distillation.
        arm: how the model is trained.
        config: the strengths.
        importance: of the parent's parameters; empty for none.
    """
    ewc = subspace = None
    if importance:
        strength = arm.strength("ewc", config.ewc_strength)
        ewc = EWC(growth.model, growth.importance(importance), strength=strength)
    if arm.has("subspace"):
        old = {growth.names[n]: w.shape[1] for n, w in growth.parent.named_parameters()}
        new = {n: w.shape[1] for n, w in growth.model.named_parameters()}
        gamma = arm.strength("subspace", config.subspace_strength)
        if columns := {name: k for name, k in old.items() if k < new[name]}:
            subspace = _subspace(growth.model, columns, gamma)
        else:
            warnings.warn("subspace restrains nothing: the parent is as wide", stacklevel=2)
    teacher = _distillation(growth.parent, arm, config) if arm.has("distill") else None
    return Inheritance(_combined(ewc, subspace), teacher)


def restore_penalties(
    model: GPT, teacher: GPT | None, arm: Arm, config: SeriesConfig, content: Mapping[str, Any]
) -> Inheritance:
    """Build the penalties that `Inheritance.to_dict` described.

    Args:
        model: that they restrain.
        teacher: a model of the parent's size, for a distillation.
        arm: how the model is trained.
        config: the strengths.
        content: what `Inheritance.to_dict` returned.
    """
    distillation = None
    if content["teacher"] is not None and teacher is not None:
        teacher.load_state_dict(content["teacher"])
        distillation = _distillation(teacher, arm, config)
    state = content["penalty"]
    if state is None:
        return Inheritance(None, distillation)
    both = arm.has("subspace") and "ewc" in state
    has_bases = both or (arm.has("subspace") and "bases" in state)
    ewc = subspace = None
    if both or not has_bases:
        importance = (state["ewc"] if both else state)["importance"]
        ewc = EWC(model, importance, strength=arm.strength("ewc", config.ewc_strength))
    if has_bases:
        bases = (state["subspace"] if both else state)["bases"]
        columns = {name: len(basis) for name, basis in bases.items()}
        gamma = arm.strength("subspace", config.subspace_strength)
        subspace = _subspace(model, columns, gamma)
    penalty = _combined(ewc, subspace)
    assert penalty is not None
    penalty.load_state_dict(state)
    return Inheritance(penalty, distillation)


@dataclass
class TrainingState:
    """A model in training.

    Args:
        model: the model.
        forward: the same, compiled and averaging over processes where the run does so.
        optimizer: over all of its parameters.
        inheritance: what it keeps of its parent.
        scaler: of the loss, under fp16.
        step: updates done.
        seconds: spent on growing and training so far, not on evaluating, reporting and saving.
        warnings: what the penalties warned of so far.
        seen: what the next warning depends on.
        pulls: of the penalty by layer (`Inheritance.pulls`), at some steps, which are a column too.
        log: what tells the rows of its log so far from others.
    """

    model: GPT
    forward: nn.Module
    optimizer: Optimizer
    inheritance: Inheritance
    scaler: "torch.amp.GradScaler | None" = None
    step: int = 0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    seen: dict[str, Any] | None = None
    pulls: dict[str, list[float]] = field(default_factory=dict)
    log: dict[str, Any] | None = None

    def note_pulls(self) -> None:
        """Add a row to the pulls, where there is a penalty and they are numbers."""
        found = self.inheritance.pulls()
        if found and all(map(math.isfinite, found.values())):
            for column, value in {"step": self.step, **found}.items():
                self.pulls.setdefault(column, []).append(value)

    def to_dict(self) -> dict[str, Any]:
        """All of it as tensors, numbers and strings (the tensors are not copied)."""
        return {
            **self.model_dict(),
            "seconds": self.seconds,
            "warnings": list(self.warnings),
            "seen": self.seen,
            "pulls": {column: list(values) for column, values in self.pulls.items()},
            "optimizer": self.optimizer.state_dict(),
            "inheritance": self.inheritance.to_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def model_dict(self) -> dict[str, Any]:
        """Of this, what is kept of a finished model."""
        reshard(self.model)
        return {
            "step": self.step,
            "log": self.log,
            "heads": self.model.config.n_head,
            "model": self.model.state_dict(),
        }


def model_of(content: dict[str, Any], label: str, sequence_len: int) -> GPT:
    """The model of the miniseries in a checkpoint.

    Args:
        content: of the checkpoint.
        label: names it in error messages.
        sequence_len: longest input that the model will read.

    Raises:
        UsageError: it holds no model, another kind of model, or one that diverged.
    """
    remedy = "name a file of a run's checkpoints"
    weights = content.get("model")
    if not isinstance(weights, dict) or not isinstance(weights.get("wte.weight"), Tensor):
        raise UsageError(f"{label} holds no model: {remedy}")
    with understanding(label, remedy, "another kind of model than the miniseries'"):
        depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        vocab_size, width = weights["wte.weight"].shape
        heads = content.get("heads", width // _OLD_HEAD)  # earlier versions had one width of heads
        shape = GPTConfig(vocab_size, sequence_len, n_layer=depth, n_head=heads, n_embd=width)
        with torch.device("meta"):  # shapes first: a wrong one may be larger than the memory
            expected = GPT(shape).state_dict()
        for name, value in expected.items():
            found = weights[name]
            if found.shape != value.shape or found.dtype != value.dtype:
                raise ValueError(f"{name} is {found.dtype} of {tuple(found.shape)}")
        model = GPT(shape)
        model.load_state_dict(weights)
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise UsageError(
            f"{label} holds a model that diverged, whose weights are no longer numbers: {remedy}"
        )
    return model


def build_from_scratch(plan: ModelPlan, run: Run) -> TrainingState:
    """A model with random weights and an empty optimizer."""
    model = _empty(plan.model, run, _weights(plan, run))
    return _assemble(model, plan, run, Inheritance())


def inherit(plan: ModelPlan, run: Run, parent: TrainingState) -> TrainingState:
    """Grow a parent out of its trunk.

    Args:
        plan: of the grown model.
        run: whose training split gives the sequences of the Fisher information.
        parent: its state at the step of its trunk at which the model grows.

    Raises:
        RunInterruptedError: a signal arrived during the Fisher pass.
        DivergedError: the parent has no finite Fisher information.
    """
    importance: dict[str, Tensor] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if plan.fisher_flops:
            signs = _generator(run.config.seed, f"{plan.size} Fisher", run.parallel.device)
            fisher = DiagonalFisher(
                parent.model,
                estimator="sketch",
                generator=signs,
                chunk_size=_fisher_chunk(run),
            )
            try:
                importance = fisher.fit(_fisher_batches(plan, run, signs)).importance
            except ValueError as error:
                if "not finite" not in str(error):
                    raise
                raise DivergedError(
                    f"{plan.name} cannot inherit from {plan.parent}, which has diverged (no finite "
                    "Fisher information): lower the learning rate, or leave out arms with ewc, and "
                    "name another folder with --out"
                ) from None
            run.parallel.leave_together(run.stop)  # not all batches have been seen then
        growth = grow(
            parent.model,
            plan.model,
            _weights(plan, run),
            blocks=run.config.blocks,
            shard=run.parallel.divide if run.parallel.divides else None,
        )
        kept = inherit_penalties(growth, plan.arm, run.config, importance)
    state = _assemble(growth.model, plan, run, kept)
    state.warnings += [str(warning.message) for warning in caught]
    pairs = zip(parent.optimizer.parts, state.optimizer.parts, strict=True)
    for part, moments in [(new, growth.optimizer_state(old, new)) for old, new in pairs]:
        part.load_state_dict(moments)
    if state.scaler is not None and parent.scaler is not None:
        state.scaler.load_state_dict(parent.scaler.state_dict())
    return state


def restore(plan: ModelPlan, run: Run, content: dict[str, Any]) -> TrainingState:
    """Build the state that `TrainingState.to_dict` described.

    Raises:
        DamagedError: it is not such a state, though it may be what was saved.
    """
    with understanding(f"a state of {plan.name}", "it is put aside"):
        return _restored(plan, run, content)


def _restored(plan: ModelPlan, run: Run, content: dict[str, Any]) -> TrainingState:
    model = _empty(plan.model, run)
    model.load_state_dict(content["model"])
    teacher = None
    if content["inheritance"]["teacher"] is not None:
        assert plan.parent_model is not None, "a teacher is a parent"
        teacher = _empty(plan.parent_model, run)
    kept = restore_penalties(model, teacher, plan.arm, run.config, content["inheritance"])
    state = _assemble(model, plan, run, kept)
    state.optimizer.load_state_dict(content["optimizer"])
    if state.scaler is not None:
        state.scaler.load_state_dict(content["scaler"])
    elif content["scaler"] is not None:
        raise ValueError("it has a scale of the loss, which its precision has not")
    state.step, state.seconds = content["step"], content["seconds"]
    state.warnings, state.seen = list(content["warnings"]), content["seen"]
    if not isinstance(content["warnings"], list):
        raise ValueError("its warnings are no list")
    # States of earlier versions have neither.
    state.log = content.get("log")
    state.pulls = {c: [v + 0 for v in values] for c, values in content.get("pulls", {}).items()}
    if not (type(state.step) is int and 0 <= state.step <= plan.steps):
        raise ValueError(f"its step is {state.step!r}")
    if not (isinstance(state.seconds, float) and 0 <= state.seconds < math.inf):
        raise ValueError(f"its seconds are {state.seconds!r}")
    if content["heads"] != plan.model.n_head:
        raise ValueError(f"its heads are {content['heads']!r}")
    if not all(isinstance(text, str) for text in state.warnings):
        raise ValueError("its warnings are no texts")
    if state.seen is not None:
        PenaltyMonitor().load_state_dict(state.seen)
    return state


def _assemble(model: GPT, plan: ModelPlan, run: Run, kept: Inheritance) -> TrainingState:
    run.parallel.divide(model)
    optimizer = build_optimizer(model, plan.arm, plan.settings, run.config, kept.penalty)
    model.recompute = run.machine.recompute
    forward: nn.Module = model
    if run.machine.compile:
        # All models share the code of one forward, and torch keeps few compiled versions of a code.
        torch.compiler.reset()
        forward = torch.compile(model)  # type: ignore[assignment]
    scaler = None
    if run.config.precision == "fp16":
        scaler = torch.amp.GradScaler(run.parallel.device.type)
    return TrainingState(model, run.parallel.wrap(forward), optimizer, kept, scaler)


def _empty(model: GPTConfig, run: Run, generator: torch.Generator | None = None) -> GPT:
    return GPT(model, generator).to(run.parallel.device)


def _weights(plan: ModelPlan, run: Run) -> torch.Generator:
    """The same for every arm of a depth: they then differ by what they add alone."""
    return _generator(run.config.seed, f"{plan.size}-scratch weights")


def _generator(seed: int, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
    """One of its own for every purpose, so that no draw depends on another."""
    return torch.Generator(device).manual_seed(_number(seed, purpose))


def _number(seed: int, purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:8], "big") >> 1


def _fisher_chunk(run: Run) -> int | None:
    """Sequences that the Fisher pass holds the activations of; ``None`` for a batch.

    It is in fp32 and not compiled, either of which may double what a sequence takes in a step.
    """
    size = run.machine.device_batch_size
    return None if size is None else max(1, size // 4)


def _fisher_batches(
    plan: ModelPlan, run: Run, signs: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's sequences of each batch; fewer batches once a signal has arrived.

    Args:
        plan: of the grown model.
        run: whose training split it is.
        signs: what the Fisher information draws from. The numbers of the other processes' sequences
            are drawn too, so that each sequence has its own however many processes there are.
    """
    shape = (1, run.config.sequence_len, plan.model.vocab_size)

    def skip(sequences: int) -> None:
        for _ in range(sequences):
            ESTIMATORS["sketch"].draw(shape, signs, signs.device)

    for index, first in enumerate(range(0, run.config.fisher_samples, _FISHER_BATCH)):
        if index and is_asked(run.stop):  # the others may have batches still: all leave together
            return
        inputs, targets = batch(
            run.corpus.train,
            stream=f"fisher {plan.size} {run.config.seed}",
            step=index,
            batch_size=_FISHER_BATCH,
            sequence_len=run.config.sequence_len,
        )
        count = min(_FISHER_BATCH, run.config.fisher_samples - first)
        own = run.parallel.part(count)
        skip(own.start)
        if own.start < own.stop:
            device = run.parallel.device
            yield inputs[own].to(device), targets[own].to(device)
        skip(count - own.stop)
