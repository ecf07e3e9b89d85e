"""Some samples, and how to run a model on them.

A batch may be one tensor, keyword arguments, or whatever a loss reads. Its samples can be chosen,
moved and widened all the same: each tensor holds them in its first dimension.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Samples", "logits_of"]


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
