"""Which of the ways to single samples' gradients is taken, and the proof that it may be."""

import warnings
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ars.regularizers.cotangents import Chunk
from ars.regularizers.estimators import accumulation_dtype
from ars.regularizers.evaluation import in_float32
from ars.regularizers.sample_gradients import (
    add_squares_by_vmap,
    add_squares_one_by_one,
    zero_sums,
)
from ars.regularizers.taps import Taps, UnsupportedModelError

__all__ = ["METHODS", "Differentiator", "Method"]

Method: TypeAlias = Literal["auto", "hooks", "vmap", "loop"]
METHODS: tuple[Method, ...] = get_args(Method)

# Samples that vmap differentiates together if not told otherwise: each needs a gradient's memory.
VMAP_CHUNK = 8
# Largest deviation from plain autograd, relative to the tensor's largest entry, that is rounding
# (TF32 included) and not another quantity: known mistakes are off by 9 % and more.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-2}
HALF_TOLERANCE = 0.2

_Add: TypeAlias = Callable[[dict[str, Tensor], str, Chunk], None]


class Differentiator:
    """Adds up squared gradients by the fastest way that gives what plain autograd gives.

    Before ``hooks``, or ``vmap`` in its place, is relied upon, it is compared with plain autograd
    on two samples, or on the one there is, taken twice, until there are two: a rule that does not
    fit what the model really does (a weight used outside of its layer, positions taken for samples,
    samples that mix) cannot pass unnoticed. The comparison is in float32, whatever the precision of
    the model, as plain autograd in bfloat16 may be off by as much as a mistake. A model that runs
    in half precision only is compared as it is: deviations of a square below a fifth pass then, and
    a tensor whose gradient is below a quarter (float16: 3 %) of the largest is not checked.

    Args:
        model: In evaluation mode.
        parameters: The parameters to differentiate by, by name.
        method: ``auto`` tries hooks, vmap and the loop in this order and warns if it is not the
            first; the others are taken or refused.
        chunk_size: Samples to differentiate together; None for a batch with hooks, 8 with vmap.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        method: Method,
        chunk_size: int | None,
    ) -> None:
        self._model, self._parameters = model, parameters
        self._method, self._chunk_size = method, chunk_size
        self._chosen: _Add | None = self._loop if method == "loop" else None
        if method == "vmap":
            self._chosen = self._vmap
        # Different samples that it has been compared on; plain autograd needs no comparison.
        self._compared = 0 if self._chosen is None else 2
        self._begun = False

    def add_squares(self, total: dict[str, Tensor], estimator: str, whole: Chunk) -> None:
        """Add the squared gradients of every sample to ``total``, in place.

        Args:
            total: Sums by parameter name, contiguous, in the dtype to square and add in.
            estimator: A name in ``ESTIMATORS``.
            whole: A batch of samples.

        Raises:
            RuntimeError: The method that was asked for cannot do this model.
        """
        for chunk in whole.split(self._chunk_size or len(whole.targets)):
            if self._chosen is None or self._compared < min(2, len(chunk.targets)):
                self._chosen = self._choose(total, chunk)
            try:
                self._chosen(total, estimator, chunk)
            except UnsupportedModelError as error:  # raised before total was touched
                self._chosen = self._instead(total, chunk, str(error))
                self._chosen(total, estimator, chunk)
            self._begun = True

    def _choose(self, total: dict[str, Tensor], chunk: Chunk) -> _Add:
        try:
            taps = Taps(self._model, self._parameters, _two(chunk.inputs))
            self._compared = min(2, len(chunk.targets))
            self._verify(taps.add_squares, total, chunk)
        except UnsupportedModelError as error:
            return self._instead(total, chunk, str(error))
        except Exception as error:  # whatever the expanded outputs do to the model
            return self._instead(total, chunk, f"{type(error).__name__}: {error}")
        return taps.add_squares

    def _instead(self, total: dict[str, Tensor], chunk: Chunk, reason: str) -> _Add:
        self._compared = 2  # nothing that follows depends on how many samples there are
        name = type(self._model).__name__
        reason = f"{name} cannot be differentiated in one pass for all samples: {reason}"
        if self._method == "hooks":
            raise RuntimeError(f"{reason}. Use method='auto', 'vmap' or 'loop'")
        try:
            self._verify(self._vmap, total, chunk)
        except (RuntimeError, UnsupportedModelError) as error:
            self._warn(f"{reason}. Nor by torch.func.vmap: {error}. Samples are taken one by one")
            return self._loop
        size = self._chunk_size or VMAP_CHUNK
        self._warn(f"{reason}. Samples are taken by torch.func.vmap, {size} at a time")
        return self._vmap

    def _warn(self, message: str) -> None:
        warnings.warn(f"{message}; choose a method to silence this", UserWarning, stacklevel=6)

    def _loop(self, total: dict[str, Tensor], estimator: str, chunk: Chunk) -> None:
        add_squares_one_by_one(total, self._model, self._parameters, estimator, chunk)

    def _vmap(self, total: dict[str, Tensor], estimator: str, chunk: Chunk) -> None:
        for part in chunk.split(self._chunk_size or VMAP_CHUNK):
            add_squares_by_vmap(total, self._model, self._parameters, estimator, part)

    def _verify(self, add: _Add, total: dict[str, Tensor], chunk: Chunk) -> None:
        """Compare ``add`` with plain autograd on two samples.

        Raises:
            UnsupportedModelError: They differ; names the parameter.
        """
        # While nothing has been added, the sums lend their memory.
        free = zero_sums(self._parameters) if self._begun else total
        inputs = _two(chunk.inputs)
        wide = inputs.to(accumulation_dtype(inputs.dtype)) if inputs.is_floating_point() else inputs
        targets = torch.zeros_like(_two(chunk.targets))  # of class 0, so that none is masked
        noise = torch.empty(2, 1, 0, device=targets.device)
        two = Chunk(wide, targets, noise, None, 1)
        try:
            with in_float32(self._model):
                self._compare(add, free, two)
        except RuntimeError:  # the model casts by itself, or there is no memory for it
            self._compare(add, free, two._replace(inputs=inputs))

    def _compare(self, add: _Add, free: dict[str, Tensor], two: Chunk) -> None:
        names = [name for name, tensor in free.items() if tensor.numel()]
        try:
            add(free, "empirical", two)
            peaks = torch.stack([free[name].max().double().cpu() for name in names])
            add_squares_one_by_one(free, self._model, self._parameters, "empirical", two, sign=-1)
            errors = torch.stack([free[name].abs().max().double().cpu() for name in names])
        finally:
            for tensor in free.values():
                tensor.zero_()
        dtype = self._computed_in(two.inputs)
        # Gradients that are 0 but for rounding, as of a key's bias, differ by their rounding.
        noise_floor = (32 * torch.finfo(dtype).eps) ** 2 * peaks.max()
        wrong = ~(errors <= TOLERANCE.get(dtype, HALF_TOLERANCE) * peaks + noise_floor)
        if wrong.any() and peaks.isfinite().all():
            raise UnsupportedModelError(
                f"it gives {names[int(wrong.nonzero()[0])]!r} another gradient than plain autograd"
            )

    def _computed_in(self, inputs: Tensor) -> torch.dtype:
        device = inputs.device.type
        dtypes = [p.dtype for p in self._parameters.values()]
        if torch.is_autocast_enabled(device):
            dtypes.append(torch.get_autocast_dtype(device))
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _two(samples: Tensor) -> Tensor:
    """Return the first two samples, or the only one twice."""
    return samples[:2] if len(samples) > 1 else samples[[0, 0]]
