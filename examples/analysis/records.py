"""What runs left, checked on reading: records of their models, logs of their steps, settings."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UsageError
from common.plain_files import printable, read_json
from trainer.arms import GROWTH_OPERATIONS
from trainer.series_run import CONFIG_FILE
from trainer.step_log import read_log

__all__ = [
    "Cooled", "Log", "Logs", "Record", "chain", "read_logs", "read_metrics", "rounded",
    "run_settings", "sizes_of", "thinned_curve", "training_log", "without_nan",
]  # fmt: skip

Log = list[dict[str, Any]]
Logs = Mapping[tuple[str, int], Log]  # by name and seed

_MOST = 1e30  # of operations, tokens and seconds: more than any computer has done
_DEEPEST = 10_000
_LEAST_SHARE, _LARGEST_SHARE = 1e-6, 1e3
_LONGEST = 200  # characters: a figure has to hold them
_REMEDY = "name a metrics.json of a run"
_DIGITS = 6
_COLUMNS = ("step", "tokens", "flops", "seconds", "lr", "val_bpb")
# Means over the steps since the last point.
_MEANS = ("loss", "phi", "psi", "grad_norm", "penalty", "tokens_per_second", "mfu")


@dataclass(frozen=True)
class Cooled:
    """A cooled branch of a model's trunk, the model itself among them.

    Args:
        share: of the steps of a model from scratch of its size: its trunk up to there and itself.
        tokens: of these steps.
        flops: of these steps, without growth and Fisher pass.
        seconds: of these steps.
        val_bpb: validation bits per byte; not finite if it diverged.
    """

    share: float
    tokens: int
    flops: int
    seconds: float
    val_bpb: float


@dataclass(frozen=True)
class Record:
    """One trained model.

    Args:
        name: unique in a run; another seed may use it again.
        size: label of its size, such as "d5" or "4x56"; with the arm unique in a run.
        arm: how it was trained, such as "scratch" or "grown+ewc+ars".
        parent: name of the model it was grown from, or ``None``.
        params: number of all parameters.
        scaling_params: in matrix products; ``None`` if not recorded.
        share: of the steps of a model from scratch of its size, its own.
        full_steps: of that model; ``None`` in records of an older trainer, whose models from
            scratch were trained for other budgets.
        cooldown_steps: of its cooled branch; ``None`` where ``full_steps`` is.
        cooled: branches by share, the last one the model itself.
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
        pulls: norm of the penalties' gradient in each layer, at the steps of the column ``step``;
            empty without a penalty.
        devices: that worked on it at once.
    """

    name: str
    size: str
    arm: str
    parent: str | None
    params: int
    scaling_params: int | None
    share: float
    full_steps: int | None
    cooldown_steps: int | None
    cooled: tuple[Cooled, ...]
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
    pulls: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
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
        UsageError: a file cannot be read, is not of this form, or two models have one name, or one
            size and arm, in one seed.
    """
    records: list[Record] = []
    seen: dict[tuple[str, int], Path] = {}
    trained: dict[tuple[str, str, int], str] = {}
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
            kind = (record.size, record.arm, record.seed)
            if kind in trained:
                raise UsageError(
                    f"{path}: {record.name} and {trained[kind]} are both {record.size} of the arm "
                    f"{record.arm} with seed {record.seed}: name runs in which there is one"
                )
            trained[kind] = record.name
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


def sizes_of(records: Iterable[Record]) -> list[str]:
    """The sizes in a set of records, the smallest model first."""
    params = {record.size: record.params for record in records}
    return sorted(params, key=lambda size: params[size])


def _read_list(path: Path) -> list[Any]:
    content = read_json(path, remedy=_REMEDY)
    if not isinstance(content, list) or not content:
        raise UsageError(f"{path} is not a list of records: {_REMEDY}")
    return content


