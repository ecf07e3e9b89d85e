"""Everything a model's training consists of, and the three ways to come by it.

From scratch, grown out of a parent's trunk with its whole training state, or read back from a
checkpoint. Growing takes along the weights (function-preserving), the moments of the optimizer
(m / c, v / c^2), its controller, and the Fisher information (Omega / c^2) as an EWC penalty whose
anchor is the grown model itself.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ars import ARSAdamW, ARSConfig
from ars.models import GPT, GPTConfig, grow, miniseries_config
from ars.regularizers import EWC, DiagonalFisher
from trainer.config import SeriesConfig
from trainer.data import Corpus, batch
from trainer.plan import ModelPlan

__all__ = [
    "TrainingState",
    "build_from_scratch",
    "flops_per_token",
    "inherit",
    "restore",
    "steps_for_ratio",
]

_FISHER_BATCH = 16  # sequences at a time; the result does not depend on it


@dataclass
class TrainingState:
    """A model in training.

    Args:
        model: the model.
        optimizer: over all of its parameters.
        penalty: the EWC term that the optimizer applies, or ``None``.
        step: updates done.
        seconds: spent on growing and training so far, evaluation not included.
    """

    model: GPT
    optimizer: ARSAdamW
    penalty: EWC | None
    step: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """All of it as tensors, numbers and strings (the tensors are not copied)."""
        device = self.model.wte.weight.device
        return {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "penalty": None if self.penalty is None else self.penalty.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }


def flops_per_token(depth: int, sequence_len: int) -> int:
    """Training operations a token of the series' model of this depth."""
    return _sizes(depth, sequence_len).flops_per_token()


def steps_for_ratio(config: SeriesConfig, ratio: float) -> tuple[int, ...]:
    """Trunk steps of each depth that make ``ratio`` tokens per parameter in matrix products."""
    tokens = config.batch_size * config.sequence_len
    return tuple(
        math.ceil(ratio * _sizes(depth, config.sequence_len).num_scaling_parameters() / tokens)
        for depth in config.depths
    )


def _sizes(depth: int, sequence_len: int) -> GPT:
    with torch.device("meta"):  # shapes only: no memory, no initial values
        return GPT(miniseries_config(depth, sequence_len=sequence_len))


def build_from_scratch(plan: ModelPlan, config: SeriesConfig) -> TrainingState:
    """A model with random weights and an empty optimizer."""
    torch.manual_seed(_number(config.seed, f"{plan.name} training"))
    weights = _generator(config.seed, f"{plan.name} weights")
    model = GPT(_model_config(plan, config), weights).to(config.device)
    return TrainingState(model, _optimizer(model, config, None), None)


def inherit(
    plan: ModelPlan,
    config: SeriesConfig,
    parent: TrainingState,
    corpus: Corpus,
    between: Callable[[], None],
) -> TrainingState:
    """Grow a parent at the end of its trunk.

    Args:
        plan: of the grown model.
        config: the settings.
        parent: its state at the end of its trunk.
        corpus: the training split gives the sequences of the Fisher information.
        between: called before every Fisher batch; may raise to stop.
    """
    importance: dict[str, Tensor] = {}
    torch.manual_seed(_number(config.seed, f"{plan.name} training"))
    if config.ewc_strength > 0:
        signs = _generator(config.seed, f"{plan.name} Fisher", config.device)
        fisher = DiagonalFisher(parent.model, estimator="sketch", generator=signs)
        importance = fisher.fit(_fisher_batches(plan, config, corpus, between)).importance
    weights = _generator(config.seed, f"{plan.name} weights")
    growth = grow(parent.model, _model_config(plan, config), weights)
    penalty = None
    if importance:
        penalty = EWC(growth.model, growth.importance(importance), strength=config.ewc_strength)
    optimizer = _optimizer(growth.model, config, penalty)
    optimizer.load_state_dict(growth.optimizer_state(parent.optimizer, optimizer))
    return TrainingState(growth.model, optimizer, penalty)


def restore(plan: ModelPlan, config: SeriesConfig, content: dict[str, Any]) -> TrainingState:
    """Build the state that `TrainingState.to_dict` described."""
    model = GPT(_model_config(plan, config)).to(config.device)
    model.load_state_dict(content["model"])
    penalty = None
    if content["penalty"] is not None:
        penalty = EWC(model, content["penalty"]["importance"], strength=config.ewc_strength)
        penalty.load_state_dict(content["penalty"])
    optimizer = _optimizer(model, config, penalty)
    optimizer.load_state_dict(content["optimizer"])
    torch.set_rng_state(content["rng"])
    if content["cuda_rng"] is not None:
        torch.cuda.set_rng_state(content["cuda_rng"], config.device)
    return TrainingState(model, optimizer, penalty, content["step"], content["seconds"])


def _generator(seed: int, purpose: str, device: str = "cpu") -> torch.Generator:
    """One of its own for every purpose, so that no draw depends on another."""
    return torch.Generator(device).manual_seed(_number(seed, purpose))


def _number(seed: int, purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:8], "big") >> 1


def _model_config(plan: ModelPlan, config: SeriesConfig) -> GPTConfig:
    return miniseries_config(plan.depth, sequence_len=config.sequence_len)


def _optimizer(model: GPT, config: SeriesConfig, penalty: EWC | None) -> ARSAdamW:
    controller = {"default": ARSConfig(), "paper": ARSConfig.paper(), "off": None}[config.ars]
    return ARSAdamW(
        model.parameters(),
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,  # every parameter of this GPT is a matrix
        ars=controller,
        penalty=penalty,
        max_grad_norm=config.max_grad_norm,
    )


def _fisher_batches(
    plan: ModelPlan, config: SeriesConfig, corpus: Corpus, between: Callable[[], None]
) -> Iterator[tuple[Tensor, Tensor]]:
    for index, first in enumerate(range(0, config.fisher_samples, _FISHER_BATCH)):
        between()
        inputs, targets = batch(
            corpus.train,
            stream=f"fisher {plan.name} {config.seed}",
            step=index,
            batch_size=min(_FISHER_BATCH, config.fisher_samples - first),
            sequence_len=config.sequence_len,
        )
        yield inputs.to(config.device), targets.to(config.device)
