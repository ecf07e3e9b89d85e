"""The figures of a report, each a PNG in memory: series, arms compared, laws, costs and gates.

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
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from analysis.comparisons import Comparison, drawn_word, read_arm, without_strengths
from analysis.costs import ModelCost
from analysis.equal_loss import Bounded
from analysis.power_laws import ChinchillaLaw, ComputeLaw
from analysis.records import Logs, Record, chain, sizes_of
from analysis.scaling_laws import ArmLaws
from analysis.series_account import MemberAccount, SeriesAccount
from common.statistics import Array, Estimate
from trainer.arms import Arm

__all__ = [
    "Style", "cooled_branches", "costs", "gates", "loss_curves", "losses_by_size", "pulls",
    "scaling", "series_costs", "styles_of",
]  # fmt: skip

_COLUMNS = 4
_UPRIGHT = 8  # more labels than these are turned
_MANY_ARMS = 16  # of more, those with strengths of their own are not named one by one
_CURVE_POINTS = 150  # of a log that has more steps, means of groups are drawn
_EXTRAPOLATION = 10.0  # how far beyond the largest budget a law is drawn
_DECADES = 1e6  # of the penalty's share, and of its pulls, that are shown
_DPI = 130
_ABOVE: dict[str, Any] = {"frameon": False, "loc": "lower left", "bbox_to_anchor": (0.0, 1.0)}

# Okabe and Ito's colours, which colour-blind readers can tell apart; the baseline is black.
_METHODS = {
    "scratch": ("#000000", "o"),
    "scratch+muon": ("#8A8A8A", "s"),
    "grown": ("#D55E00", "^"),
    "grown+muon": ("#0072B2", ">"),
    "grown+ewc": ("#56B4E9", "D"),
    "grown+subspace": ("#E69F00", "<"),
    "grown+ewc+subspace": ("#009E73", "v"),
    "grown+distill": ("#CC79A7", "P"),
}
_OTHERS = (("#F0E442", "X"), ("#882255", "h"), ("#44AA99", "p"))
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


def series_costs(accounts: Sequence[SeriesAccount]) -> bytes:
    """Loss of each member against what the series had cost up to it: twins, and what was grown.

    Means over the seeds with 95 % intervals. A dotted line shows what was saved in all, and the
    legend says how much, where no member is worse than its twin.
    """
    figure = Figure(figsize=(8.6, 4.8), layout="constrained")
    axes = figure.subplots()
    styles = styles_of([*(a.baseline for a in accounts), *(a.arm for a in accounts)])
    labelled: set[str] = set()
    for account in accounts:
        members = account.members
        twins = np.cumsum([m.twin_flops for m in members])
        grown = np.cumsum([m.twin_flops * m.paid.mean for m in members])
        name = f"every model from scratch ({drawn_word(account.baseline)})"
        if name not in labelled:
            _draw_estimates(axes, twins, [m.twin_loss for m in members], styles[account.baseline],
                            name)  # fmt: skip
            for flops, m in zip(twins, members, strict=True):
                axes.annotate(m.size, (flops, m.twin_loss.mean), xytext=(4, 5),
                              textcoords="offset points", fontsize=7, color="#555555")  # fmt: skip
        labelled.add(name)
        name = f"each grown out of the one before ({drawn_word(account.arm)})"
        if account.at_equal_loss:
            name += f": {account.saving.mean:.0%} saved"
            height = members[-1].loss.mean
            colour = styles[account.arm].colour
            axes.plot([grown[-1], twins[-1]], [height, height], ":", color=colour, linewidth=1.2)
        _draw_estimates(axes, grown, [m.loss for m in members], styles[account.arm], name)
    axes.set_xlim(left=0.0)
    axes.set_xlabel("training FLOPs of the whole series up to this model")
    axes.set_ylabel("validation bits per byte (lower is better)")
    _polish(axes)
    axes.legend(**_ABOVE, fontsize=9)
    return _png(figure)


def loss_curves(logs: Logs, records: Sequence[Record]) -> bytes | None:
    """Validation loss of each model against what it cost itself, a panel a size; of the first seed.

    ``None`` where no log has two measurements.
    """
    sizes = sizes_of(records)
    styles = styles_of(list(dict.fromkeys(r.arm for r in records)))
    columns = min(_COLUMNS, len(sizes))
    rows = math.ceil(len(sizes) / columns)
    figure = Figure(figsize=(2.2 + 2.6 * columns, 0.6 + 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    seeds = {arm: next(r.seed for r in records if r.arm == arm) for arm in styles}
    for axes, size in zip(panels, sizes, strict=False):
        for record in records:
            if record.size != size or record.seed != seeds[record.arm]:
                continue
            before = record.lineage_flops - record.flops
            rows_of = logs.get((record.name, record.seed), [])
            points = [(row["flops"] - before, row["val_bpb"]) for row in rows_of
                      if row["val_bpb"] is not None and math.isfinite(row["val_bpb"])]  # fmt: skip
            if len(points) > 1:
                style = styles[record.arm]
                flops, losses = zip(*points, strict=True)
                axes.plot(flops, losses, style.line, label=style.label, **style.marks, markersize=3)
        axes.set_title(size, fontsize=9)
        axes.set_xlim(left=0.0)
        _polish(axes)
    for axes in panels[len(sizes) :]:
        axes.set_visible(False)
    figure.supxlabel("training FLOPs of this model itself", fontsize=10)
    figure.supylabel("validation bits per byte", fontsize=10)
    _legend_beside(figure, list(panels))
    return _png(figure) if any(axes.get_lines() for axes in panels) else None


def _draw_estimates(
    axes: Axes, x: Array, estimates: Sequence[Estimate], style: Style, label: str
) -> None:
    """Means over the seeds as a line, with their intervals."""
    means = [estimate.mean for estimate in estimates]
    look = {**style.marks, "markersize": 5, "linewidth": 1.5, "capsize": 2}
    margins = [estimate.margin for estimate in estimates if estimate.margin is not None]
    error = margins if len(margins) == len(means) else None
    axes.errorbar(x, means, yerr=error, linestyle=style.line, label=label, **look)


def cooled_branches(accounts: Sequence[SeriesAccount]) -> bytes:
    """Cooled loss over the share of the twin's steps, a panel a grown size.

    The twin's loss is the level; where the line comes down to it the share is marked.
    """
    sizes = list(dict.fromkeys(m.size for a in accounts for m in a.members if m.growth_factor))
    shares = sorted({
        s for a in accounts for m in a.members if m.growth_factor for s, _ in m.branches
    })  # fmt: skip
    columns = min(_COLUMNS, len(sizes))
    rows = math.ceil(len(sizes) / columns)
    figure = Figure(figsize=(2.2 + 2.6 * columns, 0.6 + 2.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    styles = styles_of([*(a.baseline for a in accounts), *(a.arm for a in accounts)])
    for axes, size in zip(panels, sizes, strict=False):
        levels: set[str] = set()
        found = [
            (member, account)
            for account in accounts
            for member in account.members
            if member.size == size and member.growth_factor
        ]
        equal = [_draw_member(axes, *pair, styles, levels) for pair in found]
        axes.set_title("\n".join([size, *filter(None, equal)]), fontsize=9)
        axes.margins(y=0.15)
        axes.set_xscale("log")  # on which the interpolation is a straight line
        axes.set_xlim(shares[0] / 1.1, shares[-1] * 1.1)  # also where all have diverged
        _polish(axes)
        own = sorted({share for member, _ in found for share, _ in member.branches})
        axes.set_xticks(own, [f"{share:.2g}" for share in own])
        axes.minorticks_off()
    for axes in panels[len(sizes) :]:
        axes.set_visible(False)
    figure.supxlabel("share of the twin's steps, cooled branch included (logarithmic)", fontsize=10)
    figure.supylabel("validation bits per byte", fontsize=10)
    _legend_beside(figure, list(panels))
    return _png(figure)


def _draw_member(
    axes: Axes,
    member: MemberAccount,
    account: SeriesAccount,
    styles: Mapping[str, Style],
    levels: set[str],
) -> str:
    """Draw a member's branches and its twin's level, and say where they are equal."""
    style = styles[account.arm]
    shares, losses = zip(*member.branches, strict=True)
    _draw_estimates(axes, np.array(shares), losses, style, style.label)
    if account.baseline not in levels:
        levels.add(account.baseline)
        twin = styles[account.baseline]
        label = f"twin ({twin.label}), at 1"
        axes.axhline(member.twin_loss.mean, color=twin.colour, linewidth=1.2, label=label)
        if member.twin_loss.interval is not None:
            axes.axhspan(*member.twin_loss.interval, color=twin.colour, alpha=0.1, linewidth=0)
    equal = member.equal_steps
    if equal is None:
        return ""
    if not equal.bound:
        axes.axvline(equal.value, color=style.colour, linestyle=":", linewidth=1.0)
    return f"{style.label}, equal: {Bounded(equal.value, equal.bound):.2f}"


def losses_by_size(records: Sequence[Record], comparisons: Sequence[Comparison]) -> bytes:
    """Left: mean bits per byte of each arm. Right: what each comparison found, with intervals."""
    arms = list(dict.fromkeys(r.arm for r in records))
    if len(arms) > _MANY_ARMS:
        arms = [arm for arm in arms if without_strengths(arm) == arm]
    styles = styles_of(list(dict.fromkeys(r.arm for r in records)))
    rows = [c for c in comparisons if c.arm in arms and math.isfinite(c.difference)]
    pairs = list(dict.fromkeys((c.arm, c.baseline) for c in rows))
    height = max(4.0, 1.2 + 0.3 * len(pairs))
    figure = Figure(figsize=(12.0 if rows else 8.0, height), layout="constrained")
    panels = figure.subplots(1, 2 if rows else 1, squeeze=False)
    left = panels[0][0]
    sizes = sizes_of(records)
    for arm in arms:
        seeds = dict.fromkeys(r.seed for r in records if r.arm == arm)
        series = [r for seed in seeds for r in chain(records, arm, seed)]
        own = [size for size in sizes if any(r.size == size for r in series)]
        found = [Estimate.of([r.val_bpb for r in series if r.size == size]) for size in own]
        places = np.array([sizes.index(size) for size in own], dtype=np.float64)
        places += 0.02 * (arms.index(arm) - (len(arms) - 1) / 2)  # so that no marks overlap
        _draw_estimates(left, places, found, styles[arm], drawn_word(arm))
    left.set_xticks(range(len(sizes)), sizes, rotation=45 if len(sizes) > _UPRIGHT else 0)
    left.set_xlabel("size")
    left.set_ylabel("validation bits per byte")
    _polish(left)
    if rows:
        _draw_differences(panels[0][1], rows, pairs, sizes, styles)
    _legend_beside(figure, [left])
    return _png(figure)


def _draw_differences(
    axes: Axes,
    rows: Sequence[Comparison],
    pairs: Sequence[tuple[str, str]],
    sizes: Sequence[str],
    styles: Mapping[str, Style],
) -> None:
    compared = [size for size in sizes if any(c.size == size for c in rows)]
    markers = "osD^vP<>Xhp"
    for c in rows:
        k = compared.index(c.size)
        place = pairs.index((c.arm, c.baseline)) + 0.5 * ((k + 0.5) / len(compared) - 0.5)
        error = None
        if c.interval is not None:
            error = [[c.difference - c.interval[0]], [c.interval[1] - c.difference]]
        look = {**styles[c.arm].marks, "marker": markers[k % len(markers)], "markersize": 5}
        axes.errorbar([c.difference], [place], xerr=error, capsize=2, linewidth=1.2, **look)
    for k, size in enumerate(compared):
        axes.plot([], [], markers[k % len(markers)], color="#555555", label=size)
    axes.axvline(0.0, color="#000000", linewidth=0.9)
    words = [f"{drawn_word(arm)} − {drawn_word(baseline)}" for arm, baseline in pairs]
    axes.set_yticks(range(len(pairs)), words, fontsize=8)
    axes.invert_yaxis()
    if all(c.interval is None for c in rows):
        words_of_seeds = "one seed, so no intervals"
    else:
        largest = max(abs(c.difference) for c in rows)
        ends = [min(abs(e), 3 * largest) for c in rows for e in c.interval or ()]
        reach = 1.3 * max(largest, *ends)
        low, high = axes.get_xlim()
        axes.set_xlim(max(low, -reach), min(high, reach))  # two seeds make intervals without end
        words_of_seeds = "95 % intervals over the seeds"
    axes.set_xlabel(f"bits per byte (left is better; {words_of_seeds})", fontsize=9)
    _polish(axes)
    axes.legend(**_ABOVE, fontsize=8, ncols=6)


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
    """Left: where the operations of each arm's series went. Right: seconds and loss."""
    arms = list(dict.fromkeys(c.arm for c in found))
    styles = styles_of(arms)
    height = max(4.0, 1.2 + 0.28 * len(arms))
    figure = Figure(figsize=(13.0, height), layout="constrained")
    left, right = figure.subplots(1, 2)
    first = {arm: next(c.seed for c in found if c.arm == arm) for arm in arms}
    series = {arm: [c for c in found if (c.arm, c.seed) == (arm, first[arm])] for arm in arms}
    base = np.zeros(len(arms))
    kinds: tuple[tuple[str, str, Callable[[ModelCost], int]], ...] = (
        ("training", "#0072B2", lambda c: c.training_flops - (c.overhead_flops or 0)),
        ("what the arm adds to its steps", "#D55E00", lambda c: c.overhead_flops or 0),
        ("Fisher pass", "#E69F00", lambda c: c.fisher_flops),
        ("growing", "#CC79A7", lambda c: c.growth_flops),
    )
    for label, colour, share in kinds:
        values = np.array([sum(map(share, series[arm])) for arm in arms], dtype=np.float64)
        left.barh([drawn_word(arm) for arm in arms], values, left=base, color=colour, label=label)
        base += values
    left.invert_yaxis()
    left.tick_params(axis="y", labelsize=8)
    left.set_xlim(0, 1.02 * base.max())
    seed = found[0].seed
    left.set_xlabel(f"FLOPs of the series (seed {seed})")
    left.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    _polish(left)
    bpb = {(r.name, r.seed): r.val_bpb for r in records}
    for arm in arms:
        style = styles[arm]
        for k, seed in enumerate(dict.fromkeys(c.seed for c in found if c.arm == arm)):
            models = [c for c in found if (c.arm, c.seed) == (arm, seed)]
            seconds = [c.cumulative_seconds for c in models]
            losses = [bpb.get((c.name, c.seed), math.nan) for c in models]
            look = {**style.marks, "markersize": 4, "linewidth": 1.0}
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

    Of the first seed; a series goes through its sizes one after the other.
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


