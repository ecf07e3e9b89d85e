"""Training on the first text, then on the second by a method, and what is left of the first.

The first model and the plainly trained second one of a seed are kept in files: they are what every
method begins with and is held against.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ars import ARSAdamW
from ars.models import GPT, miniseries_config
from ars.regularizers import LossBudget
from common.checkpoint_file import load_checkpoint, save_checkpoint
from common.program import StopRequest
from corpus import Corpus
from corpus.tokens import batch, validation_windows
from protection.low_rank import add_low_rank, merged_ewc
from protection.methods import METHODS, PLAIN, Method, fisher_of, merged
from trainer.sample import continue_tokens
from trainer.series_plan import learning_rate
from trainer.training_loop import bits_per_byte

__all__ = ["BASE", "Run", "Settings", "Texts", "has_models", "run_method", "train_first"]

BASE = "base"
Texts = tuple[Corpus, Corpus]

_WARMUP, _COOLDOWN = 0.05, 0.2  # shares of the steps
_FISHER_BATCH = 32
_KEPT = 32  # sequences of the first text that a budget is measured on
_CLIP = 1.0
_ADDITIONS_RATE = 3.0  # of the learning rate, for low-rank additions
_LARGEST_PART = 256  # sequences that are sampled at a time
_REMEDY = "delete it, then the same command trains it again"


@dataclass(frozen=True)
class Settings:
    """Everything that holds for all runs of one output folder.

    Args:
        layers: of the model.
        width: of the model; heads have 16 channels.
        sequence_len: T, tokens.
        batch_size: B, sequences a step.
        first_tokens: of the first training, a parameter in matrix products.
        second_tokens: of the second training.
        lr: peak learning rate of both, with warm-up, and a decay over their last fifth.
        fisher_samples: sequences of the first text that penalties are fitted on.
        windows: of each text that the loss is measured on.
    """

    layers: int = 3
    width: int = 48
    sequence_len: int = 128
    batch_size: int = 4
    first_tokens: float = 8.0
    second_tokens: float = 2.0
    lr: float = 2e-3
    fisher_samples: int = 256
    windows: int = 512

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values for JSON."""
        return asdict(self)

    def model(self, generator: torch.Generator) -> GPT:
        """A new model, its weights drawn."""
        config = miniseries_config(
            self.layers, sequence_len=self.sequence_len, width=self.width, head_dim=16
        )
        return GPT(config, generator)

    def steps(self, model: GPT, tokens: float) -> int:
        """Steps that see so many tokens a parameter."""
        seen = tokens * model.num_scaling_parameters()
        return max(2, round(seen / (self.batch_size * self.sequence_len)))


@dataclass(frozen=True)
class Run:
    """A second training, or both trainings of a seed that all methods begin with.

    Args:
        method: a name in ``METHODS``, or ``BASE``.
        strength: its own; of a merge 0, all of whose points are made at once.
        seed: of the weights, the order of the texts and all draws.
    """

    method: str
    strength: float
    seed: int

    @property
    def title(self) -> str:
        """What the progress bar calls it."""
        strength = f" {self.strength:g}" if self.strength else ""
        return f"{self.method}{strength}, seed {self.seed}"


def has_models(run: Run, models: Path) -> bool:
    """Whether all models are there that a run has to leave.

    Args:
        run: of a method, which leaves none, or of a seed.
        models: folder that the models are kept in.
    """
    names = (BASE, PLAIN) if run.method == BASE else ()
    return all(_file(models, name, run.seed).exists() for name in names)


def train_first(run: Run, stop: StopRequest, settings: Settings, texts: Texts, models: Path) -> Any:
    """Train on the first text, and from there plainly on the second; keep both models.

    Args:
        run: whose method is ``BASE``.
        stop: asked after every step.
        settings: of all runs.
        texts: the first and the second.
        models: folder that the models are kept in.

    Returns:
        A record for JSON: the run, its point after the first training, in ``before``, and the one
        after the second.
    """
    started = time.process_time()
    first, second = texts
    model = settings.model(_generator("weights", run.seed))
    steps = settings.steps(model, settings.first_tokens)
    _train(model, settings, _batches(first, settings, f"first {run.seed}", steps), steps, stop)
    before = _measured(model, settings, texts)
    save_checkpoint(_file(models, BASE, run.seed), model.state_dict())
    steps = settings.steps(model, settings.second_tokens)
    _train(model, settings, _batches(second, settings, f"second {run.seed}", steps), steps, stop)
    save_checkpoint(_file(models, PLAIN, run.seed), model.state_dict())
    return _record(run, started, [_measured(model, settings, texts)]) | {"before": before}


