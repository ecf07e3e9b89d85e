"""``training_log.json``: what was set, what was warned of and how each model's training went."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.records import Log, Record
from trainer.errors import UsageError
from trainer.reading import printable, read_json
from trainer.run import CONFIG_FILE

__all__ = ["rounded", "run_settings", "thinned_curve", "training_log"]

_DIGITS = 6
_COLUMNS = ("step", "tokens", "flops", "seconds", "lr", "val_bpb")
# Means over the steps since the last point.
_MEANS = ("loss", "phi", "psi", "grad_norm", "penalty", "tokens_per_second", "mfu")


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
    logs: Mapping[tuple[str, int], Log],
) -> dict[str, Any]:
    """What JSON keeps of the training.

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
