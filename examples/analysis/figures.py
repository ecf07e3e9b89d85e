"""The figures that compare arms, each a PNG in memory."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.intervals import mean_interval
from analysis.pairings import is_sweep, single_arms, without_strengths
from analysis.power_sums import Array
from analysis.records import Log, Record, chain
from analysis.savings import measured_rows
from analysis.style import Style, legend_beside, png, polish, styles_of
from analysis.verdict import Comparison

__all__ = ["bpb_against_depth", "loss_against_flops"]

Logs = Mapping[tuple[str, int], Log]

_COLUMNS = 3
_GRID_POINTS = 60  # of the mean over seeds whose curves have points at different places
_MANY_ARMS = 16  # of more, those with strengths of their own are not named one by one
_HEADROOM = 0.15  # above the highest start of a grown model, share of the range shown


def loss_against_flops(records: Sequence[Record], logs: Logs) -> bytes:
    """Validation loss over the operations of the lineage, a panel a depth.

    The mean over the seeds and the range between the lowest and the highest; where there are no
    logs, the finished models alone.
    """
    depths = sorted({r.depth for r in records})
    columns = min(_COLUMNS, len(depths))
    rows = math.ceil(len(depths) / columns)
    figure = Figure(figsize=(2.6 + 3.3 * columns, 0.5 + 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    styles = styles_of(list(dict.fromkeys(r.arm for r in records)))
    for axes, depth in zip(panels, depths, strict=False):
        _draw_depth(axes, [r for r in records if r.depth == depth], logs, styles)
        axes.set_title(f"d{depth}", fontsize=10)
    for axes in panels[len(depths) :]:
        axes.set_visible(False)
    figure.supxlabel("training FLOPs of the whole lineage", fontsize=10)
    figure.supylabel("validation bits per byte", fontsize=10)
    legend_beside(figure, list(panels))
    return png(figure)


def _draw_depth(
    axes: Axes, records: Sequence[Record], logs: Logs, styles: Mapping[str, Style]
) -> None:
    starts, ends = [], []
    for arm in dict.fromkeys(r.arm for r in records):
        own = [r for r in records if r.arm == arm]
        style = styles[arm]
        look: dict[str, Any] = {"color": style.colour, "linestyle": style.line, "linewidth": 1.5}
        curves = [points for r in own if len(points := _curve(logs.get((r.name, r.seed), []))) > 1]
        if curves and not is_sweep(own):
            x, values = _on_one_grid(curves)
            axes.plot(x, values.mean(axis=0), label=style.label, **look)
            if len(curves) > 1:
                low, high = values.min(axis=0), values.max(axis=0)
                axes.fill_between(x, low, high, color=style.colour, alpha=0.12, linewidth=0)
            ends.append(float(values[:, -1].max()))
            if any(r.parent for r in own):
                starts.append(float(values[:, 0].max()))
        else:
            for points in curves:
                axes.plot(points[:, 0], points[:, 1], alpha=0.6, **look)
            flops, losses = [r.lineage_flops for r in own], [r.val_bpb for r in own]
            axes.plot(
                flops, losses, style.marker, color=style.colour, markerfacecolor=style.face,
                label=style.label,
            )  # fmt: skip
            ends += losses
    axes.set_xscale("log")
    if ends and any(line.get_linestyle() != "None" for line in axes.get_lines()):
        bottom, top = axes.get_ylim()
        # What a model from scratch does at first would flatten everything that matters.
        top = min(top, max(starts, default=0.3 * top + 0.7 * max(ends)))
        bottom = max(bottom, min(ends) - _HEADROOM * (top - min(ends)))
        axes.set_ylim(bottom, top + _HEADROOM * (top - bottom))
    polish(axes)


def _curve(log: Log) -> Array:
    return np.array([(r["flops"], r["val_bpb"]) for r in measured_rows(log)], dtype=np.float64)


def _on_one_grid(curves: Sequence[Array]) -> tuple[Array, Array]:
    """Operations (P,) and the losses of all curves at them (seeds, P)."""
    first = curves[0][:, 0]
    if all(np.array_equal(c[:, 0], first) for c in curves):
        return first, np.stack([c[:, 1] for c in curves])
    low, high = max(c[0, 0] for c in curves), min(c[-1, 0] for c in curves)
    x = np.geomspace(low, high, _GRID_POINTS)
    return x, np.stack([np.interp(np.log(x), np.log(c[:, 0]), c[:, 1]) for c in curves])


def bpb_against_depth(records: Sequence[Record], comparisons: Sequence[Comparison]) -> bytes:
    """Left: mean bits per byte. Right: differences to the model from scratch, with intervals."""
    arms = single_arms(records)
    if len(arms) > _MANY_ARMS:
        arms = [arm for arm in arms if without_strengths(arm) == arm]
    styles = styles_of(list(dict.fromkeys(r.arm for r in records)))
    rows = [c for c in comparisons if c.question in ("inheriting", "control") and c.arm in arms]
    rows += [c for c in comparisons if c.question == "controller" and c.baseline == "scratch"
             and c.arm in arms]  # fmt: skip
    rows = [c for c in rows if math.isfinite(c.difference)]  # a mean without those that diverged
    compared = list(dict.fromkeys(c.arm for c in rows))
    height = max(4.0, 1.2 + 0.3 * len(compared))
    figure = Figure(figsize=(12.0 if rows else 8.0, height), layout="constrained")
    panels = figure.subplots(1, 2 if rows else 1, squeeze=False)
    left = panels[0][0]
    for i, arm in enumerate(arms):
        seeds = dict.fromkeys(r.seed for r in records if r.arm == arm)
        series = [r for seed in seeds for r in chain(records, arm, seed)]
        depths = sorted({r.depth for r in series})
        found = [mean_interval([r.val_bpb for r in series if r.depth == d]) for d in depths]
        style = styles[arm]
        left.plot(
            np.array(depths) + 0.015 * (i - (len(arms) - 1) / 2),  # so that marks do not overlap
            [mean for mean, _ in found],
            style.line,
            color=style.colour,
            marker=style.marker,
            markerfacecolor=style.face,
            markersize=5,
            linewidth=1.2,
            label=arm,
        )
    left.set_xticks(sorted({r.depth for r in records}))
    left.set_xlabel("depth (layers; width 64 x depth)")
    left.set_ylabel("validation bits per byte")
    polish(left)
    if rows:
        _draw_differences(panels[0][1], rows, compared, styles)
    else:
        legend_beside(figure, [left])
    return png(figure)


def _draw_differences(
    axes: Axes, rows: Sequence[Comparison], arms: Sequence[str], styles: Mapping[str, Style]
) -> None:
    depths = sorted({c.depth for c in rows})
    markers = "osD^vP<>Xhp"
    for c in rows:
        k = depths.index(c.depth)
        style = styles[c.arm]
        place = arms.index(c.arm) + 0.5 * ((k + 0.5) / len(depths) - 0.5)
        error = None
        if c.interval is not None:
            error = [[c.difference - c.interval[0]], [c.interval[1] - c.difference]]
        axes.errorbar(
            [c.difference], [place], xerr=error, color=style.colour, capsize=2, linewidth=1.2,
            marker=markers[k % len(markers)], markersize=5, markerfacecolor=style.face,
        )  # fmt: skip
    for k, depth in enumerate(depths):
        axes.plot([], [], markers[k % len(markers)], color="#555555", label=f"d{depth}")
    axes.axvline(0.0, color="#000000", linewidth=0.9)
    axes.set_yticks(range(len(arms)), arms, fontsize=8)
    axes.invert_yaxis()
    if all(c.interval is None for c in rows):
        words = "one seed, so no intervals"
    else:
        middle = [abs(c.difference) for c in rows]
        reach = 1.3 * max(
            [*middle, *(min(abs(e), 3 * max(middle)) for c in rows for e in c.interval or ())]
        )
        low, high = axes.get_xlim()
        axes.set_xlim(max(low, -reach), min(high, reach))  # two seeds make intervals without end
        words = "95 % intervals over the seeds"
    axes.set_xlabel(f"bits per byte, arm − scratch (left is better; {words})", fontsize=9)
    polish(axes)
    axes.legend(frameon=False, fontsize=8, loc="best")
