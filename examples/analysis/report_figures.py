"""The figures of a report, each a PNG in memory: arms compared, laws, costs and gates.

An arm has the same looks in every figure: colour and marker by method, line by controller.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from analysis.comparisons import (
    Comparison,
    drawn_word,
    is_sweep,
    read_arm,
    single_arms,
    without_strengths,
)
from analysis.costs import ModelCost, measured_rows
from analysis.power_laws import ChinchillaLaw, ComputeLaw
from analysis.records import Log, Logs, Record, chain
from analysis.scaling_laws import ArmLaws
from common.statistics import Array
from trainer.arms import Arm

__all__ = [
    "Style", "bpb_against_depth", "costs", "gates", "loss_against_flops", "scaling", "styles_of",
]  # fmt: skip

_COLUMNS = 3
_GRID_POINTS = 60  # of the mean over seeds whose curves have points at different places
_MANY_ARMS = 16  # of more, those with strengths of their own are not named one by one
_HEADROOM = 0.15  # above the highest start of a grown model, share of the range shown
_CURVE_POINTS = 150  # of a log that has more steps, means of groups are drawn
_EXTRAPOLATION = 10.0  # how far beyond the largest budget a law is drawn
_DECADES = 1e6  # of the penalty's share that are shown
_DPI = 130

# Okabe and Ito's colours, which colour-blind readers can tell apart; the baseline is black.
_METHODS = {
    "scratch": ("#000000", "o"),
    "scratch+muon": ("#8A8A8A", "s"),
    "grown": ("#D55E00", "^"),
    "grown+ewc": ("#0072B2", "D"),
    "grown+subspace": ("#E69F00", "<"),
    "grown+ewc+subspace": ("#009E73", "v"),
    "grown+distill": ("#CC79A7", "P"),
}
_OTHERS = (("#56B4E9", "X"), ("#F0E442", ">"), ("#882255", "h"), ("#44AA99", "p"))
_LINES = {None: "-", "ars": "--", "paper": ":"}


@dataclass(frozen=True)
class Style:
    """Looks of one arm.

    Args:
        colour: of lines and markers.
        marker: of its models.
        line: matplotlib's line style.
        filled: whether the marker is; it is not with a controller.
        label: for the legend, without the strengths of the penalties.
    """

    colour: str
    marker: str
    line: str
    filled: bool
    label: str

    @property
    def marks(self) -> dict[str, Any]:
        """Colour and marker, by matplotlib's names."""
        face = self.colour if self.filled else "white"
        return {"color": self.colour, "marker": self.marker, "markerfacecolor": face}


def styles_of(arms: Sequence[str]) -> dict[str, Style]:
    """The looks of each arm, the same wherever the same arms are drawn.

    Args:
        arms: in the order of the records.
    """
    others: dict[str, tuple[str, str]] = {}
    styles = {}
    for word in arms:
        label = without_strengths(word)
        arm = read_arm(label)
        controller = None if arm is None else arm.controller
        method = label if arm is None else Arm(arm.grown, arm.parts, None).name
        if method in _METHODS:
            colour, marker = _METHODS[method]
        else:
            colour, marker = others.setdefault(method, _OTHERS[len(others) % len(_OTHERS)])
        line = _LINES[controller]
        styles[word] = Style(colour, marker, line, controller is None, drawn_word(label))
    return styles


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
    _legend_beside(figure, list(panels))
    return _png(figure)


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
            axes.plot(flops, losses, linestyle="none", label=style.label, **style.marks)
            ends += losses
    axes.set_xscale("log")
    if ends and any(line.get_linestyle() != "None" for line in axes.get_lines()):
        bottom, top = axes.get_ylim()
        # What a model from scratch does at first would flatten everything that matters.
        top = min(top, max(starts, default=0.3 * top + 0.7 * max(ends)))
        bottom = max(bottom, min(ends) - _HEADROOM * (top - min(ends)))
        if top > bottom:  # else nothing was learnt, and matplotlib's own limits will do
            axes.set_ylim(bottom, top + _HEADROOM * (top - bottom))
    _polish(axes)


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
        means = [np.mean([r.val_bpb for r in series if r.depth == d]) for d in depths]
        places = np.array(depths) + 0.015 * (i - (len(arms) - 1) / 2)  # so that no marks overlap
        look = {**styles[arm].marks, "markersize": 5, "linewidth": 1.2}
        left.plot(places, means, styles[arm].line, label=drawn_word(arm), **look)
    left.set_xticks(sorted({r.depth for r in records}))
    left.set_xlabel("depth (layers; width 64 x depth)")
    left.set_ylabel("validation bits per byte")
    _polish(left)
    if rows:
        _draw_differences(panels[0][1], rows, compared, styles)
    else:
        _legend_beside(figure, [left])
    return _png(figure)


