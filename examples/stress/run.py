"""One run: train an arm through a scenario and measure it."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ars.models import GPT
from stress.arms import Step, arm_settings
from stress.jobs import Job
from stress.scenarios import Stream, scenario_settings
from stress.text import Corpus, validation_windows
from trainer.evaluate import bits_per_byte

__all__ = ["DIVERGED_BY", "RECOVERED_WITHIN", "identity_of", "run_job"]

DIVERGED_BY = 1.0  # bits per byte worse at the end than half-way; or worse than untrained
RECOVERED_WITHIN = 0.25  # bits per byte above half-way
_POINTS = 20  # measurements on the way
_WINDOWS, _CURVE_WINDOWS = 64, 16  # of the validation text: half-way and at the end; on the way
_TOKEN_BYTES = torch.ones(256, dtype=torch.int64)  # a token is a byte


def identity_of(job: Job, corpus: Corpus) -> dict[str, Any]:
    """Every setting that decides the numbers of a run, as JSON reads it back.

    Args:
        job: the run.
        corpus: the text.
    """
    content = asdict(job) | {
        "corpus": corpus.sha256,
        "update": arm_settings(job.arm, dict(job.changes)),
        "stress": scenario_settings(),
        "measurement": {
            "diverged_by": DIVERGED_BY, "recovered_within": RECOVERED_WITHIN, "points": _POINTS,
            "windows": _WINDOWS, "curve_windows": _CURVE_WINDOWS,
        },
        "torch": str(torch.__version__),
    }  # fmt: skip
    settings: dict[str, Any] = json.loads(json.dumps(content, allow_nan=False))
    return settings


def run_job(job: Job, corpus: Corpus, between: Callable[[], None]) -> dict[str, Any]:
    """Train and measure.

    Args:
        job: what to run.
        corpus: the text.
        between: called before every step; may raise to stop.

    Returns:
        The record, JSON values only: ``identity``, ``metrics`` and ``curves``.
    """
    size = job.size
    model = GPT(size.model(), torch.Generator().manual_seed(job.seed)).to(size.device)
    stream = Stream(job.scenario, job.seed, size, corpus.train)
    step = Step(job.arm, model, job.rate, dict(job.changes))
    windows = validation_windows(corpus.validation, size.sequence_len, _WINDOWS)
    few = validation_windows(corpus.validation, size.sequence_len, _CURVE_WINDOWS)
    every = max(1, size.steps // _POINTS)

    start = _norm(model)
    norms, losses, gates, guards = [1.0], [], [], []
    validation = [_bits(model, few)]
    half = few_half = math.inf
    for index in range(size.steps):
        between()
        if index == stream.half:
            half, few_half = _bits(model, windows), _bits(model, few)
        inputs, targets = stream.training(index, model)
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        shown = step(loss, stream.rate(index))
        losses.append(loss.item() / math.log(2))
        gates.append(shown["phi"])
        guards.append(shown["psi"])
        norms.append(_norm(model) / start)
        if (index + 1) % every == 0:
            validation.append(_bits(model, stream.shifted(few, index)))
    last = _bits(model, stream.shifted(windows, size.steps - 1))
    times = [i * every for i in range(len(validation))]
    metrics = {
        "final": last,
        "half": half,
        "diverged": not last <= min(half + DIVERGED_BY, validation[0]),
        "peak_norm": max(norms) if all(map(math.isfinite, norms)) else math.inf,
        "recovery": _recovery(times, validation, few_half, stream.half, size.steps),
        "wasted": _wasted(times, validation, size.steps),
        "mean_phi": _mean(gates),
        "mean_phi_before": _mean(gates[: stream.half]),
        "least_phi": min(gates),
    }
    curves: dict[str, list[Any]] = {
        "loss": losses,
        "phi": gates,
        "psi": guards,
        "norm": norms,
        "times": times,
        "validation": validation,
    }
    return {
        "identity": identity_of(job, corpus),
        "metrics": {name: _json(value) for name, value in metrics.items()},
        "curves": {
            name: [_json(_short(value)) for value in values] for name, values in curves.items()
        },
    }


def _bits(model: nn.Module, windows: Tensor) -> float:
    return bits_per_byte(model, windows, _TOKEN_BYTES)


def _norm(model: nn.Module) -> float:
    weights: list[Tensor] = [weight.detach() for weight in model.parameters()]
    return float(nn.utils.get_total_norm(weights))


def _recovery(
    times: Sequence[int], validation: Sequence[float], half: float, begins: int, steps: int
) -> int:
    """Steps from half-way until the validation is near its old value for good; all if never."""
    late = [(t, v) for t, v in zip(times, validation, strict=True) if t > begins]
    since = steps
    for time, value in reversed(late):
        if not value <= half + RECOVERED_WITHIN:
            return since - begins
        since = time
    return 0


def _wasted(times: Sequence[int], validation: Sequence[float], steps: int) -> int:
    """Steps after the first time that the validation was as good as at the end."""
    if not math.isfinite(validation[-1]):
        return steps
    return steps - next(t for t, v in zip(times, validation, strict=True) if v <= validation[-1])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _json(value: Any) -> Any:
    """JSON has no infinity and no NaN: ``None`` stands for both."""
    return value if not isinstance(value, float) or math.isfinite(value) else None
