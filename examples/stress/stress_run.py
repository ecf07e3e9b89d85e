"""The runs: each trains an arm through a scenario, and is measured and kept in a file."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from common.errors import DamagedError, UsageError, understanding
from common.jobs import changed_settings, run_jobs
from common.output_folder import OutputFolder
from common.plain_files import read_json, write_atomically
from common.program import StopRequest
from corpus import Corpus, validation_windows
from stress.compared_optimizers import Step, arm_settings
from stress.faults import FAULTS, fault_settings
from stress.networks import NETWORKS, network_settings
from stress.scenarios import Size, Stream, scenario_settings
from trainer.training_loop import bits_per_byte

__all__ = [
    "DIVERGED_BY",
    "RECOVERED_WITHIN",
    "Job",
    "Record",
    "identity_of",
    "run_all",
    "run_job",
    "run_kept",
]

Record = dict[str, Any]

DIVERGED_BY = 1.0  # bits per byte worse at the end than half-way; or worse than untrained
RECOVERED_WITHIN = 0.25  # bits per byte above half-way
_POINTS = 20  # measurements on the way
_WINDOWS, _CURVE_WINDOWS = 64, 16  # of the validation text: half-way and at the end; on the way


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        scenario: a name of `SCENARIOS` or of `FAULTS`.
        arm: a name of `ARMS` or of `PEER_ARMS`.
        rate: learning rate, as a multiple of the best of the arm's optimizer and the network.
        seed: of weights, batches and samples.
        size: of the model and the run.
        changes: settings that differ from the arm's, see `compared_optimizers.arm_named`.
        network: a name of `NETWORKS`.
    """

    scenario: str
    arm: str
    rate: float
    seed: int
    size: Size
    changes: tuple[tuple[str, Any], ...] = ()
    network: str = "gpt"

    @property
    def title(self) -> str:
        """What the progress bar calls it."""
        return f"{self.network}, {self.scenario}, {self.arm}, seed {self.seed}"

    @property
    def file(self) -> str:
        """Where its record lies in the folder of the runs."""
        changed = "".join(f"-{name}={_plain(value)}" for name, value in self.changes)
        folder = "" if self.network == "gpt" else f"{self.network}/"
        return f"{folder}{self.scenario}/{self.arm}{changed}-x{self.rate:g}-{self.seed}.json"


def _plain(value: Any) -> str:
    return "+".join(value) if isinstance(value, tuple) else str(value)


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
    if job.network == "gpt":
        del content["network"]  # its records are older than the other networks
    else:
        content["network"] = network_settings(job.network)
    if job.scenario in FAULTS:
        content["fault"] = fault_settings(job.scenario)
    settings: dict[str, Any] = json.loads(json.dumps(content, allow_nan=False))
    return settings


class _Filed(Protocol):
    """A job with a file of its own for its record."""

    @property
    def title(self) -> str:
        """What the progress bar calls it."""

    @property
    def file(self) -> str:
        """Where its record lies in the folder of the runs."""


J = TypeVar("J", bound=_Filed)


def run_all(
    output: OutputFolder, jobs: Sequence[Job], corpus: Corpus, workers: int, stop: StopRequest
) -> list[Record]:
    """`run_kept` with `run_job`."""
    return run_kept(output, jobs, corpus, workers, stop, run_job, identity_of)


def run_kept(
    output: OutputFolder,
    jobs: Sequence[J],
    corpus: Corpus,
    workers: int,
    stop: StopRequest,
    run: Callable[..., Record],
    identity: Callable[[J, Corpus], dict[str, Any]],
) -> list[Record]:
    """Run what has no record yet, and return all records in the order of the jobs.

    Args:
        output: folder, held; its ``runs`` get one JSON file a run, whole or absent.
        jobs: what to run.
        corpus: the text.
        workers: processes; 1 runs everything in this one. Each computes on one thread.
        stop: asked before every step.
        run: does one, given the job, the stop request and ``corpus``, and makes its record, JSON
            values only.
        identity: every setting that decides its numbers; in the record under this name.

    Raises:
        RunInterruptedError: a signal arrived; finished runs are on the disk.
        UsageError: the folder holds runs of other settings, all of which are left as they are; or
            a run failed.
    """
    folder = output.path / "runs"
    records = {job: _read(folder / job.file, identity(job, corpus)) for job in jobs}
    waiting = [job for job in jobs if records[job] is None]

    def keep(job: J, record: Record) -> None:
        path = folder / job.file
        output.check()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(record, allow_nan=False) + "\n")
        records[job] = record

    work = partial(run, corpus=corpus)
    done = len(jobs) - len(waiting)
    run_jobs(waiting, work, keep, stop, workers=workers if workers > 1 else 0, done=done)
    return [record for record in records.values() if record is not None]


def _read(path: Path, identity: dict[str, Any]) -> Record | None:
    """The record of this very run; ``None`` if it is missing or damaged."""
    if not path.exists():
        return None
    try:
        remedy = "make it readable, or name another folder with --out"
        record: Record = read_json(path, remedy=remedy)
        with understanding(str(path), remedy):
            found = dict(record["identity"])
    except DamagedError:
        return None
    changes = changed_settings(found, identity)
    if changes:
        raise UsageError(
            f"{path} is of other settings: {', '.join(changes)}; repeat them, name another folder "
            "with --out, or delete this one"
        )
    return record


def run_job(job: Job, stop: StopRequest, corpus: Corpus) -> Record:
    """Train and measure.

    Args:
        job: what to run.
        stop: asked before every step.
        corpus: the text.

    Returns:
        The record, JSON values only: ``identity``, ``metrics`` and ``curves``.
    """
    size, network = job.size, NETWORKS[job.network]
    fault = FAULTS.get(job.scenario)
    made = network.make(size, torch.Generator().manual_seed(job.seed))
    model: Any = (made if fault is None else fault.changed(made)).to(size.device)
    rate = job.rate * network.rate
    stream = Stream(job.scenario, job.seed, size, corpus.train)
    eps = None if fault is None else fault.eps
    step = Step(job.arm, model, rate, dict(job.changes), eps)
    windows = validation_windows(corpus.validation, size.sequence_len, _WINDOWS)
    few = validation_windows(corpus.validation, size.sequence_len, _CURVE_WINDOWS)
    bits = partial(bits_per_byte, model, token_bytes=corpus.token_bytes)
    every = max(1, size.steps // _POINTS)

    start = _norm(model)
    norms, losses, gates, guards = [1.0], [], [], []
    validation = [bits(few)]
    half = few_half = math.inf
    for index in range(size.steps):
        stop.check()
        if index == stream.half:
            half, few_half = bits(windows), bits(few)
            if fault is not None and fault.forgets:
                step = Step(job.arm, model, rate, dict(job.changes), eps)
        inputs, targets = stream.training(index, model)
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        shown = step(loss, stream.rate(index))
        losses.append(loss.item() / math.log(2))
        gates.append(shown["phi"])
        guards.append(shown["psi"])
        norms.append(_norm(model) / start)
        if (index + 1) % every == 0:
            validation.append(bits(stream.shifted(few, index)))
    last = bits(stream.shifted(windows, size.steps - 1))
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
