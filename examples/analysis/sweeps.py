"""Settings that were tried: one setting over its values, and the penalties' strengths on a grid.

A sweep says where the loss is least, and whether that lies inside the values. The grid of the two
penalties' strengths is held against growing without any.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from analysis.comparisons import count_seeds, read_arm
from analysis.records import Record
from common.statistics import MIN_SEEDS, Estimate
from trainer.arms import Arm

__all__ = ["PROPOSED", "Cell", "Grid", "Sweep", "find_grid", "strength_word"]

# The proposal's pairs of lambda and gamma.
PROPOSED = ((0.5, 0.05), (1.0, 0.1), (2.0, 0.2))
_PENALTIES = {"ewc", "subspace"}
_FEWEST_CELLS = 2


@dataclass(frozen=True)
class Sweep:
    """One setting at one depth.

    Args:
        setting: what was varied, such as "AdamW learning rate".
        depth: of the models.
        values: tried, ascending.
        losses: bits per byte at each, over the seeds.
    """

    setting: str
    depth: int
    values: tuple[float, ...]
    losses: tuple[Estimate, ...]

    @classmethod
    def of(cls, setting: str, depth: int, found: Mapping[float, Sequence[float]]) -> "Sweep":
        """The sweep from the bits per byte of every seed at each value."""
        values = tuple(sorted(found))
        return cls(setting, depth, values, tuple(Estimate.of(found[v]) for v in values))

    @property
    def best(self) -> float:
        """The value of the least mean loss."""
        return min(zip(self.losses, self.values, strict=True), key=lambda pair: pair[0].mean)[1]

    @property
    def at_edge(self) -> bool:
        """Whether the best is the first or last value, so that a better one may lie beyond.

        Nothing lies beyond 0, which is to do without.
        """
        return self.best != 0 and self.best in (self.values[0], self.values[-1])

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps."""
        return {
            "setting": self.setting,
            "depth": self.depth,
            "values": list(self.values),
            "val_bpb": [loss.mean for loss in self.losses],
            "seeds": len(self.losses[0].values),
            "best": self.best,
            "at_edge": self.at_edge,
        }


@dataclass(frozen=True)
class Cell:
    """One pair of strengths.

    Args:
        ewc: lambda; ``None`` without that penalty.
        subspace: gamma; ``None`` without that penalty.
        difference: bits per byte minus those of plain growing, paired by seed; negative is better.
            No number if either diverged in some seed.
        proposed: whether it is one of the proposal's pairs.
    """

    ewc: float | None
    subspace: float | None
    difference: Estimate
    proposed: bool

    @property
    def diverged(self) -> bool:
        """Whether it or plain growing diverged in some seed."""
        return not math.isfinite(self.difference.mean)

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps, which has no word for a difference that is no number."""
        return asdict(self) | ({"difference": None} if self.diverged else {})


@dataclass(frozen=True)
class Grid:
    """All pairs at the deepest model that has them.

    Args:
        depth: of the models.
        parent_depth: of what they were grown out of.
        seeds: of plain growing, those that diverged left out.
        baseline: mean bits per byte of plain growing.
        cells: without plain growing itself.
    """

    depth: int
    parent_depth: int
    seeds: int
    baseline: float
    cells: tuple[Cell, ...]

    @property
    def lambdas(self) -> list[float | None]:
        """Strengths of EWC, ascending, after ``None`` for none."""
        return _ascending({cell.ewc for cell in self.cells})

    @property
    def gammas(self) -> list[float | None]:
        """Strengths of the subspace penalty, ascending, after ``None`` for none."""
        return _ascending({cell.subspace for cell in self.cells})

    def at(self, ewc: float | None, subspace: float | None) -> Cell | None:
        """The pair of these strengths, if it is there."""
        pairs = (c for c in self.cells if (c.ewc, c.subspace) == (ewc, subspace))
        return next(pairs, None)

    @property
    def ranked(self) -> list[Cell]:
        """The pairs that diverged in no seed, that of the lowest mean first."""
        known = [cell for cell in self.cells if not cell.diverged]
        return sorted(known, key=lambda cell: cell.difference.mean)

    @property
    def sentence(self) -> str:
        """The result in words."""
        known = self.ranked
        lost = len(self.cells) - len(known)
        diverged = f" {lost} diverged in some seed." if lost else ""
        if not known:
            return f"No benefit shown. Of {len(self.cells)} pairs,{diverged}"
        best = known[0]
        pair = " and ".join(
            f"{name} {value:g}"
            for name, value in (("lambda", best.ewc), ("gamma", best.subspace))
            if value is not None
        )
        worse = sum(min(cell.difference.values) > 0 for cell in known)
        better = sum(max(cell.difference.values) < 0 for cell in known)
        shown = sum((c.difference.known or (0.0, 0.0))[1] < 0 for c in known)
        start = "No benefit shown. "
        if shown:  # each against a one-sided 2.5 %
            start = f"Better by their own intervals: {shown}, by chance {len(known) / 40:.1f}. "
        if self.seeds < MIN_SEEDS:
            start = f"A search, not a test: {count_seeds(self.seeds)}. "
        return (
            f"{start}Of {len(self.cells)} pairs, {better} end below plain growing in every seed "
            f"and {worse} above it; the best, {pair}, differs by {best.difference.mean:+.4f} bits "
            f"per byte.{diverged}"
        )

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps."""
        return {
            "depth": self.depth,
            "parent_depth": self.parent_depth,
            "seeds": self.seeds,
            "baseline_bpb": self.baseline,
            "sentence": self.sentence,
            "cells": [cell.to_dict() for cell in self.cells],
        }


def _ascending(strengths: Collection[float | None]) -> list[float | None]:
    return [None, *sorted(value for value in strengths if value is not None)]


def strength_word(value: float | None) -> str:
    """A strength as the tables and figures have it."""
    return "none" if value is None else f"{value:g}"


def find_grid(records: Sequence[Record]) -> Grid | None:
    """The grid in a set of records, ``None`` if there is none.

    Args:
        records: of one or more seeds.
    """
    strengths = {}
    for word in dict.fromkeys(r.arm for r in records):
        pair = _strengths(read_arm(word))
        if pair is not None:
            strengths[word] = pair
    plain = Arm(True, (), None).name
    depth = max((r.depth for r in records if r.arm in strengths), default=0)
    found = {(r.arm, r.seed): r for r in records if r.depth == depth}
    cells = []
    for word, (ewc, subspace) in strengths.items():
        values = [
            record.val_bpb - found[plain, seed].val_bpb
            for (arm, seed), record in found.items()
            if arm == word and (plain, seed) in found
        ]
        if values:
            proposed = (ewc, subspace) in PROPOSED
            cells.append(Cell(ewc, subspace, Estimate.of(values), proposed))
    base = [r for (arm, _), r in found.items() if arm == plain and not r.diverged]
    if len(cells) < _FEWEST_CELLS or not base:
        return None
    parents = [r.depth for r in records if r.name == base[0].parent]
    return Grid(
        depth=depth,
        parent_depth=parents[0] if parents else depth - 1,
        seeds=len(base),
        baseline=Estimate.of([record.val_bpb for record in base]).mean,
        cells=tuple(cells),
    )


def _strengths(arm: Arm | None) -> tuple[float | None, float | None] | None:
    """Lambda and gamma of an arm whose word names the strengths of these penalties alone."""
    if arm is None or not arm.grown or arm.controller is not None or not arm.parts:
        return None
    values = dict(arm.parts)
    if not values.keys() <= _PENALTIES or None in values.values():
        return None
    return values.get("ewc"), values.get("subspace")
