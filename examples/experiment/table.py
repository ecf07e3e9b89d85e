"""The experiment's results as a text in GitHub's markdown."""

import math
from collections.abc import Iterable, Sequence

from analysis.assemble import Analysis
from analysis.grid import Grid
from analysis.intervals import Estimate
from analysis.pairings import QUESTIONS, single_arms
from analysis.sweeps import Sweep
from analysis.verdict import headlines
from experiment.sizes import SizeRow, sentence_of

__all__ = ["results_table"]


def results_table(
    analysis: Analysis | None,
    sizes: Sequence[SizeRow],
    grid: Grid | None,
    sweeps: Sequence[Sweep],
    unfinished: Sequence[str],
    left_out: Sequence[str],
) -> str:
    """What was found, the most important first.

    Args:
        analysis: of the arms; ``None`` if none was trained yet.
        sizes: models of other sizes with the operations of the largest.
        grid: of the strengths, if there is one.
        sweeps: settings that were tuned.
        unfinished: series whose models are not all there, in words.
        left_out: series that lie there and are none of the experiment's.
    """
    parts: list[str] = []
    if unfinished:
        parts += [f"Not finished: {', '.join(unfinished)}."]
    if left_out:
        parts += [f"Left out, since this design has no such series: {', '.join(left_out)}."]
    first = [sentence_of(sizes)] if sizes else []
    if analysis is not None:
        lines = [*first, *headlines(analysis.comparisons)]
        parts += ["\n".join(f"- {line}" for line in lines)]
        rows = [(claim.claim, claim.verdict, claim.evidence) for claim in analysis.claims]
        parts += ["## The proposal's claims", _table(("claim", "verdict", "numbers"), rows)]
        parts += ["## Arms", _arms(analysis), _ARMS_NOTE]
        parts += ["## Comparisons, paired by seed", _comparisons(analysis), _COMPARISONS_NOTE]
        parts += ["## Cost of scratch's final loss, over scratch's cost", _savings(analysis),
                  _SAVINGS_NOTE]  # fmt: skip
    if sizes:
        parts += ["## The largest model's operations, for one model from scratch", _sizes(sizes)]
    if grid is not None:
        parts += [f"## Strengths, d{grid.parent_depth} grown to d{grid.depth}", grid.sentence]
        parts += [_grid(grid)]
    if sweeps:
        parts += ["## Tuning", _sweeps(sweeps)]
    if analysis is not None and analysis.warnings:
        lines = [f"- {name}, seed {seed}: {text}" for name, seed, text in analysis.warnings]
        parts += ["## Warnings", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


_ARMS_NOTE = (
    "Bits per byte: mean over the seeds and 95 % t interval. FLOPs and tokens are those of the "
    "whole lineage, in the mean."
)
_COMPARISONS_NOTE = (
    "Bits per byte of the arm minus those of what it is held against; negative is better for the "
    "arm. 95 % t intervals; fewer than 3 seeds conclude nothing."
)
_SAVINGS_NOTE = (
    "Below 1 is cheaper. The arm is not cooled on the way to the final loss, so the first columns "
    "are upper bounds; trunk against trunk, both are uncooled. e: fresh tokens that an inherited "
    "one was worth."
)


def _arms(analysis: Analysis) -> str:
    records = analysis.healthy
    rows = []
    for depth in sorted({r.depth for r in records}):
        for arm in single_arms(records):
            own = [r for r in records if (r.depth, r.arm) == (depth, arm)]
            if not own:
                continue
            flops = sum(r.lineage_flops for r in own) / len(own)
            tokens = [r.lineage_tokens for r in own if r.lineage_tokens is not None]
            rows.append((
                f"d{depth}", arm, str(len(own)), _bits(Estimate.of([r.val_bpb for r in own])),
                f"{flops:.3e}", f"{sum(tokens) / len(tokens):,.0f}" if tokens else "",
                f"{sum(r.seconds for r in own) / len(own):.0f}",
            ))  # fmt: skip
    return _table(("depth", "arm", "seeds", "bits per byte", "FLOPs", "tokens", "seconds"), rows)


def _comparisons(analysis: Analysis) -> str:
    order = list(QUESTIONS)
    rows = [
        (
            c.arm,
            c.baseline,
            f"d{c.depth}",
            str(c.seeds),
            f"{c.difference:+.4f}" if math.isfinite(c.difference) else "",
            "" if c.interval is None else f"[{c.interval[0]:+.4f}, {c.interval[1]:+.4f}]",
            f"{c.flops_ratio:.3f}",
            c.conclusion,
        )
        for c in sorted(analysis.comparisons, key=lambda c: order.index(c.question))
    ]
    header = ("arm", "against", "depth", "seeds", "difference", "interval", "FLOPs ratio",
              "conclusion")  # fmt: skip
    return _table(header, rows)


def _savings(analysis: Analysis) -> str:
    rows = []
    for s in analysis.savings:
        final = s.final
        costs = (
            (None, None, None, None)
            if final is None
            else (final.with_parents, final.without_parents, final.tokens_with_parents,
                  final.tokens_without_parents)
        )  # fmt: skip
        trunk = None if s.trunk is None else s.trunk.with_parents
        cells = [
            *(_ratio(value, is_bound=final is not None and final.is_bound) for value in costs),
            _ratio(trunk, is_bound=s.trunk is not None and s.trunk.is_bound),
            _ratio(s.efficiency),
        ]
        rows.append((s.arm, f"d{s.depth}", f"{s.reached} of {s.seeds}", *cells))
    header = ("arm", "depth", "reached", "FLOPs", "without parents", "tokens", "without parents",
              "FLOPs, trunks", "e")  # fmt: skip
    return _table(header, rows)


def _sizes(sizes: Sequence[SizeRow]) -> str:
    rows = [
        (
            f"d{row.depth}",
            str(len(row.bits.values)),
            _bits(row.bits) + (f", {row.diverged} diverged" if row.diverged else ""),
            "" if row.grown is None else f"{row.grown.mean:+.4f}{_spread(row.grown)}",
            f"{row.flops:.3e}",
            f"{row.tokens:,.0f}",
        )
        for row in sizes
    ]
    largest = f"d{sizes[-1].depth} grown"
    header = ("depth", "seeds", "bits per byte", f"{largest} minus this", "FLOPs", "tokens")
    note = f"Negative: {largest} is better than this size from scratch."
    if sizes[0].grown_diverged:
        note += f" {sizes[0].grown_diverged} models of {largest} diverged and are not in it."
    return f"{_table(header, rows)}\n\n{note}"


def _grid(grid: Grid) -> str:
    columns = sorted({c.subspace for c in grid.cells} | {None}, key=lambda v: (v is not None, v))
    found = {(c.ewc, c.subspace): c for c in grid.cells}
    rows = []
    for ewc in sorted({c.ewc for c in grid.cells} | {None}, key=lambda v: (v is not None, v)):
        cells = []
        for subspace in columns:
            cell = found.get((ewc, subspace))
            if cell is None:
                cells.append("0" if ewc is None and subspace is None else "")
            else:
                mark = "**" if cell.proposed else ""
                value = f"{cell.difference.mean:+.4f}{mark}{_spread(cell.difference)}"
                cells.append(mark + ("diverged" + mark if cell.diverged else value))
        rows.append((_strength(ewc), *cells))
    header = ("lambda \\ gamma", *(_strength(v) for v in columns))
    return (
        f"{_table(header, rows)}\n\nBits per byte minus those of plain growing "
        f"({grid.baseline:.4f}), paired, mean of {grid.seeds} seeds and 95 % t interval; bold: the "
        "proposal's pairs."
    )


def _sweeps(sweeps: Iterable[Sweep]) -> str:
    rows = [
        (
            s.setting,
            f"d{s.depth}",
            ", ".join(
                f"{v:g}: {loss.mean:.4f}" for v, loss in zip(s.values, s.losses, strict=True)
            ),
            f"{s.best:g}",
            "no, at the edge" if s.at_edge else "yes",
        )
        for s in sweeps
    ]
    header = ("setting", "depth", "bits per byte", "best", "inside the values tried")
    return _table(header, rows)


def _strength(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


def _bits(value: Estimate) -> str:
    return f"{value.mean:.4f}" + _spread(value)


def _spread(value: Estimate) -> str:
    return "" if value.margin is None else f" ± {value.margin:.4f}"


def _ratio(value: Estimate | None, *, is_bound: bool = False) -> str:
    if value is None:
        return "–"
    bound = "≤ " if is_bound else ""
    if value.interval is None:
        return f"{bound}{value.mean:.2f}"
    return f"{bound}{value.mean:.2f} [{value.interval[0]:.2f}, {value.interval[1]:.2f}]"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
