r"""From a chunk's logits to the cotangents that are pulled back, one per draw and unit.

The unit is what the square is taken of: with cotangents v_nt of sample n and position t,

    sequence   (sum_t v_nt . J_nt)^2
    segment    sum_s (sum_{t in s} v_nt . J_nt)^2
    token      sum_t (v_nt . J_nt)^2

Positions other than the unit's get a cotangent of 0, so a unit costs a backward pass: in a model
that mixes positions no cheaper way is exact.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from ars.regularizers.estimators import ESTIMATORS, GIVEN, IGNORE_INDEX, accumulation_dtype

__all__ = ["UNITS", "Chunk", "Unit", "and_whether_more", "cotangents", "count_units", "units_of"]

Unit: TypeAlias = Literal["sequence", "token", "segment"]
# Logits to form the cotangents of at once: 64 MiB of fp32, of which there are a few at a time.
LOGITS = 2**24
UNITS: tuple[Unit, ...] = get_args(Unit)


class Chunk(NamedTuple):
    """Samples that are differentiated together, and everything random about them.

    Args:
        inputs: (B, ...).
        targets: int64 in [0, C) or -100, shape (B,) or (B, T).
        noise: The estimator's random numbers, (B, draws, ...).
        units: Unit of each position, -1 for none, shape (B, T or 1); None: the sequence.
        n_units: Largest number of units in a sample.
    """

    inputs: Tensor
    targets: Tensor
    noise: Tensor
    units: Tensor | None
    n_units: int

    def split(self, size: int) -> "Iterator[Chunk]":
        """Yield the samples ``size`` at a time."""
        for start in range(0, len(self.targets), size):
            part = slice(start, start + size)
            units = None if self.units is None else self.units[part]
            yield Chunk(
                self.inputs[part], self.targets[part], self.noise[part], units, self.n_units
            )


def units_of(unit: Unit, targets: Tensor, segments: Tensor | None) -> Tensor | None:
    """Number the units of every sample.

    Args:
        unit: What to square.
        targets: (B,) or (B, T); masked positions belong to no unit.
        segments: Any integers, of the shape of ``targets``; positions of a sample that share one
            are a segment. Read with ``unit="segment"``.

    Returns:
        int64, (B, positions), from 0 in every row and -1 where masked; None for sequences.
    """
    if unit == "sequence":
        return None
    valid = (targets != IGNORE_INDEX).view(len(targets), -1)
    numbers = torch.full(valid.shape, -1, device=targets.device)
    if unit == "token" or segments is None:
        return torch.where(valid, valid.long().cumsum(1) - 1, numbers)
    for row, keep, ids in zip(numbers, valid, segments.view(valid.shape), strict=True):
        row[keep] = ids[keep].unique(return_inverse=True)[1]
    return numbers


def count_units(units: Tensor) -> int:
    """Count the units of all samples, as :func:`units_of` numbers them."""
    return int((units.amax(1) + 1).sum())


def cotangents(estimator: str, logits: Tensor, chunk: Chunk) -> Iterator[Tensor]:
    """Yield cotangents of the chunk's logits, 0 where masked; the squares they give are added.

    Args:
        estimator: A name in ``ESTIMATORS``, or "given".
        logits: (B, C) or (B, T, C), detached.
        chunk: What the logits are of.

    Yields:
        Tensors of the shape and dtype of ``logits``.
    """
    batch, classes = len(logits), logits.shape[-1]
    size = max(1, LOGITS // max(1, logits[:1].numel()))
    if size < batch:
        parts = zip(logits.split(size), chunk.split(size), strict=True)
        each_part = (cotangents(estimator, *part) for part in parts)
        yield from (torch.cat(each) for each in zip(*each_part, strict=True))
        return
    flat = logits.reshape(batch, -1, classes)  # (B, positions, C)
    flat = flat.to(accumulation_dtype(flat.dtype))
    targets = chunk.targets.reshape(batch, -1)
    labels = targets.clamp(min=0)
    draws = chunk.noise.shape[1]
    weight = (targets != IGNORE_INDEX)[..., None].to(flat.dtype) / math.sqrt(draws)
    rule = GIVEN if estimator == "given" else ESTIMATORS[estimator]
    for draw in range(draws):
        for each in rule.cotangents(flat, labels, chunk.noise[:, draw]):
            whole = each * weight
            # "exact" takes one position at a time already, whatever the unit.
            if chunk.units is None or estimator == "exact":
                yield whole.reshape(logits.shape).to(logits.dtype)
                continue
            for number in range(chunk.n_units):
                part = whole * (chunk.units == number)[..., None]
                yield part.reshape(logits.shape).to(logits.dtype)


def and_whether_more(tensors: Iterator[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Yield each tensor and whether another follows, so that the last may free the graph."""
    following = next(tensors, None)
    while following is not None:
        current, following = following, next(tensors, None)
        yield current, following is not None
