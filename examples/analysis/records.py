"""What runs left, checked on reading: records of their models, logs of their steps, settings."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UsageError
from common.plain_files import printable, read_json
from trainer.arms import GROWTH_OPERATIONS
from trainer.series_run import CONFIG_FILE
from trainer.step_log import read_log

__all__ = [
    "Log", "Logs", "Record", "chain", "read_logs", "read_metrics", "rounded", "run_settings",
    "thinned_curve", "training_log",
]  # fmt: skip

Log = list[dict[str, Any]]
Logs = Mapping[tuple[str, int], Log]  # by name and seed

_MOST = 1e30  # of operations, tokens and seconds: more than any computer has done
_DEEPEST = 10_000
_LONGEST = 200  # characters: a figure has to hold them
_REMEDY = "name a metrics.json of a run"
_DIGITS = 6
_COLUMNS = ("step", "tokens", "flops", "seconds", "lr", "val_bpb")
# Means over the steps since the last point.
_MEANS = ("loss", "phi", "psi", "grad_norm", "penalty", "tokens_per_second", "mfu")


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
    if isinstance(entry.get("name"), str) and entry["name"].isprintable():
        where = f"{path}: {entry['name'][:_LONGEST]}"

    def take(key: str, kind: type, default: Any = None) -> Any:
        if key not in entry and default is None:
            raise UsageError(f"{where} has no {key}: {_REMEDY}")
        value = entry.get(key, default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UsageError(f"{where}: {key} is {value!r}, not of type {kind.__name__}")
        return value

    def number(key: str, kind: type, low: float, default: Any = None, most: float = _MOST) -> Any:
        value = take(key, kind, default)
        if not (low <= value <= most):
            raise UsageError(f"{where}: {key} is {value!r}, not from {low:g} to {most:g}")
        return value

    def word(key: str) -> str:
        text: str = take(key, str)
        if not (0 < len(text) <= _LONGEST and text.isprintable() and "/" not in text):
            shown = repr(text[:_LONGEST])
            raise UsageError(
                f"{where}: {key} is {shown}, not a printable word without a slash of up to "
                f"{_LONGEST} characters: {_REMEDY}"
            )
        return text

    # Of a model that diverged it is null; in older files NaN.
    bpb = math.nan if entry.get("diverged") is True else take("val_bpb", float)
    if bpb < 0.0:
        raise UsageError(f"{where}: val_bpb is {bpb!r}, below 0")
    notes = entry.get("warnings", [])
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise UsageError(f"{where}: warnings is {notes!r}, not a list of texts")
    parent = None if entry.get("parent") is None else word("parent")
    params = number("params", int, 1)
    tokens = number("tokens", int, 1)
    lineage_tokens = tokens if parent is None else None
    if "lineage_tokens" in entry:
        lineage_tokens = number("lineage_tokens", int, tokens)
    flops = number("flops", int, 1)
    fisher = number("fisher_flops", int, 0, 0)
    growth = number("growth_flops", int, 0, 0 if parent is None else GROWTH_OPERATIONS * params)
    return Record(
        name=word("name"),
        depth=number("depth", int, 1, most=_DEEPEST),
        arm=word("arm"),
        parent=parent,
        params=params,
        tokens=tokens,
        lineage_tokens=lineage_tokens,
        flops=flops,
        fisher_flops=fisher,
        growth_flops=growth,
        lineage_flops=number("lineage_flops", int, 1, flops + fisher if parent is None else None),
        seconds=round(number("seconds", float, 0.0), 9),  # which tokens are divided by
        val_bpb=bpb,
        seed=number("seed", int, -_MOST),
        warnings=tuple(notes),
        devices=number("devices", int, 1, 1),
    )


def run_settings(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Settings and data of the runs whose ``metrics.json`` are given, where ``config.json`` says.

    Args:
        paths: files of metrics.
    """
    found = []
    for path in paths:
        try:
            content = read_json(path.parent / CONFIG_FILE, remedy="")
        except UsageError:
            continue  # metrics alone can be analysed too
        if isinstance(content, dict):
            found.append({"run": printable(path.parent.name), **_without_paths(content)})
    return found


def training_log(
    settings: Sequence[Mapping[str, Any]],
    records: Sequence[Record],
    logs: Logs,
) -> dict[str, Any]:
    """What ``training_log.json`` keeps: what was set and warned of, and how training went.

    Args:
        settings: of `run_settings`.
        records: of the trained models.
        logs: of their steps, as far as there are any.
    """
    return {
        "runs": list(settings),
        "models": [
            {
                "name": record.name,
                "seed": record.seed,
                "val_bpb": rounded(record.val_bpb),
                "warnings": list(record.warnings),
                "curve": thinned_curve(logs.get((record.name, record.seed), [])),
            }
            for record in records
        ],
    }


def thinned_curve(log: Log, columns: Sequence[str] = (*_COLUMNS, *_MEANS)) -> dict[str, list[Any]]:
    """The steps at which validation was measured, as columns; empty ones are left out.

    What is noisy (loss, gates, norms, speed) is the mean over the steps since the point before.

    Args:
        log: rows of a log.
        columns: wanted.
    """
    curve: dict[str, list[Any]] = {column: [] for column in columns}
    since: Log = []
    for row in log:
        since.append(row)
        if row["val_bpb"] is None:
            continue
        for column in columns:
            values = [r[column] for r in since if r.get(column) is not None]
            value = row.get(column)
            if column in _MEANS:
                value = sum(values) / len(values) if values else None
            curve[column].append(rounded(value))
        since = []
    return {c: values for c, values in curve.items() if any(v is not None for v in values)}


def rounded(value: float | int | None) -> float | int | None:
    """Six digits of a number; ``None`` for one that is not finite, which JSON has no word for.

    Example:
        >>> rounded(0.123456789), rounded(10**12), rounded(float("nan"))
        (0.123457, 1000000000000, None)
    """
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


def _without_paths(value: Any) -> Any:
    """The last part of whatever is a path of the machine."""
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
