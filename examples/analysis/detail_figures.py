"""The figures beside the comparison: laws, costs, gates, strengths and learning rates, as PNGs."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from analysis.cost import ModelCost
from analysis.grid import Grid
from analysis.laws import ChinchillaLaw, ComputeLaw
from analysis.pairings import is_sweep
from analysis.records import Log, Record, chain
from analysis.series_laws import ArmLaws
from analysis.style import legend_beside, png, polish, styles_of
from analysis.sweeps import Sweep

__all__ = ["costs", "gates", "grid_map", "scaling", "sweep_curves"]

Logs = Mapping[tuple[str, int], Log]

_CURVE_POINTS = 150  # of a log that has more steps, means of groups are drawn
_EXTRAPOLATION = 10.0  # how far beyond the largest budget a law is drawn
_DECADES = 1e6  # of the penalty's share that are shown
_CLIP = 3.0  # colours of the grid end at so many times the median difference


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
        label = arm.arm
        if isinstance(arm.compute, ComputeLaw):
            label += f": {arm.compute.E:.3g} + K C^-{arm.compute.gamma:.3f}"
            inside = np.geomspace(flops.min(), flops.max(), 100)
            beyond = np.geomspace(flops.max(), flops.max() * _EXTRAPOLATION, 30)
            for x, line, alpha in ((inside, style.line, 1.0), (beyond, style.line, 0.4)):
                y = arm.compute.predict(x)
                axes.plot(x, y, line, color=style.colour, linewidth=1.2, alpha=alpha)
        axes.plot(
            flops, losses, style.marker, color=style.colour, markerfacecolor=style.face,
            markersize=5, label=label,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("C, training FLOPs of the whole lineage")
    axes.set_ylabel("validation bits per byte")
    polish(axes)
    for arm in fitted:
        assert isinstance(arm.chinchilla, ChinchillaLaw)
        style = styles[arm.arm]
        measured = np.array([r.val_bpb for r in arm.models])
        predicted = arm.chinchilla.predict(
            [r.params for r in arm.models], [r.tokens for r in arm.models]
        )
        panels[1].plot(measured, predicted, style.marker, color=style.colour, markersize=5)
        ends = [measured.min(), measured.max()]
        panels[1].plot(ends, ends, color="#888888", linewidth=0.8, zorder=0)
    if fitted:
        panels[1].set_xlabel("measured bits per byte")
        panels[1].set_ylabel("E + A/N^alpha + B/D^beta")
        polish(panels[1])
    legend_beside(figure, panels)
    return png(figure)


def costs(found: Sequence[ModelCost], records: Sequence[Record]) -> bytes:
    """Left: where the operations of each arm's deepest lineage went. Right: seconds and loss."""
    arms = list(dict.fromkeys(c.arm for c in found))
    styles = styles_of(arms)
    height = max(4.0, 1.2 + 0.28 * len(arms))
    figure = Figure(figsize=(13.0, height), layout="constrained")
    left, right = figure.subplots(1, 2)
    base = np.zeros(len(arms))
    for key, colour, label in (
        ("parents", "#56B4E9", "parents' trunks"),
        ("training", "#0072B2", "own training"),
        ("overhead", "#D55E00", "what the arm adds to its steps"),
        ("fisher", "#E69F00", "Fisher pass"),
        ("growth", "#CC79A7", "growing"),
    ):
        values = np.array([_shares(arm, found)[key] for arm in arms])
        left.barh(arms, values, left=base, color=colour, label=label)
        base += values
    left.invert_yaxis()
    left.tick_params(axis="y", labelsize=8)
    left.set_xlim(0, 1.02 * base.max())
    seed = found[0].seed
    left.set_xlabel(f"FLOPs of the lineage of the deepest model (seed {seed})")
    left.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    polish(left)
    bpb = {(r.name, r.seed): r.val_bpb for r in records}
    for arm in arms:
        style = styles[arm]
        for k, seed in enumerate(dict.fromkeys(c.seed for c in found if c.arm == arm)):
            series = [c for c in found if (c.arm, c.seed) == (arm, seed)]
            right.plot(
                [c.cumulative_seconds for c in series],
                [bpb.get((c.name, c.seed), math.nan) for c in series],
                style.line,
                color=style.colour,
                marker=style.marker,
                markerfacecolor=style.face,
                markersize=4,
                linewidth=0 if is_sweep([r for r in records if r.arm == arm]) else 1.0,
                label=None if k else style.label,
            )
    right.set_xscale("log")
    right.set_xlabel("seconds of the series so far")
    right.set_ylabel("validation bits per byte")
    polish(right)
    legend_beside(figure, [right])
    return png(figure)


def _shares(arm: str, found: Sequence[ModelCost]) -> dict[str, float]:
    """Operations by kind in the lineage of an arm's deepest model, of its first seed."""
    last = [c for c in found if c.arm == arm and c.seed == next(
        c.seed for c in found if c.arm == arm)][-1]  # fmt: skip
    overhead = last.overhead_flops or 0
    return {
        "parents": float(last.lineage_flops - last.flops),
        "training": float(last.training_flops - overhead),
        "overhead": float(overhead),
        "fisher": float(last.fisher_flops),
        "growth": float(last.growth_flops),
    }


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
    drawn = 0
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
                    drawn += 1
                    axes.plot(*_thinned(points), style.line, color=style.colour, linewidth=1.0,
                              label=style.label)  # fmt: skip
        axes.set_xlabel("tokens of the lineage")
        axes.set_title(title, fontsize=10)
        polish(axes)
    for axes in shown[:2]:
        axes.set_ylim(0.0, 1.05)
    heights = [float(np.max(np.asarray(line.get_ydata()))) for line in shown[2].get_lines()]
    if heights and max(heights) > 0:
        shown[2].set_yscale("log")
        shown[2].set_ylim(max(heights) / _DECADES, 2 * max(heights))
    legend_beside(figure, shown)
    return png(figure) if drawn else None


