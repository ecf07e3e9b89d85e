"""Ordinary training, and three ways to lose a run half-way."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ars.models import GPT
from stress.jobs import Size
from stress.text import batch

__all__ = ["EDGE_FACTOR", "SCENARIOS", "Scenario", "Stream", "scenario_settings"]

EDGE_FACTOR = 100.0
_PROMPT = 8  # bytes of real text that a sample begins with
_POOL = 8  # samples at a time
_POOL_STEPS = 20  # steps that train on a pool before the model samples the next one
_WARMUP = 0.1  # of the run
_MAIN_ARMS = (
    "adamw", "adamw-clip", "adamw-betas", "paper", "default", "default-clip", "default-betas",
)  # fmt: skip
_OTHER_OPTIMIZERS = ("sgd", "sgd-default", "muon", "muon-default")


@dataclass(frozen=True)
class Scenario:
    """A kind of run.

    Args:
        title: of its figure.
        begins: what happens half-way.
        arms: names of `arms.ARMS` that are run unless others are asked for; all if empty.
        rates: learning rates, as multiples of the best.
    """

    title: str
    begins: str
    arms: tuple[str, ...] = ()
    rates: tuple[float, ...] = (1.0,)


SCENARIOS = {
    "ordinary": Scenario(
        "Ordinary training",
        "nothing",
        (*_MAIN_ARMS, "default-norm", *_OTHER_OPTIMIZERS),
        (0.3, 1.0, 3.0),
    ),
    "bytes": Scenario("Abrupt shift: bytes permuted", "every byte value is replaced by another"),
    "reversal": Scenario("Abrupt shift: text reversed", "the text runs backwards", _MAIN_ARMS),
    "loop": Scenario("Feedback loop", "the model trains on its own samples"),
    "edge": Scenario(
        "Learning rate beyond the edge", f"the learning rate is multiplied by {EDGE_FACTOR:g}"
    ),
}


def scenario_settings() -> dict[str, Any]:
    """Every setting that the scenarios have in common."""
    return {
        "edge_factor": EDGE_FACTOR, "warmup": _WARMUP, "prompt": _PROMPT, "pool": _POOL,
        "pool_steps": _POOL_STEPS,
    }  # fmt: skip


class Stream:
    """The batches, the learning rate and the measured text of one run.

    Args:
        scenario: a name of `SCENARIOS`.
        seed: of batches, permutation and samples.
        size: of the run.
        text: (N,) uint8 to train on.
    """

    def __init__(self, scenario: str, seed: int, size: Size, text: Tensor) -> None:
        self.scenario, self.seed, self.size, self._text = scenario, seed, size, text
        self.half = size.steps // 2
        self._permutation = torch.randperm(256, generator=_generator(seed, "permutation", "cpu"))
        self._samples = _generator(seed, "samples", size.device)
        self._pool = torch.empty(0)

    def rate(self, step: int) -> float:
        """Factor of the base learning rate: a warm-up, then constant, then the stress if any."""
        if self.scenario == "edge" and step >= self.half:
            return EDGE_FACTOR
        return min(1.0, (step + 1) / max(1, round(_WARMUP * self.size.steps)))

    def training(self, step: int, model: GPT) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, each (B, T).

        Args:
            step: from 0; called once for each, in order.
            model: in the feedback loop, whose samples they are.
        """
        size = self.size
        inputs, targets = batch(
            self._text,
            stream=f"narcissus {self.seed}",
            step=step,
            batch_size=size.batch_size,
            sequence_len=size.sequence_len,
        )
        windows = torch.cat((inputs, targets[:, -1:]), dim=1).to(size.device)
        if step >= self.half and self.scenario == "loop":
            windows = self._own_samples(step, model, windows)
        else:
            windows = self.shifted(windows, step)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def shifted(self, windows: Tensor, step: int) -> Tensor:
        """The text as a model sees it in this step: to train on, and to be measured on."""
        if step >= self.half and self.scenario == "bytes":
            return self._permutation.to(windows.device)[windows]
        return windows.flip(1) if step >= self.half and self.scenario == "reversal" else windows

    def _own_samples(self, step: int, model: GPT, windows: Tensor) -> Tensor:
        if (step - self.half) % _POOL_STEPS == 0:
            rows = torch.arange(_POOL, device=windows.device) % len(windows)
            length = self.size.sequence_len + 1 - _PROMPT
            self._pool = model.generate(windows[rows, :_PROMPT], length, generator=self._samples)
        chosen = torch.randint(
            0, _POOL, (len(windows),), generator=self._samples, device=windows.device
        )
        return self._pool[chosen]


def _generator(seed: int, purpose: str, device: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
