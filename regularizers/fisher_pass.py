"""The pass over the data: batches in, summed squares out."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ars.regularizers.batches import (
    check_cost,
    check_logits,
    check_targets,
    checked_batch,
    take_samples,
)
from ars.regularizers.checks import check_can_differentiate, checked_batches
from ars.regularizers.cotangents import Chunk, Unit, count_units, units_of
from ars.regularizers.estimators import ESTIMATORS, draw_nothing
from ars.regularizers.evaluation import evaluation_mode, trainable
from ars.regularizers.methods import Differentiator, Method
from ars.regularizers.sample_gradients import add_squared_batch_gradient, zero_sums

__all__ = ["Settings", "sum_squares"]


class Settings(NamedTuple):
    """The arguments of :class:`ars.regularizers.DiagonalFisher`."""

    estimator: str
    unit: Unit
    draws: int
    method: Method
    chunk_size: int | None
    generator: torch.Generator | None


def sum_squares(
    model: nn.Module,
    settings: Settings,
    batches: Iterable[tuple[Tensor, ...]],
    n_samples: int | None,
) -> tuple[dict[str, Tensor], int, int]:
    """Sum the squared gradients of all units.

    Args:
        model: In any mode; it is left as it was.
        settings: How.
        batches: As for :meth:`ars.regularizers.DiagonalFisher.fit`.
        n_samples: Sequences after which to stop; None for all.

    Returns:
        The sums by parameter name, the sequences seen, and the units in them, at least one.

    Raises:
        ValueError: No samples, fewer than ``n_samples``, or all positions masked.
    """
    check_can_differentiate("fit")
    parameters = trainable(model)
    total = zero_sums(parameters)
    way = Differentiator(model, parameters, settings.method, settings.chunk_size)
    checked = (
        checked_batch(batch, index, segments=settings.unit == "segment")
        for index, batch in enumerate(checked_batches(batches))
    )
    seen = units = classes = 0
    with evaluation_mode(model), torch.enable_grad():
        for index, (inputs, targets, *segments) in enumerate(take_samples(checked, n_samples)):
            if seen == 0:
                classes = check_logits(model(inputs[:1]), targets[:1]).shape[-1]
            check_targets(targets, classes, index)
            whole = _chunk(settings, inputs, targets, segments[0] if segments else None, classes)
            if settings.estimator == "batched":
                add_squared_batch_gradient(total, model, parameters, whole)
            else:
                way.add_squares(total, settings.estimator, whole)
            seen += len(targets)
            units += len(targets) if whole.units is None else count_units(whole.units)
    if units == 0:
        raise ValueError(f"every position is masked: there is no {settings.unit} to average over")
    return total, seen, units


def _chunk(
    settings: Settings, inputs: Tensor, targets: Tensor, segments: Tensor | None, classes: int
) -> Chunk:
    """Number the units of a batch and draw the random numbers of each sample in turn."""
    estimator, unit, draws, generator = (
        settings.estimator, settings.unit, settings.draws, settings.generator,
    )  # fmt: skip
    positions = targets[0].numel()
    units = units_of(unit, targets, segments)
    n_units = 1 if units is None else int(units.max()) + 1
    if estimator == "exact":
        check_cost("estimator='exact'", "positions * classes", positions, classes)
    elif units is not None:
        check_cost(f"unit={unit!r}", "draws * units", draws, n_units)
    draw, shape = ESTIMATORS[estimator].draw, (draws, positions, classes)
    device = targets.device if generator is None else generator.device
    if draw is draw_nothing:  # once, as a batch of small samples would notice the others
        noise = torch.empty((len(targets), draws, 0))
    else:
        noise = torch.stack([draw(shape, generator, device) for _ in targets])
    return Chunk(inputs, targets, noise.to(targets.device), units, n_units)
