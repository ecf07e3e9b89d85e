"""One CSV row a training step."""

import hashlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from common.errors import UsageError, understanding
from common.output_folder import put_aside
from common.plain_files import open_file, write_atomically

__all__ = ["FIELDS", "StepLog", "check_log", "read_log"]

# step: updates done; tokens and flops: of the whole lineage so far; loss: nats a token on the
# step's batch; penalty: the value of the penalties in the optimizer; val_bpb: on the curve's
# windows, where it was measured; memory: of the device, most so far, MiB.
FIELDS = (
    "step", "tokens", "flops", "seconds", "lr", "loss", "phi", "psi", "grad_norm", "penalty",
    "val_bpb", "tokens_per_second", "mfu", "memory",
)  # fmt: skip

Row = dict[str, Any]
Facts = dict[str, Any]  # of the rows up to a step: how many, and their digest


@dataclass
class _Found:
    """What a file of rows holds.

    Args:
        rows: that are whole, in order.
        sound: how many of them stand before the first that is not.
        damaged: numbers of the lines that are not, from 1.
    """

    rows: list[Row] = field(default_factory=list)
    sound: int = 0
    damaged: list[int] = field(default_factory=list)


class StepLog:
    """Appends rows to a CSV file; opening it drops the rows after a given step.

    A file that is damaged, or has other rows than it had at that step, is put aside. What is kept
    of it are the rows before the damage, and `warning` says so.

    Args:
        path: the file; created if absent. ``None`` writes nothing.
        last_step: rows after this step are dropped (they will be computed again).
        expected: what `flush` returned at that step, if that is known.

    Attributes:
        warning: what was found wrong, or ``None``.
    """

    def __init__(
        self, path: Path | None, last_step: int | None, expected: Facts | None = None
    ) -> None:
        self._file = None
        self._rows, self._digest = 0, hashlib.sha256()
        self.warning: str | None = None
        if path is None:
            return
        lines = []
        if last_step is not None:
            lines = [_line(row) for row in self._kept(path, last_step, expected)]
        write_atomically(path, ",".join(FIELDS) + "\n" + "".join(lines))
        for line in lines:
            self._count(line)
        self._file = open(path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115

    def _kept(self, path: Path, last_step: int, expected: Facts | None) -> list[Row]:
        found = _find(path)
        rows = [row for row in found.rows[: found.sound] if row["step"] <= last_step]
        if found.damaged:
            what = f"line {found.damaged[0]} of {path.name} is damaged, and its rows end before it"
        elif expected is not None and _facts(rows) != expected:
            what = f"{path.name} is not what was written up to step {last_step}"
        else:
            return rows
        aside = f"; it is kept as {put_aside(path).name}" if path.exists() else ""
        self.warning = f"{what}{aside}"
        return rows

    def write(self, row: Mapping[str, float | int | None]) -> None:
        """Append one row; fields that are missing or ``None`` stay empty."""
        if self._file is not None:
            line = _line(row)
            self._file.write(line)
            self._count(line)

    def _count(self, line: str) -> None:
        self._rows += 1
        self._digest.update(line.encode())

    def flush(self) -> Facts | None:
        """Put every row on the disk; return what tells these rows from others.

        Raises:
            UsageError: the file was removed or replaced meanwhile.
        """
        if self._file is None:
            return None
        self._file.flush()
        os.fsync(self._file.fileno())
        try:
            same = os.path.samestat(os.stat(self._file.name), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            same = False
        if not same:
            raise UsageError(
                f"{self._file.name} was removed or replaced while it was written to: run the same "
                "command again"
            )
        return {"rows": self._rows, "sha256": self._digest.hexdigest()}

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def read_log(path: Path) -> list[Row]:
    """The whole rows of a log, numbers as numbers and empty cells as ``None``.

    Damaged rows are left out, which is said on the standard error.

    Args:
        path: of the log; one that is absent has no rows.

    Raises:
        UsageError: it cannot be read.
    """
    found = _find(path)
    if found.damaged:
        more = f" and {len(found.damaged) - 1} more" if len(found.damaged) > 1 else ""
        _warn(f"{path} is damaged in line {found.damaged[0]}{more}: its other rows are used")
    return found.rows


def check_log(path: Path, expected: Facts | None) -> None:
    """Say on the standard error if the log of a finished model is not what was written.

    Args:
        path: of the log.
        expected: what `StepLog.flush` returned last; ``None`` of an older model says nothing.
    """
    if expected is not None and _facts(_find(path).rows) != expected:
        _warn(f"{path} is not what was written: figures and reports show what it holds now")


@cache  # the same log is read for the table and for the report
def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _find(path: Path) -> _Found:
    found = _Found()
    if not path.exists():
        return found
    with understanding(str(path), "make it readable"), open_file(path) as file:
        header, *lines = file.read().split(b"\n")
    names = header.decode("utf-8", "replace").split(",")
    if not {"step"} <= {*names} <= {*FIELDS}:
        found.damaged.append(1)
        return found
    if lines:
        lines.pop()  # nothing, or a line that a kill has cut short
    last = -1
    for number, line in enumerate(lines, start=2):
        row = _row(names, line)
        if row is None or row["step"] <= last:
            found.damaged.append(number)
            continue
        found.rows.append(row)
        last = row["step"]
        found.sound += not found.damaged
    return found


def _row(names: list[str], line: bytes) -> Row | None:
    """The row in a line, if it is whole."""
    try:
        values = [_number(cell) for cell in line.decode().split(",")]
        row = {**dict.fromkeys(FIELDS), **dict(zip(names, values, strict=True))}
    except ValueError:
        return None
    return row if isinstance(row["step"], int) else None


def _facts(rows: list[Row]) -> Facts:
    digest = hashlib.sha256("".join(map(_line, rows)).encode())
    return {"rows": len(rows), "sha256": digest.hexdigest()}


def _line(row: Mapping[str, Any]) -> str:
    return ",".join(_cell(row.get(field)) for field in FIELDS) + "\n"


def _cell(value: float | int | None) -> str:
    return "" if value is None else repr(value)


def _number(text: str) -> float | int | None:
    if not text:
        return None
    return int(text) if text.isdigit() else float(text)
