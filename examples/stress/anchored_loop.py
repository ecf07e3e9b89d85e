r"""Training on a model's own samples under an anchor, and the signals that might notice it.

Half-way the model is kept: the start theta_0. From there it trains on its own samples, of which a
share is replaced by sequences of the text, under a penalty towards the start whose strength is
chosen by what kept sequences of the text may lose (`ars.regularizers.LossBudget`). With a share of
1 it is ordinary training, which every signal has to leave in peace. All signals are in bits per
byte and rise as something goes wrong, with R the mean loss of the 20 steps before:

    loss          R - loss on the batch
    entropy       R - entropy of the predictions on the batch
    distance      1/2 sum_i F_i (theta - theta_0)_i^2, F of sequences of the text, over their length
    disagreement  KL(p_0 || p) on the batch, the start's predictions against the present ones
    kept          rise of the loss on 32 kept sequences of the text, measured every 5 steps
"""

import json
import math
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from ars import ARSAdamW
from ars.models import GPT
from ars.regularizers import EWC, LossBudget
from common.program import StopRequest
from corpus import Corpus, validation_windows
from protection.methods import METHODS, fisher_of
from stress.compared_optimizers import BASE_RATES
from stress.scenarios import Size, Stream, random_windows
from trainer.training_loop import bits_per_byte

__all__ = ["ANCHORS", "ORDINARY", "SHARES", "SIGNALS", "LoopJob", "identity_of", "run_loop"]

ANCHORS = {"none": "no anchor", "ewc": "EWC", "kronecker": "Kronecker"}
SHARES = (0.0, 0.01, 0.1)  # of real sequences
ORDINARY = 1.0
SIGNALS = ("loss", "entropy", "distance", "disagreement", "kept")

_SETTINGS: dict[str, Any] = {
    "betas": (0.9, 0.95), "weight_decay": 0.1, "fisher_samples": 64, "kept": 32, "budget": 0.1,
    "budget_every": 5, "reference_steps": 20, "every": 5, "windows": 64,
}  # fmt: skip

Record = dict[str, Any]


@dataclass(frozen=True)
class LoopJob:
    """One run.

    Args:
        anchor: a name of `ANCHORS`.
        share: of sequences of the text in the batches of the second half.
        seed: of weights, batches and samples.
        size: of the model and the run.
    """

    anchor: str
    share: float
    seed: int
    size: Size

    @property
    def title(self) -> str:
        """What the progress bar calls it."""
        return f"{ANCHORS[self.anchor]}, {self.share:.0%} real, seed {self.seed}"

    @property
    def file(self) -> str:
        """Where its record lies in the folder of the runs."""
        return f"{self.anchor}-{self.share:g}-{self.seed}.json"


def identity_of(job: LoopJob, corpus: Corpus) -> dict[str, Any]:
    """Every setting that decides the numbers of a run, as JSON reads it back.

    Args:
        job: the run.
        corpus: the text.
    """
    facts = {"corpus": corpus.sha256, "settings": _SETTINGS, "lr": BASE_RATES["adamw"]}
    found: dict[str, Any] = json.loads(
        json.dumps(asdict(job) | facts | {"torch": str(torch.__version__)}, allow_nan=False)
    )
    return found