def pulls(records: Sequence[Record]) -> bytes | None:
    """How hard a penalty pulls at each layer while a model trains; ``None`` without any.

    Of the largest model of each arm, of its first seed; arms with strengths of their own are left
    out.
    """
    largest: dict[str, Record] = {}
    for record in records:
        if any(map(sum, _norms(record))) and without_strengths(record.arm) == record.arm:
            kept = largest.setdefault(record.arm, record)
            if record.seed == kept.seed and record.params > kept.params:
                largest[record.arm] = record
    if not largest:
        return None
    columns = min(_COLUMNS, len(largest))
    rows = math.ceil(len(largest) / columns)
    height = max(len(_norms(record)) for record in largest.values())
    size = (2.2 + 2.6 * columns, rows * (1.0 + 0.22 * height))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (arm, record) in zip(panels, largest.items(), strict=False):
        norms = np.array(_norms(record))
        scale = LogNorm(norms.max() / _DECADES, norms.max())
        layers = [drawn_word(name) for name in record.pulls if name != "step"]
        edges = (0.0, *record.pulls["step"])
        shown = np.ma.masked_equal(norms, 0.0)
        mesh = axes.pcolormesh(edges, range(len(layers) + 1), shown, norm=scale, cmap="cividis")
        axes.set_yticks(np.arange(len(layers)) + 0.5, layers, fontsize=8)
        axes.invert_yaxis()
        axes.set_title(f"{drawn_word(arm)}, {record.size}", fontsize=9)
        figure.colorbar(mesh, ax=axes).ax.tick_params(labelsize=7)
    for axes in panels[len(largest) :]:
        axes.set_visible(False)
    figure.supxlabel("step", fontsize=10)
    return _png(figure)


def _norms(record: Record) -> list[tuple[float, ...]]:
    return [values for name, values in record.pulls.items() if name != "step"]


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
