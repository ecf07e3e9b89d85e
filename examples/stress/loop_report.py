"""What the runs of the anchored loop say: what is lost, and which signal notices it in time.

A signal's limit is 1.25 times its largest value in ordinary training of the tuning seeds, and at
least 0.05 bits.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

from ars import ARSConfig
from ars.atomic import replacing
from ars.controller import ARSController
from common.plain_files import write_atomically
from common.statistics import Estimate
from common.tables import markdown
from stress.anchored_loop import ANCHORS, ORDINARY, SHARES, SIGNALS, LoopJob, Record

__all__ = ["TUNING_SEED", "first_alarm", "limits", "loop_tables", "lost_shares", "write_loop"]

TUNING_SEED = 100  # the seeds that limits are taken from start here
_MARGIN, _LEAST = 1.25, 0.05

Runs = Mapping[LoopJob, Record]
Alarm = Callable[[Record], "int | None"]


def limits(runs: Runs) -> dict[str, float]:
    """The limit of each signal: what it does not exceed in ordinary training of the tuning seeds.

    Args:
        runs: those among them.
    """
    ordinary = [r for job, r in runs.items() if job.seed >= TUNING_SEED and job.share == ORDINARY]
    return {
        name: max(_LEAST, *(_MARGIN * max(_numbers(r["curves"][name])) for r in ordinary))
        for name in SIGNALS
    }


def _numbers(values: Sequence[float | None]) -> list[float]:
    """What is no number is the worst."""
    return [math.inf if value is None else value for value in values]


def first_alarm(values: Sequence[float | None], limit: float) -> int | None:
    """The first step at which a signal exceeds its limit; ``None`` if it never does.

    Example:
        >>> first_alarm([0.1, 0.5, 0.2], 0.3), first_alarm([0.1], 0.3), first_alarm([None], 0.3)
        (1, None, 0)
    """
    return next((step for step, v in enumerate(_numbers(values)) if v > limit), None)


def _closes_gate(values: Sequence[float | None]) -> int | None:
    """The first step at which the default controller, watching a signal, brakes."""
    controller = ARSController(ARSConfig())
    for step, value in enumerate(_numbers(values)):
        if controller.observe(value).phi < 1.0:
            return step
    return None


def _alarms(runs: Runs) -> dict[str, Alarm]:
    """What says when a run is first noticed, by its name in the table."""

    def above(name: str, limit: float) -> Alarm:
        return lambda record: first_alarm(record["curves"][name], limit)

    def braked(name: str) -> Alarm:
        return lambda record: _closes_gate(record["curves"][name])

    return {name: above(name, limit) for name, limit in limits(runs).items()} | {
        f"controller on {name}": braked(name) for name in SIGNALS
    }


def _lost(record: Record) -> list[float]:
    start, *others = _numbers(record["curves"]["validation"])
    return [0.0, *(value - start for value in others)]


def lost_shares(record: Record, alarm: int | None) -> float | None:
    """What is lost at an alarm, as a share of what the end has lost; ``None`` without an alarm.

    Args:
        record: of a run.
        alarm: step of the second half. What is lost there is that of the next measurement.

    Example:
        >>> curves = {"times": [0, 5, 10], "validation": [3.0, 3.5, 5.0]}
        >>> [lost_shares({"curves": curves}, alarm) for alarm in (2, 5, 6, None)]
        [0.25, 0.25, 1.0, None]
    """
    if alarm is None:
        return None
    lost = _lost(record)
    index = next(i for i, time in enumerate(record["curves"]["times"]) if time >= alarm)
    return lost[index] / lost[-1]


def loop_tables(runs: Runs) -> str:
    """The tables in GitHub's Markdown: what is lost, and what each signal notices.

    Args:
        runs: of all anchors, shares and seeds, tuning seeds among them.
    """
    reported = {job: record for job, record in runs.items() if job.seed < TUNING_SEED}
    by_kind: dict[tuple[str, float], list[Record]] = {}
    for job, record in reported.items():
        by_kind.setdefault((job.anchor, job.share), []).append(record)
    rows: list[tuple[str, ...]] = [("anchor", *(f"{share:.0%} real" for share in SHARES))]
    for anchor, label in ANCHORS.items():
        cells = [
            Estimate.of([_lost(r)[-1] for r in by_kind[anchor, share]]).plus_minus("+.2f")
            for share in SHARES
        ]
        rows.append((label, *cells))
    ordinary = by_kind["none", ORDINARY]
    gained = Estimate.of([_lost(record)[-1] for record in ordinary]).plus_minus("+.2f")
    looped = by_kind["none", 0.0]
    seen: list[tuple[str, ...]] = [
        ("signal", "limit", "false alarms", "noticed", "before half", "lost then", "at most",
         "step")
    ]  # fmt: skip
    at = limits(runs)
    for name, alarm in _alarms(runs).items():
        false = sum(alarm(record) is not None for record in ordinary)
        steps = [alarm(record) for record in looped]
        pairs = zip(looped, steps, strict=True)
        shares = [share for r, step in pairs if (share := lost_shares(r, step)) is not None]
        seen.append((
            name,
            f"{at[name]:.3f}" if name in at else "",
            f"{false} of {len(ordinary)}",
            f"{len(shares)} of {len(looped)}",
            f"{sum(share < 0.5 for share in shares)} of {len(looped)}",
            f"{median(shares):.0%}" if shares else "",
            f"{max(shares):.0%}" if shares else "",
            f"{median(step for step in steps if step is not None):.0f}" if shares else "",
        ))  # fmt: skip
    return (
        f"{markdown(rows, 'lr', padded=True)}\n\n"
        "- Bits per byte on held-out text above those half-way; mean and 95 % interval over "
        f"{len(looped)} seeds. Ordinary training for as long: {gained}.\n\n"
        f"{markdown(seen, 'lr', padded=True)}\n\n"
        "- No anchor, 0 % real. A false alarm is one in ordinary training of the same seeds. "
        "Lost then: at the alarm, as a share of what is lost at the end. Medians.\n"
    )


def write_loop(folder: Path, runs: Runs) -> str:
    """Write ``loop.md``, ``loop.png``, and ``loop.json``, which the tables are made from.

    Args:
        folder: output folder.
        runs: as for `loop_tables`.

    Returns:
        The tables.
    """
    text = loop_tables(runs)
    write_atomically(folder / "loop.md", text)
    write_atomically(folder / "loop.json", _to_json(runs))
    with replacing(folder / "loop.png") as unfinished:
        _drawn(runs).savefig(unfinished, format="png", dpi=120, metadata={"Software": None})
    return text


def _to_json(runs: Runs) -> str:
    """One line a run; signals of those alone that are judged by them."""
    lines = []
    for job, record in runs.items():
        judged = job.anchor == "none" and job.share in (0.0, ORDINARY)
        kept = {n: values for n, values in record["curves"].items() if judged or n not in SIGNALS}
        run = {"anchor": job.anchor, "share": job.share, "seed": job.seed, "curves": kept}
        lines.append(f"    {json.dumps(run, allow_nan=False)}")
    identity = next(iter(runs.values()))["identity"]
    common = {n: value for n, value in identity.items() if n not in ("anchor", "share", "seed")}
    settings, listed = json.dumps(common, allow_nan=False), ",\n".join(lines)
    return f'{{\n  "settings": {settings},\n  "runs": [\n{listed}\n  ]\n}}\n'


def _drawn(runs: Runs) -> Figure:
    """Lost over time by anchor and share, and each signal against its limit; means over seeds."""
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    grid = list(figure.subplots(2, 3).flat)
    own = {job: record for job, record in runs.items() if job.seed < TUNING_SEED}
    times = next(iter(own.values()))["curves"]["times"]

    def mean(anchor: str, share: float, of: Callable[[Record], list[float]]) -> list[float]:
        curves = [of(r) for job, r in own.items() if (job.anchor, job.share) == (anchor, share)]
        return [sum(values) / len(values) for values in zip(*curves, strict=True)]

    for color, (anchor, label) in enumerate(ANCHORS.items()):
        for line, share in zip(("-", "--", ":"), SHARES, strict=True):
            grid[0].plot(
                times, mean(anchor, share, _lost), color=f"C{color}", linestyle=line,
                label=label if share == 0 else None,
            )  # fmt: skip
    grid[0].plot(times, mean("none", ORDINARY, _lost), color="0.4", label="ordinary training")
    grid[0].set_title("lost (solid, dashed, dotted: 0, 1, 10 % real)", fontsize=9)
    grid[0].legend(frameon=False, fontsize=8)
    for axes, (name, limit) in zip(grid[1:], limits(runs).items(), strict=True):
        axes.plot(mean("none", 0.0, _signal(name)), color="C0")
        axes.plot(mean("none", ORDINARY, _signal(name)), color="0.4")
        axes.axhline(limit, color="#D55E00", linewidth=0.9, linestyle="--")
        axes.set_title(f"{name}, no anchor (dashed: its limit)", fontsize=9)
    for axes in grid:
        axes.set_xlabel("steps since half-way")
        axes.set_ylabel("bits per byte")
        axes.grid(visible=True, linewidth=0.3)
    return figure


def _signal(name: str) -> Callable[[Record], list[float]]:
    return lambda record: _numbers(record["curves"][name])
