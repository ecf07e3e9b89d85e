"""One CSV row a training step."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from trainer.checkpoint import write_atomically

__all__ = ["FIELDS", "StepLog", "read_log"]

# step: updates done; tokens and flops: of the whole lineage so far; loss: nats a token on the
# step's batch; penalty: the value of the penalties in the optimizer; val_bpb: on the curve's
# windows, where it was measured; memory: of the device, most so far, MiB.
FIELDS = (
    "step", "tokens", "flops", "seconds", "lr", "loss", "phi", "psi", "grad_norm", "penalty",
    "val_bpb", "tokens_per_second", "mfu", "memory",
)  # fmt: skip


class StepLog:
    """Appends rows to a CSV file; opening it drops the rows after a given step.

    Args:
        path: the file; created if absent. ``None`` writes nothing.
        last_step: rows after this step are dropped (they will be computed again).
    """

    def __init__(self, path: Path | None, last_step: int | None) -> None:
        self._file = None
        if path is None:
            return
        rows = [] if last_step is None else [r for r in read_log(path) if r["step"] <= last_step]
        lines = [",".join(FIELDS)]
        lines += [",".join(_cell(row.get(field)) for field in FIELDS) for row in rows]
        write_atomically(path, "\n".join(lines) + "\n")
        self._file = open(path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115

    def write(self, row: Mapping[str, float | int | None]) -> None:
        """Append one row; fields that are missing or ``None`` stay empty."""
        if self._file is not None:
            self._file.write(",".join(_cell(row.get(field)) for field in FIELDS) + "\n")

    def flush(self) -> None:
        """Put every row on the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a log, numbers as numbers and empty cells as ``None``."""
    if not path.exists():
        return []
    rows = []
    with open(path, encoding="utf-8", newline="") as file:
        for cells in csv.DictReader(file):
            if None in cells.values():
                break  # a kill can cut the last line short
            rows.append({key: _number(text) for key, text in cells.items()})
    return rows


def _cell(value: float | int | None) -> str:
    return "" if value is None else repr(value)


def _number(text: str) -> float | int | None:
    if not text:
        return None
    return int(text) if text.isdigit() else float(text)
