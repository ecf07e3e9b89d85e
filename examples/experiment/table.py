"""The experiment's results as a text in GitHub's markdown."""

import math
from collections.abc import Iterable, Sequence

from analysis.comparisons import QUESTIONS, headlines, single_arms
from analysis.run_report import Analysis
from analysis.sweeps import Grid, Sweep, strength_word
from common.statistics import Estimate
from common.tables import markdown
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
        parts += ["## The proposal's claims", markdown([("claim", "verdict", "numbers"), *rows])]
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
    rows = [("depth", "arm", "seeds", "bits per byte", "FLOPs", "tokens", "seconds")]
    for depth in sorted({r.depth for r in records}):
        for arm in single_arms(records):
            own = [r for r in records if (r.depth, r.arm) == (depth, arm)]
            if not own:
                continue
            flops = sum(r.lineage_flops for r in own) / len(own)
            tokens = [r.lineage_tokens for r in own if r.lineage_tokens is not None]
            rows.append((
                f"d{depth}", arm, str(len(own)),
                Estimate.of([r.val_bpb for r in own]).plus_minus(".4f"),
                f"{flops:.3e}", f"{sum(tokens) / len(tokens):,.0f}" if tokens else "",
                f"{sum(r.seconds for r in own) / len(own):.0f}",
            ))  # fmt: skip
    return markdown(rows)


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
    return markdown([header, *rows])


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
    return markdown([header, *rows])


def _sizes(sizes: Sequence[SizeRow]) -> str:
    rows = [
        (
            f"d{row.depth}",
            str(len(row.bits.values)),
            row.bits.plus_minus(".4f") + (f", {row.diverged} diverged" if row.diverged else ""),
            "" if row.grown is None else row.grown.plus_minus("+.4f"),
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
    return f"{markdown([header, *rows])}\n\n{note}"


def _grid(grid: Grid) -> str:
    rows = []
    for ewc in grid.lambdas:
        cells = []
        for subspace in grid.gammas:
            cell = grid.at(ewc, subspace)
            if cell is None:
                cells.append("0" if ewc is subspace is None else "")
                continue
            text = "diverged" if cell.diverged else cell.difference.plus_minus("+.4f")
            mean, *margin = text.split(" ", 1)
            cells.append(" ".join([f"**{mean}**" if cell.proposed else mean, *margin]))
        rows.append((strength_word(ewc), *cells))
    header = ("lambda \\ gamma", *map(strength_word, grid.gammas))
    return (
        f"{markdown([header, *rows])}\n\nBits per byte minus those of plain growing "
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
    return markdown([header, *rows])


def _ratio(value: Estimate | None, *, is_bound: bool = False) -> str:
    return "–" if value is None else f"{'≤ ' if is_bound else ''}{value:.2f}"