class _Fields:
    """What an entry of a file holds, each field checked when it is taken."""

    def __init__(self, entry: Any, where: str) -> None:
        if not isinstance(entry, dict):
            raise UsageError(f"{where} is not an object: {_REMEDY}")
        self.entry = entry
        self.where = where

    def take(self, key: str, kind: type, default: Any = None) -> Any:
        if key not in self.entry and default is None:
            raise UsageError(f"{self.where} has no {key}: {_REMEDY}")
        value = self.entry.get(key, default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UsageError(f"{self.where}: {key} is {value!r}, not of type {kind.__name__}")
        return value

    def number(
        self, key: str, kind: type, low: float, default: Any = None, most: float = _MOST
    ) -> Any:
        value = self.take(key, kind, default)
        if not (low <= value <= most):
            raise UsageError(f"{self.where}: {key} is {value!r}, not from {low:g} to {most:g}")
        return value

    def word(self, key: str) -> str:
        text: str = self.take(key, str)
        if not (0 < len(text) <= _LONGEST and text.isprintable() and "/" not in text):
            shown = repr(text[:_LONGEST])
            raise UsageError(
                f"{self.where}: {key} is {shown}, not a printable word without a slash of up to "
                f"{_LONGEST} characters: {_REMEDY}"
            )
        return text

    def loss(self) -> float:
        """Bits per byte; of a model that diverged it is null, in older files NaN."""
        silent = self.entry.get("diverged") is True or self.entry.get("val_bpb", 0.0) is None
        bpb: float = math.nan if silent else self.take("val_bpb", float)
        if bpb < 0.0:
            raise UsageError(f"{self.where}: val_bpb is {bpb!r}, below 0")
        return bpb

    def pulls(self) -> dict[str, tuple[float, ...]]:
        """Columns of equal length, of numbers from 0; records of older trainers have none."""
        columns = {
            name: tuple(_Fields({name: v}, self.where).number(name, float, 0.0) for v in values)
            for name, values in self.take("pulls", dict, {}).items()
            if isinstance(values, list)
        }
        lengths = {len(values) for values in columns.values()}
        if len(columns) != len(self.entry.get("pulls", {})) or len(lengths) > 1:
            raise UsageError(f"{self.where}: pulls are no columns of one length: {_REMEDY}")
        if columns and "step" not in columns:
            raise UsageError(f"{self.where}: pulls have no steps: {_REMEDY}")
        return columns


def _record(entry: Any, path: Path, index: int) -> Record:
    fields = _Fields(entry, f"{path}: record {index}")
    if isinstance(entry.get("name"), str) and entry["name"].isprintable():
        fields.where = f"{path}: {entry['name'][:_LONGEST]}"
    number = fields.number
    notes = entry.get("warnings", [])
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise UsageError(f"{fields.where}: warnings is {notes!r}, not a list of texts")
    parent = None if entry.get("parent") is None else fields.word("parent")
    params = number("params", int, 1)
    tokens = number("tokens", int, 1)
    lineage_tokens = tokens if parent is None else None
    if "lineage_tokens" in entry:
        lineage_tokens = number("lineage_tokens", int, tokens)
    flops = number("flops", int, 1)
    fisher = number("fisher_flops", int, 0, 0)
    growth = number("growth_flops", int, 0, 0 if parent is None else GROWTH_OPERATIONS * params)
    seconds = round(number("seconds", float, 0.0), 9)  # which tokens are divided by
    is_old = "cooled" not in entry
    model = Cooled(
        share=1.0 if is_old else number("share", float, _LEAST_SHARE, most=_LARGEST_SHARE),
        tokens=tokens,
        flops=flops,
        seconds=seconds,
        val_bpb=fields.loss(),
    )
    steps = None if is_old else number("steps", int, 1)
    return Record(
        name=fields.word("name"),
        size=f"d{number('depth', int, 1, most=_DEEPEST)}" if is_old else fields.word("size"),
        arm=fields.word("arm"),
        parent=parent,
        params=params,
        scaling_params=None if is_old else number("scaling_params", int, 1, most=params),
        share=model.share,
        full_steps=None if is_old else number("full_steps", int, 1),
        cooldown_steps=None if steps is None else steps - number("trunk_steps", int, 1, most=steps),
        cooled=(model,) if is_old else _cooled(fields, model),
        tokens=tokens,
        lineage_tokens=lineage_tokens,
        flops=flops,
        fisher_flops=fisher,
        growth_flops=growth,
        lineage_flops=number("lineage_flops", int, 1, flops + fisher if parent is None else None),
        seconds=seconds,
        val_bpb=model.val_bpb,
        seed=number("seed", int, -_MOST),
        warnings=tuple(notes),
        pulls=fields.pulls(),
        devices=number("devices", int, 1, 1),
    )


def _cooled(fields: _Fields, model: Cooled) -> tuple[Cooled, ...]:
    """The branches of a record, whose last one has to be the model."""
    branches: list[Cooled] = []
    for index, entry in enumerate(fields.take("cooled", list)):
        own = _Fields(entry, f"{fields.where}: cooled branch {index}")
        branches.append(
            Cooled(
                share=own.number("share", float, _LEAST_SHARE, most=_LARGEST_SHARE),
                tokens=own.number("tokens", int, 1),
                flops=own.number("flops", int, 1),
                seconds=own.number("seconds", float, 0.0),
                val_bpb=own.loss(),
            )
        )
    shares = [branch.share for branch in branches]
    if shares != sorted(set(shares)):
        raise UsageError(
            f"{fields.where}: the shares of its cooled branches, {shares}, do not rise"
        )
    last = branches[-1] if branches else None
    if last is None or (last.share, last.flops) != (model.share, model.flops):
        raise UsageError(f"{fields.where}: the last of its cooled branches is not the model itself")
    return (*branches[:-1], model)


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


def thinned_curve(log: Log) -> dict[str, list[Any]]:
    """The steps at which validation was measured, as columns; empty ones are left out.

    What is noisy (loss, gates, norms, speed) is the mean over the steps since the point before.

    Args:
        log: rows of a log.
    """
    curve: dict[str, list[Any]] = {column: [] for column in (*_COLUMNS, *_MEANS)}
    since: Log = []
    for row in log:
        since.append(row)
        if row["val_bpb"] is None:
            continue
        for column in curve:
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


def without_nan(value: Any) -> Any:
    """A content for JSON, which has no word for a number that is not finite: it becomes ``None``.

    Example:
        >>> without_nan({"mean": float("nan"), "values": (1.0, float("inf"))})
        {'mean': None, 'values': [1.0, None]}
    """
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _without_paths(value: Any) -> Any:
    """The last part of whatever is a path of the machine."""
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
