"""The figures of the report, each a PNG in memory."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.cost import ModelCost
from analysis.laws import ChinchillaLaw, ComputeLaw
from analysis.records import Log, Record, chain
from analysis.series_laws import ArmLaws
from analysis.verdict import is_sweep, mean_interval

__all__ = ["bpb_against_depth", "costs", "gates", "loss_against_flops", "scaling"]

Logs = Mapping[tuple[str, int], Log]

# Okabe and Ito's colours, which colour-blind readers can tell apart; the baseline is black.
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_CURVE_POINTS = 150  # of a log that has more steps, means of groups are drawn
_EXTRAPOLATION = 10.0  # how far beyond the largest budget a law is drawn


def loss_against_flops(records: Sequence[Record], logs: Logs) -> bytes:
    """Validation loss over the operations of the lineage: finished models and, thin, their way."""
    figure, axes = _axes()
    for i, arm in enumerate(_arms(records)):
        own = [r for r in records if r.arm == arm]
        for record in own:
            rows = logs.get((record.name, record.seed), [])
            points = [(r["flops"], r["val_bpb"]) for r in rows if r["val_bpb"] and r["flops"]]
            if points:
                axes.plot(*zip(*points, strict=True), color=_colour(i), linewidth=0.7, alpha=0.45)
        for k, seed in enumerate(dict.fromkeys(r.seed for r in own)):
            series = sorted(chain(records, arm, seed), key=lambda r: r.lineage_flops)
            axes.plot(
                [r.lineage_flops for r in series],
                [r.val_bpb for r in series],
                color=_colour(i),
                marker=_marker(i),
                markersize=6,
                linewidth=0 if is_sweep(own) else 1.6,
                zorder=3 - 0.1 * i,  # where a series begins with a model of the first arm, its mark
                label=None if k else arm,
            )
        _name_models(axes, own, i)
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs of the whole lineage")
    axes.set_ylabel("validation bits per byte")
    return _png(figure, axes)


def bpb_against_depth(records: Sequence[Record]) -> bytes:
    """Mean bits per byte and its 95 % interval over the seeds, of the arms that are no sweeps."""
    figure, axes = _axes()
    arms = _arms(records)
    for i, arm in enumerate(arms):
        if is_sweep([r for r in records if r.arm == arm]):
            continue
        seeds = dict.fromkeys(r.seed for r in records if r.arm == arm)
        series = [r for seed in seeds for r in chain(records, arm, seed)]
        depths = sorted({r.depth for r in series})
        found = [mean_interval([r.val_bpb for r in series if r.depth == d]) for d in depths]
        axes.errorbar(
            np.array(depths) + 0.02 * (i - (len(arms) - 1) / 2),  # so that intervals do not overlap
            [mean for mean, _ in found],
            yerr=[0.0 if pair is None else pair[1] - mean for mean, pair in found],
            color=_colour(i),
            marker=_marker(i),
            capsize=3 if len(seeds) > 1 else 0,
            linewidth=1.6,
            zorder=3 - 0.1 * i,
            label=arm,
        )
    axes.set_xticks(sorted({r.depth for r in records}))
    axes.set_xlabel("depth (layers; width 64 x depth)")
    axes.set_ylabel("validation bits per byte")
    return _png(figure, axes)


def scaling(laws: Sequence[ArmLaws]) -> bytes:
    """Left: the loss over compute with L(C). Right, where L(N, D) was fitted: fit over measured."""
    fitted = [a for a in laws if isinstance(a.chinchilla, ChinchillaLaw)]
    figure = Figure(figsize=(11.0 if fitted else 7.0, 4.5), layout="constrained")
    panels = figure.subplots(1, 2 if fitted else 1, squeeze=False)[0]
    axes = panels[0]
    for i, arm in enumerate(laws):
        flops = np.array([r.lineage_flops for r in arm.models], dtype=np.float64)
        losses = [r.val_bpb for r in arm.models]
        label = arm.arm
        if isinstance(arm.compute, ComputeLaw):
            label += f": {arm.compute.E:.3g} + K C^-{arm.compute.gamma:.3f}"
            inside = np.geomspace(flops.min(), flops.max(), 100)
            beyond = np.geomspace(flops.max(), flops.max() * _EXTRAPOLATION, 30)
            axes.plot(inside, arm.compute.predict(inside), color=_colour(i), linewidth=1.4)
            axes.plot(beyond, arm.compute.predict(beyond), ":", color=_colour(i), linewidth=1.4)
        axes.plot(flops, losses, _marker(i), color=_colour(i), markersize=6, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("C, training FLOPs of the whole lineage")
    axes.set_ylabel("validation bits per byte")
    _style(axes)
    for i, arm in enumerate(laws):
        if isinstance(arm.chinchilla, ChinchillaLaw):
            measured = np.array([r.val_bpb for r in arm.models])
            predicted = arm.chinchilla.predict(
                [r.params for r in arm.models], [r.tokens for r in arm.models]
            )
            panels[1].plot(
                measured, predicted, _marker(i), color=_colour(i), markersize=5, label=arm.arm
            )
            ends = [measured.min(), measured.max()]
            panels[1].plot(ends, ends, color="#888888", linewidth=0.8, zorder=0)
    if fitted:
        panels[1].set_xlabel("measured bits per byte")
        panels[1].set_ylabel("E + A/N^alpha + B/D^beta")
        _style(panels[1])
    return _png(figure)


def costs(found: Sequence[ModelCost], records: Sequence[Record]) -> bytes:
    """Left: operations of each model by kind. Right: what was reached for how much time."""
    figure = Figure(figsize=(11.0, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    models = list({(c.name, c.seed): c for c in found}.values())
    first_seed = [c for c in models if c.seed == models[0].seed]
    names = [c.name for c in first_seed]
    base = np.zeros(len(names))
    for key, colour, label in (
        ("training_flops", "#0072B2", "training"),
        ("fisher_flops", "#E69F00", "Fisher pass on the parent"),
        ("growth_flops", "#CC79A7", "growing"),
    ):
        values = np.array([getattr(c, key) for c in first_seed], dtype=np.float64)
        left.barh(names, values, left=base, color=colour, label=label)
        base += values
    left.invert_yaxis()
    left.set_xlim(0, 1.05 * base.max())
    left.set_axisbelow(True)
    left.set_xlabel(f"FLOPs of the model itself (seed {models[0].seed})")
    _style(left)
    bpb = {(r.name, r.seed): r.val_bpb for r in records}
    for i, arm in enumerate(_arms(records)):
        for k, seed in enumerate(dict.fromkeys(c.seed for c in found if c.arm == arm)):
            series = [c for c in found if (c.arm, c.seed) == (arm, seed)]
            right.plot(
                [c.cumulative_seconds for c in series],
                [bpb[c.name, c.seed] for c in series],
                color=_colour(i),
                marker=_marker(i),
                linewidth=0 if is_sweep([r for r in records if r.arm == arm]) else 1.6,
                label=arm if k == 0 else None,
            )
    right.set_xscale("log")
    right.set_xlabel("seconds of the series so far")
    right.set_ylabel("validation bits per byte")
    _style(right)
    return _png(figure)


def gates(logs: Logs, records: Sequence[Record]) -> bytes | None:
    """Phi, psi and the penalty over the steps, from the logs; ``None`` without any."""
    shown = [r for r in records if (r.name, r.seed) in logs and r.seed == records[0].seed]
    panels = (
        ("phi", "phi (1: nothing damped)", lambda r: r["phi"]),
        ("psi", "psi (1: no surprise)", lambda r: r["psi"]),
        ("penalty", "penalty / task loss", _penalty_share),
    )
    figure = Figure(figsize=(11.0, 3.6), layout="constrained")
    drawn = 0
    for axes, (_, title, value) in zip(figure.subplots(1, 3), panels, strict=True):
        for i, record in enumerate(shown):
            rows = [row for row in logs[record.name, record.seed] if row["loss"] is not None]
            points = [(row["step"], v) for row in rows if (v := value(row)) is not None]
            if points:
                drawn += 1
                axes.plot(*_thinned(points), color=_colour(i), linewidth=1.1, label=record.name)
        axes.set_xlabel("step")
        axes.set_title(title, fontsize=10)
        _style(axes)
    return _png(figure) if drawn else None


def _penalty_share(row: Mapping[str, Any]) -> float | None:
    return None if row["penalty"] is None or not row["loss"] else row["penalty"] / row["loss"]


def _thinned(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    size = max(1, len(points) // _CURVE_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [g[-1][0] for g in groups], [sum(v for _, v in g) / len(g) for g in groups]


def _arms(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record.arm for record in records))


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _marker(index: int) -> str:
    return _MARKERS[index % len(_MARKERS)]


def _name_models(axes: Axes, models: Sequence[Record], index: int) -> None:
    for record in {r.depth: r for r in models}.values():
        axes.annotate(
            f"d{record.depth}",
            (record.lineage_flops, record.val_bpb),
            xytext=(6, 6) if index == 0 else (-6, -11),
            ha="left" if index == 0 else "right",
            textcoords="offset points",
            fontsize=8,
            color=_colour(index),
        )


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    return figure, figure.subplots()


def _style(axes: Axes) -> None:
    axes.grid(visible=True, which="both", linewidth=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def _png(figure: Figure, axes: Axes | None = None) -> bytes:
    if axes is not None:
        _style(axes)
    content = io.BytesIO()
    # Without the name of the program in it, equal figures are equal files.
    figure.savefig(content, format="png", dpi=130, metadata={"Software": None})
    return content.getvalue()