def _penalty_share(row: Mapping[str, Any]) -> float | None:
    return row["penalty"] / row["loss"] if row["penalty"] and row["loss"] else None


def _thinned(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    size = max(1, len(points) // _CURVE_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [g[-1][0] for g in groups], [sum(v for _, v in g) / len(g) for g in groups]


def grid_map(grid: Grid) -> bytes:
    """The difference to plain growing over lambda and gamma; the proposal's pairs are framed."""
    rows = sorted({cell.ewc for cell in grid.cells} | {None}, key=lambda v: (v is not None, v or 0))
    columns = sorted(
        {cell.subspace for cell in grid.cells} | {None}, key=lambda v: (v is not None, v or 0)
    )
    values = np.full((len(rows), len(columns)), np.nan)
    figsize = (3.4 + 1.05 * len(columns), 1.8 + 0.6 * len(rows))
    figure = Figure(figsize=figsize, layout="constrained")
    axes = figure.subplots()
    found = {(cell.ewc, cell.subspace): cell for cell in grid.cells}
    size = np.array([abs(cell.difference.mean) for cell in grid.ranked] or [0.0])
    limit = float(min(size.max(), _CLIP * np.median(size))) or 1e-9
    for i, ewc in enumerate(rows):
        for j, subspace in enumerate(columns):
            cell = found.get((ewc, subspace))
            if cell is None:
                text = "plain growing\n0" if ewc is None and subspace is None else ""
                values[i, j] = 0.0 if text else np.nan
                axes.text(j, i, text, ha="center", va="center", fontsize=7.5)
                continue
            if cell.diverged:
                axes.text(j, i, "diverged", ha="center", va="center", fontsize=8.5)
                continue
            values[i, j] = cell.difference.mean
            dark = abs(cell.difference.mean) > 0.65 * limit
            margin = cell.difference.margin
            text = f"{cell.difference.mean:+.4f}" + ("" if margin is None else f"\n± {margin:.4f}")
            axes.text(j, i, text, ha="center", va="center", fontsize=8.5,
                      color="white" if dark else "black")  # fmt: skip
            if cell.proposed:
                corner = (j - 0.47, i - 0.47)
                axes.add_patch(Rectangle(corner, 0.94, 0.94, fill=False, linewidth=2.2))
    image = axes.imshow(values, cmap="RdBu_r", norm=TwoSlopeNorm(0.0, -limit, limit), aspect="auto")
    axes.set_xticks(range(len(columns)), ["none" if v is None else f"{v:g}" for v in columns])
    axes.set_yticks(range(len(rows)), ["none" if v is None else f"{v:g}" for v in rows])
    axes.set_xlabel("gamma, strength of the subspace penalty")
    axes.set_ylabel("lambda, strength of EWC")
    seeds = f"{grid.seeds} seed{'s' if grid.seeds > 1 else ''}"
    interval = "mean and 95 % interval of " if grid.seeds > 1 else ""
    axes.set_title(
        f"d{grid.parent_depth} grown to d{grid.depth}: bits per byte minus plain growing's\n"
        f"({interval}{seeds}; blue is better; framed: the proposal's pairs)",
        fontsize=9.5,
    )
    figure.colorbar(image, extend="both" if size.max() > limit else "neither", shrink=0.9)
    return png(figure)


def sweep_curves(sweeps: Sequence[Sweep]) -> bytes:
    """The loss over the values of each setting, a panel a setting, a line a depth."""
    settings = list(dict.fromkeys(s.setting for s in sweeps))
    figure = Figure(figsize=(1.0 + 3.6 * len(settings), 3.6), layout="constrained")
    panels = figure.subplots(1, len(settings), squeeze=False)[0]
    depths = sorted({s.depth for s in sweeps})
    shades = np.linspace(0.55, 0.0, len(depths))
    for axes, setting in zip(panels, settings, strict=True):
        for sweep in (s for s in sweeps if s.setting == setting):
            colour = str(shades[depths.index(sweep.depth)])
            losses = [loss.mean for loss in sweep.losses]
            points = [pair for pair in zip(sweep.values, losses, strict=True) if pair[0] > 0]
            axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, linewidth=1.2,
                      label=f"d{sweep.depth}")  # fmt: skip
            if sweep.best > 0:
                axes.plot([sweep.best], [min(losses)], "o", color="#D55E00", markersize=8, zorder=3)
            if sweep.values[0] == 0:  # which has no place on this axis
                axes.axhline(losses[0], color=colour, linestyle=":", linewidth=1.2)
                axes.annotate("without", (1.0, losses[0]), xycoords=("axes fraction", "data"),
                              ha="right", va="bottom", fontsize=8)  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlabel(setting)
        polish(axes)
    panels[0].set_ylabel("validation bits per byte")
    legend_beside(figure, list(panels))
    return png(figure)