def run_method(run: Run, stop: StopRequest, settings: Settings, texts: Texts, models: Path) -> Any:
    """Train on the second text by a method, or merge the two models.

    Args:
        run: what to do.
        stop: asked after every step.
        settings: of all runs.
        texts: the first and the second.
        models: folder with what `train_first` kept.

    Returns:
        A record for JSON: the run, ``points``, each with the ``first`` and the ``second`` text's
        bits per byte (``None`` where they are no number) and the ``strength``, ``cpu_seconds`` of
        the whole, ``preparing_seconds`` of these before the first step, and the penalty's
        ``state_bytes``.
    """
    started = time.process_time()
    method = METHODS[run.method]
    model = settings.model(_generator("weights", run.seed))
    model.load_state_dict(load_checkpoint(_file(models, BASE, run.seed), remedy=_REMEDY))
    if method.kind == "merge":
        return _record(run, started, _merge(run, method, model, settings, texts, models, stop))
    penalty, state_bytes, chosen, pull = None, 0, None, None
    samples = method.samples or settings.fisher_samples
    of_first = _fisher_batches(texts[0], settings, samples, run.seed)
    if method.kind == "rank":
        add_low_rank(model, round(run.strength), _generator("additions", run.seed))
    elif method.rank:
        importance = fisher_of(model, of_first).importance
        changes = add_low_rank(model, method.rank, _generator("additions", run.seed))
        kept = {name: importance[name] for name in changes}
        state_bytes = _bytes_of(kept)
        pull = partial(merged_ewc, changes, kept, run.strength)
    elif method.penalty is not None:
        strength = 1.0 if method.is_budget else run.strength
        penalty = method.penalty(model, of_first, strength)
        state_bytes = _bytes_of(penalty.state_dict())
        if method.is_budget:
            chosen = _budget(model, penalty, run, settings, texts[0])
    steps = settings.steps(model, settings.second_tokens)
    batches = _batches(texts[1], settings, f"second {run.seed}", steps)
    share = run.strength if method.kind in ("replay", "own samples") else method.replay
    if method.kind == "own samples":
        batches = _mixed(batches, _samples(model, settings, share, steps, run.seed, stop), share)
    elif share > 0:
        others = _batches(texts[0], settings, f"replay {run.seed}", steps)
        batches = _mixed(
            batches, (row for pair in others for row in zip(*pair, strict=True)), share
        )
    prepared = time.process_time() - started
    rate = _ADDITIONS_RATE if method.kind == "rank" or method.rank else 1.0
    rate *= run.strength if method.scales_rate else 1.0
    _train(model, settings, batches, steps, stop, penalty, rate, chosen, pull)
    point = _measured(model, settings, texts) | {"strength": run.strength}
    return _record(run, started, [point]) | {
        "preparing_seconds": round(prepared, 2),
        "state_bytes": state_bytes,
    }


def _train(
    model: GPT,
    settings: Settings,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    stop: StopRequest,
    penalty: Any = None,
    rate: float = 1.0,
    chosen: LossBudget | None = None,
    pull: Callable[[], Tensor] | None = None,
) -> None:
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = ARSAdamW(
        trained, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0, ars=None, penalty=penalty,
        max_grad_norm=_CLIP,
    )  # fmt: skip
    cooldown = max(1, round(_COOLDOWN * steps))
    warmup = round(_WARMUP * steps)
    for step, (inputs, targets) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = learning_rate(
            step, peak=rate * settings.lr, warmup=warmup, trunk=steps - cooldown, cooldown=cooldown
        )
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        (loss if pull is None else loss + pull()).backward()
        if chosen is not None:
            chosen.step()
        optimizer.step()
        stop.check()


