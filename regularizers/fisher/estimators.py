r"""Samples, and what each Fisher estimator sends backwards from the logits of one.

A batch may be one tensor, keyword arguments, or whatever a loss reads. Its samples can be chosen,
moved and widened all the same: each tensor holds them in its first dimension.

The Fisher information of a categorical output with probabilities p is, per position,

    J^T (diag(p) - p p^T) J,    J = d logits / d theta,

so an estimator is a random (or enumerated) logits cotangent v with E[v v^T] = diag(p) - p p^T:

    sketch           v = sqrt(p) * z - p (sqrt(p) . z),   z uniform in {-1, +1}^C
    mc               v = p - onehot(y),                   y ~ p
    exact            v_c = sqrt(p_c) (onehot(c) - p),     c = 1..C, one backward pass each

Three others put the data's labels in place of the model's and so estimate other quantities:

    empirical        v = p - onehot(target)
    logit_reversal   v = q - onehot(target),              q = softmax(-logits)
    batched          as empirical, but summed over a batch before the square

In sketch and mc the cotangents of different positions are independent with mean zero, which is why
the square of their sum over a sequence is an unbiased estimate of the sum of the squares.

The unit is what the square is taken of: with cotangents v_nt of sample n and position t,

    sequence   (sum_t v_nt . J_nt)^2
    segment    sum_s (sum_{t in s} v_nt . J_nt)^2
    token      sum_t (v_nt . J_nt)^2

Positions other than the unit's get a cotangent of 0, so a unit costs a backward pass: in a model
that mixes positions no cheaper way is exact.

References:
    Kunstner et al., "Limitations of the empirical Fisher approximation for natural gradient
    descent", arXiv:1905.12558.
    van de Ven, "On the computation of the Fisher information in continual learning",
    arXiv:2502.11756.
    "EWC-DR", arXiv:2603.18596 (logit_reversal).
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ars.regularizers.checks import IGNORE_INDEX, check_cost

__all__ = [
    "ESTIMATORS",
    "GIVEN",
    "UNITS",
    "Chunk",
    "Estimator",
    "Samples",
    "Unit",
    "accumulation_dtype",
    "cotangents",
    "count_units",
    "draw_nothing",
    "drawn",
    "logits_of",
    "of_losses",
    "sampled_labels",
    "units_of",
    "with_lookahead",
]

Unit: TypeAlias = Literal["sequence", "token", "segment"]
UNITS: tuple[Unit, ...] = get_args(Unit)
# Logits to form the cotangents of at once: 64 MiB of fp32, of which there are a few at a time.
LOGITS = 2**24


class Samples:
    """Tensors with the samples in their first dimension, and how a model is run on them.

    Args:
        tensors: At least one, as long as each other.
        run: Called with a model and such tensors; returns one tensor with the samples in front.
    """

    def __init__(
        self, tensors: Sequence[Tensor], run: Callable[[nn.Module, Sequence[Tensor]], Any]
    ) -> None:
        self.tensors, self._run = tuple(tensors), run

    @classmethod
    def of_inputs(cls, inputs: Tensor) -> "Samples":
        """Of a model that maps one tensor, (B, ...), to logits."""
        return cls((inputs,), lambda model, tensors: logits_of(model(*tensors)))

    @classmethod
    def of_batch(
        cls, batch: Any, size: int, run: Callable[[nn.Module, Any], Any], *, what: str
    ) -> "Samples":
        """Of tensors in tuples, lists and mappings, which ``run`` is given as they are here.

        Args:
            batch: The batch. What is no tensor, and tensors without dimensions, belong to every
                sample.
            size: Samples in it.
            run: Called with a model and a batch of this structure.
            what: Name of the batch, for messages.

        Raises:
            ValueError: A tensor has another first dimension; names it.
        """
        tensors = []
        for place, tensor in _tensors_in(batch, what):
            if len(tensor) != size:
                raise ValueError(
                    f"{place} has shape {tuple(tensor.shape)}, but there are {size} samples: each "
                    "tensor of a batch holds them in its first dimension; expand it to them, or "
                    "keep what samples share out of the batch"
                )
            tensors.append(tensor)

        def run_with(model: nn.Module, tensors: Sequence[Tensor]) -> Any:
            return run(model, _with_tensors(batch, iter(tensors)))

        return cls(tensors, run_with)

    def run(self, model: nn.Module) -> Any:
        """Return the model's logits, or its losses as logits of one class."""
        return self._run(model, self.tensors)

    def holding(self, tensors: Sequence[Tensor]) -> "Samples":
        """Return samples that are run alike."""
        return Samples(tensors, self._run)

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: slice | list[int]) -> "Samples":
        return self.holding([tensor[index] for tensor in self.tensors])

    def rolled(self) -> "Samples":
        """Return them with every sample in the place of the one before."""
        return self.holding([tensor.roll(1, 0) for tensor in self.tensors])

    def widened(self) -> "Samples":
        """Return them in float32 at least."""
        wide = [t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t
                for t in self.tensors]  # fmt: skip
        return self.holding(wide)

    @property
    def device(self) -> torch.device:
        """Where the first tensor is."""
        return self.tensors[0].device

    @property
    def shapes(self) -> tuple[object, ...]:
        """Shapes and dtypes, which tell runs apart."""
        return tuple((tensor.shape, tensor.dtype) for tensor in self.tensors)


