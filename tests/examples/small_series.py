"""A series small enough to be run many times, and what a run of it produced."""

import json
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.program import StopRequest
from trainer.step_log import read_log

# The models from scratch train 10 steps, 8 of them trunk. The grown d2 trains 8, 6 of them trunk,
# and beside it a cooled branch of 2 begins at step 3 of its trunk.
TINY = [
    "--arms", "scratch+ars,grown+ewc+ars", "--depths", "1,2", "--width-per-depth", "16",
    "--batch-size", "2", "--sequence-len", "16", "--fisher-samples", "3", "--ewc-strength", "1",
    "--threads", "1", "--steps", "10", "--cooldown", "0.2", "--shares", "0.5,0.8",
]  # fmt: skip
LONG = "60"  # enough steps for a signal to arrive in the middle of a model

CHAIN = "d2-grown+ewc+ars"

Series = Callable[..., tuple[str, bool]]


def results(folder: Path) -> dict[str, Any]:
    """Everything a run produced, but for the times."""
    records = json.loads((folder / "metrics.json").read_text())
    for record in records:
        for timed in (record, *record["cooled"]):
            timed.pop("seconds")
    logs = {}
    for path in folder.glob("log_*.csv"):
        rows = read_log(path)
        for row in rows:
            for key in ("seconds", "tokens_per_second", "memory"):
                row.pop(key)
        logs[path.name] = rows
    models = {
        path.name: _bits(torch.load(path, weights_only=True)["model"])
        for path in (folder / "checkpoints").glob("*.pt")
    }
    return {"records": records, "logs": logs, "models": models}


def _bits(state: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: value.view(torch.int32).flatten().tolist() for name, value in state.items()}


def free_port() -> str:
    """One that nothing listens on, for processes that find each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class KilledError(BaseException):
    """Stands for a kill: nothing is saved on the way out."""


class Stop(StopRequest):
    """Asks to stop, or kills, after a number of training steps."""

    def __init__(self, step: int, *, kill: bool = False) -> None:
        super().__init__()
        self._left = step
        self._kill = kill

    @property
    def requested(self) -> bool:
        """Read by the loop once a step, and once before a model."""
        self._left -= 1
        if self._left == 0 and not self._kill:
            self._handle(signal.SIGTERM, None)
        if self._left < 0 and self._kill:
            raise KilledError
        return super().requested