def _budget(model: GPT, penalty: Any, run: Run, settings: Settings, first: Corpus) -> LossBudget:
    """What the loss on kept sequences of the first text may rise by: bytes are the tokens."""
    inputs, targets = batch(
        first.train, stream=f"kept {run.seed}", step=0, batch_size=_KEPT,
        sequence_len=settings.sequence_len,
    )  # fmt: skip

    def bits() -> Tensor:
        return cross_entropy(model(inputs).flatten(0, 1), targets.flatten()) / math.log(2)

    return LossBudget(penalty, bits, run.strength)


def _batches(
    corpus: Corpus, settings: Settings, stream: str, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(steps):
        yield batch(
            corpus.train, stream=stream, step=step, batch_size=settings.batch_size,
            sequence_len=settings.sequence_len,
        )  # fmt: skip


def _mixed(
    batches: Iterator[tuple[Tensor, Tensor]], rows: Iterator[tuple[Tensor, Tensor]], share: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in which a share of the sequences, spread evenly, is taken from others."""
    seen = 0
    for inputs, targets in batches:
        count = math.floor((seen + len(inputs)) * share) - math.floor(seen * share)
        seen += len(inputs)
        for index in range(count):
            inputs[index], targets[index] = next(rows)
        yield inputs, targets


@torch.no_grad()
def _samples(
    model: GPT, settings: Settings, share: float, steps: int, seed: int, stop: StopRequest
) -> Iterator[tuple[Tensor, Tensor]]:
    """Sequences that the model draws, each after a line's end."""
    left = math.ceil(steps * settings.batch_size * share)
    own, found = deepcopy(model), []
    for part in range(0, left, _LARGEST_PART):
        found.append(continue_tokens(
            own, [ord("\n")], tokens=settings.sequence_len + 1, temperature=1.0,
            seed=_number(f"samples {part}", seed), count=min(_LARGEST_PART, left - part),
        ))  # fmt: skip
        stop.check()
    return ((row[:-1], row[1:]) for rows in found for row in rows)


def _merge(
    run: Run,
    method: Method,
    model: GPT,
    settings: Settings,
    texts: Texts,
    models: Path,
    stop: StopRequest,
) -> list[dict[str, float | None]]:
    first = {name: value.clone() for name, value in model.state_dict().items()}
    second = load_checkpoint(_file(models, PLAIN, run.seed), remedy=_REMEDY)
    fishers = None
    if run.method == "fisher-merge":
        found = []
        for weights, corpus in ((first, texts[0]), (second, texts[1])):
            model.load_state_dict(weights)
            batches = _fisher_batches(corpus, settings, settings.fisher_samples, run.seed)
            fisher = fisher_of(model, batches)
            found.append({name: value.clone() for name, value in fisher.importance.items()})
            stop.check()
        fishers = (found[0], found[1])
    points = []
    for share in method.grid:
        model.load_state_dict(merged(first, second, share, fishers))
        points.append(_measured(model, settings, texts) | {"strength": share})
        stop.check()
    return points


def _fisher_batches(
    corpus: Corpus, settings: Settings, samples: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    inputs, targets = batch(
        corpus.train, stream=f"fisher {seed}", step=0, batch_size=samples,
        sequence_len=settings.sequence_len,
    )  # fmt: skip
    parts = inputs.split(_FISHER_BATCH), targets.split(_FISHER_BATCH)
    return list(zip(*parts, strict=True))


def _measured(model: GPT, settings: Settings, texts: Texts) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, corpus in zip(("first", "second"), texts, strict=True):
        windows = validation_windows(corpus.validation, settings.sequence_len, settings.windows)
        bits = bits_per_byte(model, windows, corpus.token_bytes)
        found[name] = bits if math.isfinite(bits) else None  # JSON knows no other number
    return found


def _record(run: Run, started: float, points: list[dict[str, float | None]]) -> dict[str, Any]:
    return {
        **asdict(run),
        "points": points,
        "cpu_seconds": round(time.process_time() - started, 2),
    }


def _file(models: Path, name: str, seed: int) -> Path:
    return models / f"{name}-seed-{seed}.pt"


def _bytes_of(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(_bytes_of, state.values()))
    return sum(map(_bytes_of, state)) if isinstance(state, (list, tuple)) else 0


def _generator(purpose: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(_number(purpose, seed))


def _number(purpose: str, seed: int) -> int:
    digest = hashlib.sha256(f"protect {purpose} {seed}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