def run_loop(job: LoopJob, stop: StopRequest, corpus: Corpus) -> Record:
    """Train, watch and measure.

    Args:
        job: what to run.
        stop: asked before every step.
        corpus: the text.

    Returns:
        The record, JSON values only: ``identity``, and ``curves`` of the second half: each signal a
        step, ``times`` and ``validation``, bits per byte, the first of them at the start.
    """
    size = job.size
    model = GPT(size.model(), torch.Generator().manual_seed(job.seed)).to(size.device)
    real, own = (Stream(name, job.seed, size, corpus.train) for name in ("ordinary", "loop"))
    optimizer = ARSAdamW(
        model.parameters(), lr=BASE_RATES["adamw"], betas=_SETTINGS["betas"],
        weight_decay=_SETTINGS["weight_decay"], ars=None,
    )  # fmt: skip
    windows = validation_windows(corpus.validation, size.sequence_len, _SETTINGS["windows"])
    validation = partial(bits_per_byte, model, windows, corpus.token_bytes)
    recent: list[float] = []
    for index in range(real.half):
        stop.check()
        inputs, targets = real.training(index, model)
        recent.append(_step(optimizer, model(inputs), targets, real.rate(index)))
    before = recent[-_SETTINGS["reference_steps"] :]
    watched = _Watched(model, job, corpus, sum(before) / len(before))
    optimizer.penalty = watched.penalty
    curves: dict[str, list[float]] = {name: [] for name in SIGNALS}
    times, measured, seen = [0], [validation()], 0
    for index in range(real.half, size.steps):
        stop.check()
        inputs, targets = real.training(index, model)
        if job.share < ORDINARY:
            own_inputs, own_targets = own.training(index, model)
            seen += size.batch_size
            count = math.floor(seen * job.share) - math.floor((seen - size.batch_size) * job.share)
            inputs[count:], targets[count:] = own_inputs[count:], own_targets[count:]
        logits = model(inputs)
        for name, value in watched.signals(index, inputs, logits.detach(), targets).items():
            curves[name].append(value)
        if watched.budget is not None:
            watched.budget.step()
        _step(optimizer, logits, targets, real.rate(index))
        done = index + 1 - real.half
        if done % _SETTINGS["every"] == 0:
            times.append(done)
            measured.append(validation())
    return {
        "identity": identity_of(job, corpus),
        "curves": {
            **{name: [_json(value) for value in values] for name, values in curves.items()},
            "times": times,
            "validation": [_json(value) for value in measured],
        },
    }


def _step(optimizer: ARSAdamW, logits: Tensor, targets: Tensor, rate: float) -> float:
    """Differentiate and update; the loss in bits per byte."""
    optimizer.param_groups[0]["lr"] = rate * BASE_RATES["adamw"]
    optimizer.zero_grad()
    loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    optimizer.step()
    return loss.item() / math.log(2)


class _Watched:
    """The start, the penalty towards it, and what is measured against it.

    Args:
        model: as it is half-way.
        job: the run.
        corpus: the text.
        reference: R.
    """

    def __init__(self, model: GPT, job: LoopJob, corpus: Corpus, reference: float) -> None:
        self._model, self._reference = model, reference
        self._start = deepcopy(model).requires_grad_(False)
        draw = partial(_sequences, corpus, job)
        self._fitted = draw("fisher", _SETTINGS["fisher_samples"])
        # Of one strength, over T: the quadratic model of a byte's loss, whatever holds the run.
        self._distance = EWC(model, fisher_of(model, [self._fitted]), 1.0)
        self._kept = draw("kept", _SETTINGS["kept"])
        self._start_kept = self._kept_loss().item()
        self._rise = 0.0
        self.penalty, self.budget = None, None
        if job.anchor != "none":
            make = METHODS[job.anchor].penalty
            assert make is not None, f"{job.anchor} is a penalty"
            self.penalty = make(model, [self._fitted], 1.0)
            self.budget = LossBudget(
                self.penalty, self._kept_loss, _SETTINGS["budget"], every=_SETTINGS["budget_every"]
            )

    @torch.no_grad()
    def _kept_loss(self) -> Tensor:
        inputs, targets = self._kept
        loss = cross_entropy(self._model(inputs).flatten(0, 1), targets.flatten())
        return loss / math.log(2)

    @torch.no_grad()
    def signals(
        self, index: int, inputs: Tensor, logits: Tensor, targets: Tensor
    ) -> dict[str, float]:
        """What each signal says of a batch, before it is trained on."""
        if index % _SETTINGS["every"] == 0:
            self._rise = self._kept_loss().item() - self._start_kept
        now, start = log_softmax(logits, -1), log_softmax(self._start(inputs), -1)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        entropy = -(now.exp() * now).sum(-1).mean()
        apart = kl_div(now, start, reduction="none", log_target=True).sum(-1).mean()
        distance = self._distance.value() / inputs.shape[1]
        nats = (loss, entropy, distance, apart)
        loss_bits, entropy_bits, *others = (float(value) / math.log(2) for value in nats)
        values = self._reference - loss_bits, self._reference - entropy_bits, *others, self._rise
        return dict(zip(SIGNALS, values, strict=True))


def _sequences(corpus: Corpus, job: LoopJob, purpose: str, count: int) -> tuple[Tensor, Tensor]:
    length = job.size.sequence_len + 1
    windows = random_windows(corpus.train, f"loop {purpose} {job.seed}", 0, count, length)
    windows = windows.to(job.size.device)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _json(value: float) -> float | None:
    """JSON has no infinity and no NaN: ``None`` stands for both."""
    return float(f"{value:.5g}") if math.isfinite(value) else None