def _draw_differences(
    axes: Axes, rows: Sequence[Comparison], arms: Sequence[str], styles: Mapping[str, Style]
) -> None:
    depths = sorted({c.depth for c in rows})
    markers = "osD^vP<>Xhp"
    for c in rows:
        k = depths.index(c.depth)
        place = arms.index(c.arm) + 0.5 * ((k + 0.5) / len(depths) - 0.5)
        error = None
        if c.interval is not None:
            error = [[c.difference - c.interval[0]], [c.interval[1] - c.difference]]
        look = {**styles[c.arm].marks, "marker": markers[k % len(markers)], "markersize": 5}
        axes.errorbar([c.difference], [place], xerr=error, capsize=2, linewidth=1.2, **look)
    for k, depth in enumerate(depths):
        axes.plot([], [], markers[k % len(markers)], color="#555555", label=f"d{depth}")
    axes.axvline(0.0, color="#000000", linewidth=0.9)
    axes.set_yticks(range(len(arms)), map(drawn_word, arms), fontsize=8)
    axes.invert_yaxis()
    if all(c.interval is None for c in rows):
        words = "one seed, so no intervals"
    else:
        largest = max(abs(c.difference) for c in rows)
        ends = [min(abs(e), 3 * largest) for c in rows for e in c.interval or ()]
        reach = 1.3 * max(largest, *ends)
        low, high = axes.get_xlim()
        axes.set_xlim(max(low, -reach), min(high, reach))  # two seeds make intervals without end
        words = "95 % intervals over the seeds"
    axes.set_xlabel(f"bits per byte, arm − scratch (left is better; {words})", fontsize=9)
    _polish(axes)
    axes.legend(frameon=False, fontsize=8, loc="best")


def scaling(laws: Sequence[ArmLaws]) -> bytes:
    """Left: the loss over compute with L(C). Right, where L(N, D) was fitted: fit over measured."""
    fitted = [a for a in laws if isinstance(a.chinchilla, ChinchillaLaw)]
    figure = Figure(figsize=(13.0 if fitted else 9.0, 4.5), layout="constrained")
    panels = list(figure.subplots(1, 2 if fitted else 1, squeeze=False)[0])
    styles = styles_of([a.arm for a in laws])
    axes = panels[0]
    for arm in laws:
        style = styles[arm.arm]
        flops = np.array([r.lineage_flops for r in arm.models], dtype=np.float64)
        losses = [r.val_bpb for r in arm.models]
        label = drawn_word(arm.arm)
        if isinstance(arm.compute, ComputeLaw):
            label += f": {arm.compute.E:.3g} + K C^-{arm.compute.gamma:.3f}"
            inside = np.geomspace(flops.min(), flops.max(), 100)
            beyond = np.geomspace(flops.max(), flops.max() * _EXTRAPOLATION, 30)
            for x, line, alpha in ((inside, style.line, 1.0), (beyond, style.line, 0.4)):
                y = arm.compute.predict(x)
                axes.plot(x, y, line, color=style.colour, linewidth=1.2, alpha=alpha)
        axes.plot(flops, losses, linestyle="none", markersize=5, label=label, **style.marks)
    axes.set_xscale("log")
    axes.set_xlabel("C, training FLOPs of the whole lineage")
    axes.set_ylabel("validation bits per byte")
    _polish(axes)
    for arm in fitted:
        assert isinstance(arm.chinchilla, ChinchillaLaw)
        style = styles[arm.arm]
        params, tokens, _, measured = np.array(arm.runs, dtype=np.float64).T
        predicted = arm.chinchilla.predict(params, tokens)
        panels[1].plot(measured, predicted, style.marker, color=style.colour, markersize=5)
        ends = [measured.min(), measured.max()]
        panels[1].plot(ends, ends, color="#888888", linewidth=0.8, zorder=0)
    if fitted:
        panels[1].set_xlabel("measured bits per byte")
        panels[1].set_ylabel("E + A/N^alpha + B/D^beta")
        _polish(panels[1])
    _legend_beside(figure, panels)
    return _png(figure)


