"""The records of a trained series, checked on reading, and the logs beside them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UsageError
from trainer.log import read_log
from trainer.overhead import GROWTH_OPERATIONS
from trainer.reading import read_json

__all__ = ["Log", "Logs", "Record", "chain", "read_logs", "read_metrics"]

Log = list[dict[str, Any]]
Logs = Mapping[tuple[str, int], Log]  # by name and seed

_REMEDY = "name a metrics.json of a run"


@dataclass(frozen=True)
class Record:
    """One trained model.

    Args:
        name: unique in a run; another seed may use it again.
        depth: layers.
        arm: how it was trained, such as "scratch" or "grown+ewc+ars".
        parent: name of the model it was grown from, or ``None``.
        params: number of all parameters.
        tokens: it was trained on itself, without its ancestors'.
        lineage_tokens: it and its ancestors' trunks were trained on; ``None`` if not recorded.
        flops: of its own training steps.
        fisher_flops: of the Fisher pass on its parent.
        growth_flops: of growing it out of its parent.
        lineage_flops: of everything that went into it.
        seconds: of growing and training it, without its ancestors.
        val_bpb: validation bits per byte; not finite if it diverged.
        seed: of the run.
        warnings: what was noticed while it was trained.
        devices: that worked on it at once.
    """

    name: str
    depth: int
    arm: str
    parent: str | None
    params: int
    tokens: int
    lineage_tokens: int | None
    flops: int
    fisher_flops: int
    growth_flops: int
    lineage_flops: int
    seconds: float
    val_bpb: float
    seed: int
    warnings: tuple[str, ...] = ()
    devices: int = 1

    @property
    def diverged(self) -> bool:
        """Whether training ended in a loss that is no number."""
        return not math.isfinite(self.val_bpb)

    @property
    def own_flops(self) -> int:
        """Training, Fisher pass and growth of this model, without its ancestors."""
        return self.flops + self.fisher_flops + self.growth_flops


def read_metrics(paths: Sequence[Path]) -> list[Record]:
    """Read the ``metrics.json`` of one or more runs.

    Args:
        paths: files that ``examples/miniseries.py`` wrote: several for several seeds, or for other
            arms of the same seed.

    Raises:
        UsageError: a file cannot be read, is not of this form, or two hold the same model.
    """
    records: list[Record] = []
    seen: dict[tuple[str, int], Path] = {}
    for path in paths:
        found = [_record(entry, path, i) for i, entry in enumerate(_read_list(path))]
        for record in found:
            key = (record.name, record.seed)
            if key in seen:
                raise UsageError(
                    f"{path}: {record.name} with seed {record.seed} is in {seen[key]} already; "
                    "name each run once"
                )
            seen[key] = path
        for record in found:
            if record.parent is not None and (record.parent, record.seed) not in seen:
                raise UsageError(
                    f"{path}: the parent {record.parent} of {record.name} has no record; give the "
                    "whole series"
                )
        records += found
    return records


def read_logs(paths: Sequence[Path], records: Iterable[Record]) -> dict[tuple[str, int], Log]:
    """The step logs that lie beside the metrics, by name and seed; those absent are left out."""
    wanted = {(r.name, r.seed) for r in records}
    logs = {}
    for path in paths:
        for entry in _read_list(path):
            key = (entry["name"], entry["seed"])
            rows = read_log(path.with_name(f"log_{entry['name']}.csv"))
            if key in wanted and rows:
                logs[key] = rows
    return logs


def chain(records: Sequence[Record], arm: str, seed: int) -> list[Record]:
    """The models of an arm and all their ancestors, in the order of the records."""
    by_name = {r.name: r for r in records if r.seed == seed}
    members: set[str] = set()
    for record in by_name.values():
        if record.arm == arm:
            name: str | None = record.name
            while name in by_name and name not in members:
                members.add(name)
                name = by_name[name].parent
    return [record for record in by_name.values() if record.name in members]


def _read_list(path: Path) -> list[Any]:
    content = read_json(path, remedy=_REMEDY)
    if not isinstance(content, list) or not content:
        raise UsageError(f"{path} is not a list of records: {_REMEDY}")
    return content


def _record(entry: Any, path: Path, index: int) -> Record:
    where = f"{path}: record {index}"
    if not isinstance(entry, dict):
        raise UsageError(f"{where} is not an object: {_REMEDY}")
    if isinstance(entry.get("name"), str):
        where = f"{path}: {entry['name']}"

    def take(key: str, kind: type, default: Any = None) -> Any:
        if key not in entry and default is None:
            raise UsageError(f"{where} has no {key}: {_REMEDY}")
        value = entry.get(key, default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UsageError(f"{where}: {key} is {value!r}, not of type {kind.__name__}")
        return value

    def number(key: str, kind: type, low: float, default: Any = None) -> Any:
        value = take(key, kind, default)
        if not (low <= value < math.inf):
            raise UsageError(f"{where}: {key} is {value!r}, below {low:g} or not finite")
        return value

    # Of a model that diverged it is null; in older files NaN.
    bpb = math.nan if entry.get("diverged") is True else take("val_bpb", float)
    if bpb < 0.0:
        raise UsageError(f"{where}: val_bpb is {bpb!r}, below 0")
    notes = entry.get("warnings", [])
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise UsageError(f"{where}: warnings is {notes!r}, not a list of texts")
    parent = None if entry.get("parent") is None else take("parent", str)
    params = number("params", int, 1)
    tokens = number("tokens", int, 1)
    lineage_tokens = tokens if parent is None else None
    if "lineage_tokens" in entry:
        lineage_tokens = number("lineage_tokens", int, tokens)
    flops = number("flops", int, 1)
    fisher = number("fisher_flops", int, 0, 0)
    growth = number("growth_flops", int, 0, 0 if parent is None else GROWTH_OPERATIONS * params)
    return Record(
        name=take("name", str),
        depth=number("depth", int, 1),
        arm=take("arm", str),
        parent=parent,
        params=params,
        tokens=tokens,
        lineage_tokens=lineage_tokens,
        flops=flops,
        fisher_flops=fisher,
        growth_flops=growth,
        lineage_flops=number("lineage_flops", int, 1, flops + fisher if parent is None else None),
        seconds=number("seconds", float, 0.0),
        val_bpb=bpb,
        seed=take("seed", int),
        warnings=tuple(notes),
        devices=number("devices", int, 1, 1),
    )
