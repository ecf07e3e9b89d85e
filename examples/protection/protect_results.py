"""What the runs say: a table, and figures of what is kept against what is learned.

What was *learned* is a share of what plain training gains on the second text, and what was *lost*
is the rise of the loss on the first, in bits per byte:

    learned = (before_2 - after_2) / (before_2 - plain_2)        lost = after_1 - before_1

Methods are held against each other at equal learning: each curve, of one seed, is interpolated
linearly between its points, and its start and plain training are points of every curve.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ars.atomic import replacing
from common.plain_files import write_atomically
from common.statistics import Estimate, count_seeds
from common.tables import markdown
from protection.methods import METHODS, PLAIN, SAMPLES
from protection.second_training import BASE

__all__ = ["Curve", "curves_of", "lost_at", "markdown_table", "write_report"]

Record = dict[str, Any]
Curve = list[tuple[float, float]]  # learned and lost, of each strength

_LEVELS = (0.5, 0.9)
_MARKERS = "osD^vP<>Xhp*"
_BY_SAMPLES = ("ewc", "kronecker")  # run on several numbers of sequences
_HEADER = (
    "method", "needs of the first text", "lost at half learned", "lost at 0.9 learned",
    "CPU s", "before training", "MiB kept",
)  # fmt: skip


def write_report(folder: Path, records: Sequence[Record], fisher_samples: int) -> str:
    """Write ``table.md`` and the figures ``kept.png``, ``cost.png`` and ``samples.png``.

    The last is there if a method was run on several numbers of sequences.

    Args:
        folder: output folder.
        records: of the runs, those that all methods begin with among them.
        fisher_samples: sequences that a penalty is fitted on unless its method says otherwise.

    Returns:
        The text of ``table.md``.
    """
    text = markdown_table(records)
    write_atomically(folder / "table.md", text)
    by_samples = {
        family: counts
        for family in _BY_SAMPLES
        if len(counts := _of_family(records, family, fisher_samples)) > 1
    }
    usual = [r for r in records if r["method"] == BASE or METHODS[r["method"]].samples is None]
    figures = {"kept.png": _kept(usual), "cost.png": _cost(usual)}
    if by_samples:
        figures["samples.png"] = _samples(records, by_samples)
    for name, figure in figures.items():
        with replacing(folder / name) as unfinished:
            figure.savefig(unfinished, format="png", dpi=120, metadata={"Software": None})
    return text


def curves_of(records: Sequence[Record]) -> dict[str, dict[int, Curve]]:
    """Method -> seed -> its curve, in the order of the strengths.

    Args:
        records: of the runs. A seed counts whose first run is among them. Points that are no
            numbers are left out.
    """
    bases = {record["seed"]: record for record in records if record["method"] == BASE}
    found: dict[str, dict[int, Curve]] = {}
    for record in records:
        name = PLAIN if record["method"] == BASE else record["method"]
        base = bases.get(record["seed"])
        if base is None:
            continue
        curve = found.setdefault(name, {}).setdefault(record["seed"], [])
        curve += [_place(point, base) for point in record["points"] if not _is_lost(point)]
    return found


def _is_lost(point: Mapping[str, float | None]) -> bool:
    return point["first"] is None or point["second"] is None


def _place(point: Mapping[str, float], base: Record) -> tuple[float, float]:
    before, plain = base["before"], base["points"][0]
    gained = before["second"] - plain["second"]
    return (before["second"] - point["second"]) / gained, point["first"] - before["first"]


def lost_at(curve: Curve, plain: float, level: float) -> float:
    """What a method loses on the first text where it has learned a share of the second.

    The least of all crossings of the level by the straight lines between neighbouring points of
    the curve, from the untouched model (0, 0) to plain training (1, plain).

    Args:
        curve: of one seed.
        plain: what plain training loses.
        level: the share, in (0, 1).

    Example:
        >>> round(lost_at([(0.6, 0.1)], 1.0, 0.3), 3), round(lost_at([(0.6, 0.1)], 1.0, 0.8), 3)
        (0.05, 0.55)
    """
    points = sorted([(0.0, 0.0), *curve, (1.0, plain)])
    crossings = [
        a[1] + (level - a[0]) / (b[0] - a[0]) * (b[1] - a[1])
        for a, b in pairwise(points)
        if a[0] <= level <= b[0] and a[0] < b[0]
    ]
    return min(crossings)


def _lost(curves: Mapping[str, Mapping[int, Curve]], name: str, level: float) -> Estimate:
    plain = curves[PLAIN]
    own = curves[name]
    return Estimate.of([lost_at(own[seed], plain[seed][0][1], level) for seed in own])


def markdown_table(records: Sequence[Record]) -> str:
    """The table in GitHub's markdown, and what has to be known to read it.

    Args:
        records: of the runs.
    """
    curves = curves_of(records)
    rows: list[tuple[str, ...]] = [_HEADER]
    for name, method in METHODS.items():
        if name not in curves:
            continue
        of_method = [r for r in records if (PLAIN if r["method"] == BASE else r["method"]) == name]
        trained = [r for r in of_method if "preparing_seconds" in r]
        rows.append((
            method.label,
            method.needs,
            *(_lost(curves, name, level).plus_minus("+.3f") for level in _LEVELS),
            _mean(trained, "cpu_seconds", ".1f"),
            _mean(trained, "preparing_seconds", ".1f"),
            _mean(trained, "state_bytes", ".1f", 2**-20),
        ))  # fmt: skip
    bases = [record for record in records if record["method"] == BASE]
    before, after = (
        {text: Estimate.of([get(r)[text] for r in bases]) for text in ("first", "second")}
        for get in (lambda r: r["before"], lambda r: r["points"][0])
    )
    old, new, worse = before["first"].mean, before["second"].mean, after["first"].mean
    lost = sum(_is_lost(point) for record in records for point in record["points"])
    notes = [
        f"- Lost: bits per byte on the first text above the {old:.3f} before, where "
        "a method has learned half, or 0.9, of what plain training learns of the second text: "
        f"from {new:.3f} to {after['second'].mean:.3f}, by which the first rises to "
        f"{worse:.3f}. Lower is better. Interpolated between strengths; plain training "
        "and the untouched model are points of every curve.",
        f"- {count_seeds(len(bases))}; ± is the 95 % interval of the mean.",
        *([f"- {lost} trainings ended in no number and are left out."] if lost else []),
        "- CPU s: of a whole run; before training: of these, for Fisher passes and samples; MiB "
        "kept: the penalty's state.",
    ]
    return "\n".join([markdown(rows, "ll", padded=True), "", *notes]) + "\n"


def _mean(records: Sequence[Record], key: str, form: str, factor: float = 1.0) -> str:
    if not records:
        return ""
    return f"{factor * sum(record[key] for record in records) / len(records):{form}}"


def _kept(records: Sequence[Record]) -> Figure:
    """What is lost of the first text against what is learned of the second; means over seeds."""
    curves = curves_of(records)
    figure = Figure(figsize=(9.5, 5.5), layout="constrained")
    axes = figure.subplots()
    for index, (name, by_seed) in enumerate(curves.items()):
        points = list(zip(*by_seed.values(), strict=True))  # a strength each
        learned = [Estimate.of([learned for learned, _ in seeds]).mean for seeds in points]
        lost = [Estimate.of([lost for _, lost in seeds]) for seeds in points]
        margins = [estimate.margin or 0.0 for estimate in lost]
        axes.errorbar(
            learned, [estimate.mean for estimate in lost], yerr=margins if any(margins) else None,
            marker=_MARKERS[index % len(_MARKERS)], color=f"C{index % 10}", markersize=5,
            linestyle="none" if name == PLAIN else "-", linewidth=1.2, capsize=2,
            label=METHODS[name].label,
        )  # fmt: skip
    axes.axhline(0.0, color="#000000", linewidth=0.8)
    axes.set_xlabel("learned of the second text, as a share of plain training's gain")
    axes.set_ylabel("lost on the first text (bits per byte, lower is better)")
    _polish(axes)
    figure.legend(frameon=False, fontsize=9, loc="outside right center")
    return figure


def _cost(records: Sequence[Record]) -> Figure:
    """CPU seconds of a run of each method, those before training apart."""
    trained = [record for record in records if "preparing_seconds" in record]
    names = list(dict.fromkeys(record["method"] for record in trained))
    figure = Figure(figsize=(7.5, 1.0 + 0.35 * max(1, len(names))), layout="constrained")
    axes = figure.subplots()
    for name in names:
        own = [record for record in trained if record["method"] == name]
        before = sum(r["preparing_seconds"] for r in own) / len(own)
        whole = sum(r["cpu_seconds"] for r in own) / len(own)
        axes.barh(METHODS[name].label, before, color="#E69F00")
        axes.barh(METHODS[name].label, whole - before, left=before, color="#0072B2")
    axes.invert_yaxis()
    axes.set_xlabel("CPU seconds of a run; orange: before training (Fisher passes, samples)")
    _polish(axes)
    return figure


def _of_family(records: Sequence[Record], family: str, usual: int) -> dict[int, str]:
    """Sequences that a penalty was fitted on -> the method, in the order of the numbers."""
    there = {record["method"] for record in records}
    names = [(usual, family), *((count, f"{family}-{count}") for count in SAMPLES)]
    return dict(sorted((count, name) for count, name in names if name in there))


def _samples(records: Sequence[Record], families: Mapping[str, Mapping[int, str]]) -> Figure:
    """What is lost at half learned, and the time before training, by the sequences fitted on."""
    curves = curves_of(records)
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, (family, counts) in enumerate(families.items()):
        style = {"marker": _MARKERS[index], "color": f"C{index}", "label": METHODS[family].label}
        lost = [_lost(curves, name, _LEVELS[0]) for name in counts.values()]
        left.errorbar(
            list(counts), [each.mean for each in lost], yerr=[each.margin or 0.0 for each in lost],
            capsize=2, **style,
        )  # fmt: skip
        seconds = [
            Estimate.of([r["preparing_seconds"] for r in records if r["method"] == name]).mean
            for name in counts.values()
        ]
        right.plot(list(counts), seconds, **style)
    left.set_ylabel("lost at half learned (bits per byte)")
    right.set_ylabel("CPU seconds before training")
    numbers = sorted({count for counts in families.values() for count in counts})
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(numbers, [str(count) for count in numbers])
        axes.minorticks_off()
        axes.set_xlabel("sequences of the first text")
        _polish(axes)
    left.legend(frameon=False, fontsize=9)
    return figure


def _polish(axes: Axes) -> None:
    axes.grid(visible=True, linewidth=0.4, color="#dddddd")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
