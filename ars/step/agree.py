"""One decision for all processes that hold parts of the same parameters.

Each sees the gradients of its own parts, and perhaps a loss of its own. The surprise is the mean of
theirs, the gradient norm that of the whole parameters, and nothing moves where any of them has
found an infinity: all by one message of a few numbers, or one for each dimension of a mesh that is
not all processes. A penalty's value is the sum over the parts: one more. A process whose parts are
empty takes part.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed

from ars import reference
from ars.reference import Scalar
from ars.sharded import add_over, count_here, exchange_device, is_sharded
from ars.step.batch import DIAGNOSTICS, Batch, Hyper, Options, hyper_rows
from ars.step.eager import may_move
from ars.surprise import Replicas

__all__ = ["Agreement"]

_PENALTY = DIAGNOSTICS.index("penalty")


class Agreement:
    """What the processes of the parameters' meshes agree on in a step.

    Attributes:
        batch: What the step works on.

    Args:
        batch: Likewise, with parts of DTensors.

    Raises:
        RuntimeError: This process is not in the mesh of one of them.
    """

    def __init__(self, batch: Batch) -> None:
        for param in batch.owners:
            mesh: Any = param.device_mesh if is_sharded(param) else None  # type: ignore[attr-defined]
            if mesh is not None and mesh.get_coordinate() is None:
                raise RuntimeError(
                    f"a parameter of shape {tuple(param.shape)} is on {mesh}, which this process "
                    "is not in: give the optimizer of each process what it holds a part of"
                )
        self.batch = batch
        self._counted = count_here(batch.owners)
        self._is_sole = len(self._counted) == 1

    def reach(
        self,
        batch: Batch,
        options: Options,
        replicas: Replicas,
        norm_of: Callable[[list[Tensor]], Scalar],
    ) -> Options:
        """Return a step's options with what all processes have agreed on.

        Args:
            batch: What the step works on.
            options: With this process's surprise, and what it has found.
            replicas: Who else shares the surprise.
            norm_of: Takes the norm of some tensors.
        """
        device, found = options.diagnostics.device, options.found_inf
        watched, meshes = options.surprise, list(self._counted)
        everyone = self._is_sole and meshes[0].size() == distributed.get_world_size()
        if watched is not None and not (everyone and replicas.is_default()):
            watched = replicas.mean(watched, device)
        if watched is None and found is None and not options.needs_norm:
            return options
        squares = [
            norm_of([batch.grads[i] for i in counted]) ** 2
            if options.needs_norm and counted
            else 0.0
            for counted in self._counted.values()
        ]
        place = exchange_device(None, device)
        numbers = _together([watched, found, *squares], place)
        for index, mesh in enumerate(meshes):
            sent = numbers if self._is_sole else numbers[[0, 1, 2 + index]]
            add_over(mesh, sent)
            sent[0] /= mesh.size()
            if not self._is_sole:
                numbers[[0, 1, 2 + index]] = sent
        if not self._is_sole:  # who shares only one of the meshes has added up other numbers
            numbers[2] = numbers[2:].sum()
            for mesh in meshes:
                add_over(mesh, numbers, largest=True)
        numbers = numbers.to(device, non_blocking=True)
        norm: Scalar | None = None
        if options.needs_norm:
            norm = math.sqrt(numbers[2]) if device.type == "cpu" else numbers[2].sqrt()
        return options._replace(
            surprise=None if watched is None else numbers[0],
            found_inf=None if found is None else numbers[1:2].to(found.dtype),
            norm=norm,
        )

    def penalty_before(self, batch: Batch, hypers: list[Hyper]) -> list[Tensor] | None:
        """Return this process's share of the penalty before the step, for every mesh.

        None where the step adds up that very share: where it counts all that it holds.

        Args:
            batch: What the step works on.
            hypers: Each group's hyperparameters.
        """
        rest = batch.proximal_only
        if self._is_sole and rest is None:
            (counted,) = self._counted.values()
            if len(counted) == len(batch.owners):
                return None
        rows = hyper_rows(hypers, unused=batch.unused)
        entries = [*_entries(batch, rows), *([] if rest is None else _entries(rest, hypers))]
        owners = batch.owners + ([] if rest is None else rest.owners)
        zero = torch.zeros((), dtype=torch.float64, device=batch.tensors[0].param.device)
        return [
            sum((_value(*entries[i]) for i in counted), zero)
            for counted in count_here(owners).values()
        ]

    def report_penalty_(self, batch: Batch, options: Options, before: list[Tensor] | None) -> None:
        """Write the penalty's value into the diagnostics: that of the whole parameters.

        Args:
            batch: What the step has worked on.
            options: What held for all groups; its ``penalty`` has not been added yet.
            before: What :meth:`penalty_before` returned.
        """
        report = options.diagnostics
        owners = batch.owners + (batch.proximal_only.owners if batch.proximal_only else [])
        total = torch.zeros_like(report[_PENALTY])
        if batch.has_anchor() or batch.proximal_only is not None:
            shares = [report[_PENALTY].clone()] if before is None else before
            for mesh, share in zip(count_here(owners), shares, strict=True):
                sent = share.to(exchange_device(None, share.device), copy=True)
                add_over(mesh, sent)
                total += sent.to(total)
        if options.penalty is not None:
            total += options.penalty.detach().to(total)
        # Where nothing has moved, the value is still the last one's: that of the whole.
        report[_PENALTY].copy_(torch.where(may_move(options), total, report[_PENALTY]))


def _together(values: list[Any], place: torch.device) -> Tensor:
    """Return numbers, 1-element tensors and nothings as one float64 tensor."""
    values = [0.0 if value is None else value for value in values]
    if all(not isinstance(v, Tensor) or v.device.type == "cpu" for v in values):
        numbers = [v.item() if isinstance(v, Tensor) else v for v in values]
        return torch.tensor(numbers, dtype=torch.float64, device=place)
    tensors = [torch.as_tensor(v).detach().reshape(()) for v in values]
    return torch.stack([t.to(place, torch.float64, non_blocking=True) for t in tensors])


def _entries(batch: Batch, rows: list[Hyper]) -> Iterator[tuple[Batch, int, Hyper]]:
    for index, group in enumerate(batch.groups):
        yield batch, index, rows[group]


def _value(batch: Batch, index: int, hyper: Hyper) -> Tensor:
    """Return the elementwise penalty of one part of a batch, 0-d float64."""
    one = batch.tensors[index]
    if one.anchor is None or one.importance is None:
        return torch.zeros((), dtype=torch.float64, device=one.param.device)
    theta, importance = one.param.detach(), one.importance
    if one.remainder is not None:
        theta = reference.join_master(theta, one.remainder)
    if one.scale is not None:
        importance = reference.decode_importance(importance, one.scale)
    theta = theta.to(torch.promote_types(theta.dtype, torch.float32))
    return reference.ewc_value(theta, one.anchor, importance, hyper.strength).double()
