"""How long a step of each arm takes, measured in turns."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.plain_files import read_json, write_atomically
from common.program import StopRequest
from corpus import Corpus
from stress.compared_optimizers import Step, arm_settings
from stress.networks import NETWORKS, network_settings
from stress.scenarios import Size, Stream

__all__ = ["kept_times", "step_times"]

_FIRST = 5  # rounds that are not counted: states are made in them


def step_times(
    arms: Mapping[str, Any],
    network: str,
    size: Size,
    corpus: Corpus,
    rounds: int,
    stop: StopRequest,
) -> dict[str, dict[str, float]]:
    """Time whole steps: forward, backward, rule and update.

    In every round each arm takes one step, on its own model and the round's batch, and the arm that
    begins moves on by one. A ratio is that of an arm's step to AdamW's of the same round, so what
    slows the machine for a second slows both.

    Args:
        arms: name -> settings that differ from the arm's own; "adamw" among them.
        network: of `NETWORKS`.
        size: of model and batch.
        corpus: the text.
        rounds: that are counted.
        stop: asked before every round.

    Returns:
        Arm -> "milliseconds", the median, and "ratio", the median of those to AdamW.
    """
    kind = NETWORKS[network]
    models: dict[str, Any] = {
        name: kind.make(size, torch.Generator().manual_seed(0)).to(size.device) for name in arms
    }
    steps = {name: Step(name, models[name], kind.rate, dict(arms[name])) for name in arms}
    stream = Stream("ordinary", 0, size, corpus.train)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for index in range(_FIRST + rounds):
        stop.check()
        for name in _turned([*arms], index):
            inputs, targets = stream.training(index, models[name])
            _wait(size)
            start = time.perf_counter()
            logits = models[name](inputs)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            steps[name](loss, 1.0)
            _wait(size)
            seconds[name].append(time.perf_counter() - start)
    counted = {name: values[_FIRST:] for name, values in seconds.items()}
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(values),
            "ratio": statistics.median(
                a / b for a, b in zip(values, counted["adamw"], strict=True)
            ),
        }
        for name, values in counted.items()
    }


def _turned(names: Sequence[str], by: int) -> Sequence[str]:
    by %= len(names)
    return [*names[by:], *names[:by]]


def _wait(size: Size) -> None:
    if size.device == "cuda":
        torch.cuda.synchronize()


def kept_times(
    path: Path,
    arms: Mapping[str, Any],
    network: str,
    size: Size,
    corpus: Corpus,
    rounds: int,
    stop: StopRequest,
) -> dict[str, dict[str, float]]:
    """The times of a file if they are of the same settings; else they are measured and written.

    Args:
        path: of the file.
        arms: see `step_times`.
        network: see `step_times`.
        size: see `step_times`.
        corpus: see `step_times`.
        rounds: see `step_times`.
        stop: see `step_times`.

    Raises:
        UsageError: the file is there and cannot be read.
    """
    update = {name: arm_settings(name, dict(changes)) for name, changes in arms.items()}
    content: dict[str, Any] = {"network": network_settings(network), "update": update}
    content |= {"size": asdict(size), "rounds": rounds}
    content |= {"corpus": corpus.sha256, "torch": str(torch.__version__)}
    identity: dict[str, Any] = json.loads(json.dumps(content, allow_nan=False))
    if path.exists():
        found: dict[str, Any] = read_json(path, remedy="delete it: times are measured again")
        if found.get("identity") == identity:
            kept: dict[str, dict[str, float]] = found["times"]
            return kept
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the runs
    try:
        times = step_times(arms, network, size, corpus, rounds, stop)
    finally:
        torch.set_num_threads(threads)
    text = json.dumps({"identity": identity, "times": times}, indent=1, allow_nan=False)
    write_atomically(path, text + "\n")
    return times