def logits_of(outputs: Any) -> Any:
    """Return what a model returned, or that object's ``logits``, as Hugging Face's models do.

    Args:
        outputs: What it returned.
    """
    return outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", outputs)


def _tensors_in(value: Any, place: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a batch that have dimensions, and where they are."""
    if isinstance(value, Tensor):
        if value.ndim:
            yield place, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors_in(part, f"{key!r} of {place}")
    elif isinstance(value, (tuple, list)):
        for number, part in enumerate(value):
            yield from _tensors_in(part, f"entry {number} of {place}")


def _with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Return a batch of the same structure with other tensors in the places of its own."""
    if isinstance(value, Tensor):
        return next(tensors) if value.ndim else value
    if isinstance(value, Mapping):
        parts = {key: _with_tensors(part, tensors) for key, part in value.items()}
        if not isinstance(value, MutableMapping):
            return parts
        made = copy.copy(value)  # of its own kind, with attributes
        made.update(parts)
        return made
    if isinstance(value, (tuple, list)):
        items = [_with_tensors(part, tensors) for part in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


class Estimator(NamedTuple):
    """How one estimator draws its randomness and turns it into cotangents.

    ``draw(shape, generator, device)`` returns the random numbers of one sample, ``shape`` being
    (draws, positions, classes). They are drawn sample by sample and outside any batching, so they
    depend only on the samples' order. ``cotangents(logits, labels, noise)`` yields tensors of the
    shape of ``logits``, (..., positions, classes), given labels (..., positions) and the noise of
    one draw; the gradients they pull back are squared and added.
    """

    draw: Callable[[tuple[int, int, int], torch.Generator | None, torch.device], Tensor]
    cotangents: Callable[[Tensor, Tensor, Tensor], Iterator[Tensor]]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, else float32 (bf16 sums stall, squares underflow in fp16)."""
    return torch.promote_types(dtype, torch.float32)


def _minus_one_hot(p: Tensor, labels: Tensor) -> Tensor:
    # Not by one_hot, whose int64 would be twice the memory of the logits.
    index = labels[..., None]
    return p.scatter_add(-1, index, -torch.ones_like(index, dtype=p.dtype))


def draw_nothing(
    shape: tuple[int, int, int], generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Return the random numbers of an estimator that has none, (draws, 0)."""
    return torch.empty((shape[0], 0), device=device)


def _draw_signs(
    shape: tuple[int, int, int], generator: torch.Generator | None, device: torch.device
) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator, device=device, dtype=torch.int8) * 2 - 1


def _draw_uniforms(
    shape: tuple[int, int, int], generator: torch.Generator | None, device: torch.device
) -> Tensor:
    return torch.rand(shape[:2], generator=generator, device=device, dtype=torch.float64)


def _sketch(logits: Tensor, labels: Tensor, noise: Tensor) -> Iterator[Tensor]:
    p = logits.softmax(-1)
    signed_root = p.sqrt() * noise
    yield signed_root - p * signed_root.sum(-1, keepdim=True)


def _mc(logits: Tensor, labels: Tensor, noise: Tensor) -> Iterator[Tensor]:
    p = logits.softmax(-1)
    yield _minus_one_hot(p, sampled_labels(p, noise))


def sampled_labels(p: Tensor, noise: Tensor) -> Tensor:
    """Labels by inversion of the distribution.

    Args:
        p: Probabilities, shape (..., C).
        noise: float64 in [0, 1), shape (...).

    Returns:
        int64, shape (...).
    """
    # In float64: an fp32 sum over a large vocabulary would misplace rare labels.
    cdf = p.double().cumsum(-1)
    return (cdf <= noise[..., None] * cdf[..., -1:]).sum(-1).clamp(max=p.shape[-1] - 1)


def _exact(logits: Tensor, labels: Tensor, noise: Tensor) -> Iterator[Tensor]:
    p = logits.softmax(-1)
    positions, classes = p.shape[-2:]
    at_position = torch.eye(positions, dtype=p.dtype, device=p.device)[:, :, None]
    at_class = torch.eye(classes, dtype=p.dtype, device=p.device)
    for t in range(positions):
        here = p[..., t, None, :]
        for c in range(classes):
            yield at_position[t] * (here[..., c, None].sqrt() * (at_class[c] - here))


def _empirical(logits: Tensor, labels: Tensor, noise: Tensor) -> Iterator[Tensor]:
    yield _minus_one_hot(logits.softmax(-1), labels)


def _logit_reversal(logits: Tensor, labels: Tensor, noise: Tensor) -> Iterator[Tensor]:
    # The loss of the reversed logits: its gradient is the negative of this, and it is squared.
    yield from _empirical(-logits, labels, noise)


def _given(logits: Tensor, labels: Tensor, noise: Tensor) -> Iterator[Tensor]:
    yield noise


ESTIMATORS = {
    "sketch": Estimator(_draw_signs, _sketch),
    "mc": Estimator(_draw_uniforms, _mc),
    "exact": Estimator(draw_nothing, _exact),
    "empirical": Estimator(draw_nothing, _empirical),
    "logit_reversal": Estimator(draw_nothing, _logit_reversal),
    "batched": Estimator(draw_nothing, _empirical),
}
# Not an estimate: the noise, of the logits' shape, is the cotangent. For checks.
GIVEN = Estimator(draw_nothing, _given)


class Chunk(NamedTuple):
    """Samples that are differentiated together, and everything random about them.

    Args:
        inputs: B samples.
        targets: int64 in [0, C) or -100, shape (B,) or (B, T).
        noise: The estimator's random numbers, (B, draws, ...).
        units: Unit of each position, -1 for none, shape (B, T or 1); None: the sequence.
        n_units: Largest number of units in a sample.
    """

    inputs: Samples
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


def drawn(
    inputs: Samples,
    targets: Tensor,
    estimator: str,
    *,
    draws: int,
    classes: int,
    generator: torch.Generator | None,
    unit: Unit = "sequence",
    segments: Tensor | None = None,
) -> Chunk:
    """Number the units of a batch and draw the random numbers of each sample in turn.

    So they are the same whatever batch a sample comes in.

    Args:
        inputs: B samples.
        targets: (B,) or (B, T).
        estimator: A name in ``ESTIMATORS``.
        draws: How many a sample.
        classes: C.
        generator: Source of the random numbers; None for torch's own of the targets' device.
        unit: What to square.
        segments: As for :func:`units_of`.

    Returns:
        The batch as one chunk.
    """
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


def of_losses(inputs: Samples, targets: Tensor) -> Chunk:
    """Return a batch whose "logits" are losses: with the estimator "given" its cotangent is 1.

    Args:
        inputs: B samples.
        targets: Zeros, (B,).
    """
    return Chunk(inputs, targets, torch.ones(len(targets), 1, 1, 1, device=targets.device), None, 1)


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


def with_lookahead(tensors: Iterator[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Yield each tensor and whether another follows, so that the last may free the graph."""
    following = next(tensors, None)
    while following is not None:
        current, following = following, next(tensors, None)
        yield current, following is not None