def costs(found: Sequence[ModelCost], records: Sequence[Record]) -> bytes:
    """Left: where the operations of each arm's deepest lineage went. Right: seconds and loss."""
    arms = list(dict.fromkeys(c.arm for c in found))
    styles = styles_of(arms)
    height = max(4.0, 1.2 + 0.28 * len(arms))
    figure = Figure(figsize=(13.0, height), layout="constrained")
    left, right = figure.subplots(1, 2)
    first = {arm: next(c.seed for c in found if c.arm == arm) for arm in arms}
    deepest = {c.arm: c for c in found if c.seed == first[c.arm]}
    base = np.zeros(len(arms))
    kinds: tuple[tuple[str, str, Callable[[ModelCost], int]], ...] = (
        ("parents' trunks", "#56B4E9", lambda c: c.lineage_flops - c.flops),
        ("own training", "#0072B2", lambda c: c.training_flops - (c.overhead_flops or 0)),
        ("what the arm adds to its steps", "#D55E00", lambda c: c.overhead_flops or 0),
        ("Fisher pass", "#E69F00", lambda c: c.fisher_flops),
        ("growing", "#CC79A7", lambda c: c.growth_flops),
    )
    for label, colour, share in kinds:
        values = np.array([share(deepest[arm]) for arm in arms], dtype=np.float64)
        left.barh([drawn_word(arm) for arm in arms], values, left=base, color=colour, label=label)
        base += values
    left.invert_yaxis()
    left.tick_params(axis="y", labelsize=8)
    left.set_xlim(0, 1.02 * base.max())
    seed = found[0].seed
    left.set_xlabel(f"FLOPs of the lineage of the deepest model (seed {seed})")
    left.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    _polish(left)
    bpb = {(r.name, r.seed): r.val_bpb for r in records}
    for arm in arms:
        style = styles[arm]
        width = 0 if is_sweep([r for r in records if r.arm == arm]) else 1.0
        for k, seed in enumerate(dict.fromkeys(c.seed for c in found if c.arm == arm)):
            series = [c for c in found if (c.arm, c.seed) == (arm, seed)]
            seconds = [c.cumulative_seconds for c in series]
            losses = [bpb.get((c.name, c.seed), math.nan) for c in series]
            look = {**style.marks, "markersize": 4, "linewidth": width}
            look["label"] = None if k else style.label
            right.plot(seconds, losses, style.line, **look)
    right.set_xscale("log")
    right.set_xlabel("seconds of the series so far")
    right.set_ylabel("validation bits per byte")
    _polish(right)
    _legend_beside(figure, [right])
    return _png(figure)


def gates(logs: Logs, records: Sequence[Record]) -> bytes | None:
    """Phi, psi and the penalty along the lineage of each arm; ``None`` without any.

    Of the first seed; a series goes through its depths one after the other.
    """
    panels: tuple[tuple[str, Callable[[Mapping[str, Any]], float | None]], ...] = (
        ("phi (1: nothing damped)", lambda row: row["phi"]),
        ("psi (1: no resonance)", lambda row: row["psi"]),
        ("penalty / task loss", _penalty_share),
    )
    figure = Figure(figsize=(13.0, 3.8), layout="constrained")
    shown = list(figure.subplots(1, 3))
    arms = list(dict.fromkeys(r.arm for r in records))
    styles = styles_of(arms)
    for axes, (title, value) in zip(shown, panels, strict=True):
        for arm in arms:
            seed = next(r.seed for r in records if r.arm == arm)
            style = styles[arm]
            for record in chain(records, arm, seed):
                if record.arm != arm:
                    continue
                rows = [r for r in logs.get((record.name, seed), []) if r["loss"] is not None]
                points = [(r.get("tokens") or r["step"], v) for r in rows
                          if (v := value(r)) is not None]  # fmt: skip
                if points:
                    axes.plot(*_thinned(points), style.line, color=style.colour, linewidth=1.0,
                              label=style.label)  # fmt: skip
        axes.set_xlabel("tokens of the lineage")
        axes.set_title(title, fontsize=10)
        _polish(axes)
    for axes in shown[:2]:
        axes.set_ylim(0.0, 1.05)
    heights = [float(np.max(np.asarray(line.get_ydata()))) for line in shown[2].get_lines()]
    if heights and max(heights) > 0:
        shown[2].set_yscale("log")
        shown[2].set_ylim(max(heights) / _DECADES, 2 * max(heights))
    _legend_beside(figure, shown)
    return _png(figure) if any(axes.get_lines() for axes in shown) else None


def _penalty_share(row: Mapping[str, Any]) -> float | None:
    return row["penalty"] / row["loss"] if row["penalty"] and row["loss"] else None


def _thinned(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    size = max(1, len(points) // _CURVE_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [g[-1][0] for g in groups], [sum(v for _, v in g) / len(g) for g in groups]


def _polish(axes: Axes) -> None:
    """A light grid behind everything, and numbers on logarithmic axes that do not collide."""
    if axes.get_xscale() == "log":
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", labelsize=8)
    axes.grid(visible=True, which="major", linewidth=0.4, color="#dddddd")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend_beside(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend for all panels, to their right, an entry a label."""
    entries: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(
            handles=list(entries.values()),
            labels=list(entries),
            loc="outside right center",
            frameon=False,
            fontsize=8,
            handlelength=3.2,
        )


def _png(figure: Figure) -> bytes:
    """The figure as a PNG; equal figures are equal files."""
    content = io.BytesIO()
    # The name of the program and its version would differ from machine to machine.
    figure.savefig(content, format="png", dpi=_DPI, metadata={"Software": None})
    return content.getvalue()


def _power(value: float) -> str:
    digit, exponent = f"{value:.0e}".split("e")
    return f"{digit}e{int(exponent)}" if abs(int(exponent)) > 2 else f"{value:g}"
