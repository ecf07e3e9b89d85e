r"""Diagonal of the Fisher information, one sequence at a time.

    Omega_i = 1/N sum_n sum_k ( sum_t v_nkt . d logits_nt / d theta_i )^2

n runs over N samples, t over the valid positions of a sample, k over the cotangents v of the
estimator (:mod:`ars.regularizers.estimators`): one, but for ``exact``. The square is taken after
the sum over positions and over every use of a tied weight, never after a sum over samples: the
square of a batch's gradient is another quantity, up to a batch size smaller.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from ars.regularizers.batches import check_logits, check_targets, checked_pair
from ars.regularizers.estimators import ESTIMATORS, accumulation_dtype
from ars.regularizers.sample_gradients import add_squared_gradients
from ars.regularizers.storage import Quantized, dequantize, quantize

__all__ = ["DiagonalFisher"]

# Backward passes a sample that "exact" may take; at a millisecond each this is four seconds.
MAX_EXACT_BACKWARDS = 4096
STORED = (None, torch.float32, torch.bfloat16, torch.uint8)


class DiagonalFisher:
    r"""Diagonal Fisher information of a model with categorical outputs.

    .. math:: \Omega_i = \frac{1}{N} \sum_{n=1}^{N}
              \Big( \sum_t v_{nt}^T \frac{\partial\, \ell_{nt}}{\partial \theta_i} \Big)^2

    with the logits :math:`\ell_{nt}` of position t in sample n and a random cotangent v whose
    covariance is that of the softmax scores. A sample is a sequence: :math:`\Omega` depends neither
    on the batch size, nor on ``chunk_size``, nor on whether the training loss is a mean or a sum.

    Estimators:

    * ``"sketch"``: Rademacher sketch of the generalised Gauss-Newton matrix; unbiased, and less
      noisy than ``"mc"`` at the same cost. The default.
    * ``"mc"``: labels sampled from the model, independently per position; unbiased.
    * ``"exact"``: every label, weighted by its probability, summed over positions. C backward
      passes a sample, or T * C for sequences; refused above 4096.
    * ``"empirical"``: the given targets. Biased: it vanishes where the model is right.

    Gradients have the parameters' dtype. They are squared and summed in float32, in float64 for
    float64 parameters, and :attr:`importance` is of that dtype. The softmax and the cotangents are
    likewise formed in float32 at least.

    Cost: about one forward and backward pass a sample (``"exact"``: see above), and one more
    forward pass in all. Measured with torch 2.13, CPU time on one core, ms a sample: a GPT of 3.3 M
    parameters and 256 tokens takes 60 for a plain forward and backward pass at batch 16, 69 here
    with ``chunk_size=1`` and 78 with 8; a 64-256-256-10 classifier takes 0.37 with 1, 0.31 with 8
    and 0.17 with 32. Hence the default of 1, and the advice to raise it for small models.

    Args:
        model: Maps a batch of inputs, shape (B, ...), to logits of shape (B, C), or (B, T, C) for
            sequences. Parameters with ``requires_grad=False`` are left out; a tied weight appears
            once, under its first name, as in ``named_parameters()``.
        estimator: ``"sketch"``, ``"mc"``, ``"exact"`` or ``"empirical"``.
        chunk_size: Samples differentiated together, >= 1; each needs the memory of a gradient. With
            1 they are taken one by one with plain autograd, which supports every module; above 1
            with ``torch.func.vmap``, which excludes activation checkpointing and modules that read
            tensor values back, and sees a parameter only where a module owns it.
        generator: Source of the random signs and labels; by default torch's own for the device.
        dtype: What the result is stored in: ``torch.float32``, ``torch.bfloat16`` or
            ``torch.uint8`` (:func:`~ars.regularizers.quantize`: 1.06 bytes a parameter); by default
            what it was summed in, float32 or float64.

    Raises:
        TypeError: ``model`` is not a module, or ``generator`` not a generator.
        ValueError: Unknown ``estimator`` or ``dtype``, or ``chunk_size`` not a positive integer.

    Example:
        >>> import torch
        >>> from ars.regularizers import DiagonalFisher
        >>> model = torch.nn.Linear(2, 2)
        >>> with torch.no_grad():
        ...     _ = model.weight.zero_(), model.bias.zero_()  # p = (1/2, 1/2) for every input
        >>> batch = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([0, 1])
        >>> fisher = DiagonalFisher(model, "exact").fit([batch])
        >>> fisher.importance["weight"]  # p (1 - p) mean(x^2)
        tensor([[1.2500, 0.5000],
                [1.2500, 0.5000]])
        >>> fisher.n_samples
        2

    References:
        Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks",
        arXiv:1612.00796.
        van de Ven, "On the computation of the Fisher information in continual learning",
        arXiv:2502.11756.
    """

    def __init__(
        self,
        model: nn.Module,
        estimator: str = "sketch",
        *,
        chunk_size: int = 1,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if estimator not in ESTIMATORS:
            raise ValueError(f"unknown estimator {estimator!r}; choose one of {list(ESTIMATORS)}")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator or None, got {type(generator).__name__}; "
                "for a seed pass torch.Generator().manual_seed(seed)"
            )
        if dtype not in STORED:
            raise ValueError(f"importance cannot be stored in {dtype}; choose one of {STORED}")
        _check_positive_int("chunk_size", chunk_size)
        self.model = model
        self.estimator = estimator
        self.chunk_size = chunk_size
        self.generator = generator
        self.dtype = dtype
        self._importance: dict[str, Tensor] | dict[str, Quantized] | None = None
        self._n_samples = 0

    @property
    def importance(self) -> dict[str, Tensor]:
        """Diagonal Fisher by parameter name, each of the parameter's shape.

        With ``dtype=torch.uint8`` it is expanded to float32 at every access; :attr:`quantized` is
        what is stored.

        Raises:
            RuntimeError: :meth:`fit` has not succeeded yet.
        """
        if self.dtype == torch.uint8:
            return {name: dequantize(*stored) for name, stored in self.quantized.items()}
        return cast(dict[str, Tensor], self._fitted())

    @property
    def quantized(self) -> dict[str, Quantized]:
        """The uint8 values and their scales by parameter name.

        Raises:
            RuntimeError: :meth:`fit` has not succeeded yet, or the result is not stored in uint8.
        """
        stored = self._fitted()
        if self.dtype != torch.uint8:
            raise RuntimeError(
                f"this DiagonalFisher is stored in {self.dtype or 'the dtype of its sums'}; make "
                "it with dtype=torch.uint8, or call quantize on each importance"
            )
        return cast(dict[str, Quantized], stored)

    def _fitted(self) -> dict[str, Tensor] | dict[str, Quantized]:
        if self._importance is None:
            raise RuntimeError("this DiagonalFisher is not fitted; call fit(batches) first")
        return self._importance

    @property
    def n_samples(self) -> int:
        """Samples (sequences) that :attr:`importance` averages over, 0 before :meth:`fit`."""
        return self._n_samples

    def fit(
        self, batches: Iterable[tuple[Tensor, Tensor]], n_samples: int | None = None
    ) -> "DiagonalFisher":
        """Estimate the Fisher over ``batches``; every call starts afresh.

        The model is in evaluation mode meanwhile and afterwards as it was, whatever happens:
        training flags, gradients, ``requires_grad``. A call that fails keeps the previous result.

        Args:
            batches: Pairs (inputs, targets) on the model's device. ``targets`` is int64 in [0, C),
                of shape (B,) for logits (B, C) and (B, T) for logits (B, T, C); -100 masks a
                position, for every estimator. A fully masked sample counts, with gradient 0.
            n_samples: Stop after exactly that many samples, within a batch if need be, >= 1; by
                default all are used.

        Returns:
            This object.

        Raises:
            TypeError: A batch is not a pair of tensors, targets are not int64, the model does not
                return a floating-point tensor, or a parameter is complex.
            ValueError: No samples, or fewer than ``n_samples``; an empty batch; shapes or devices
                that do not fit; a target out of range; nothing to differentiate; ``"exact"`` with
                more than 4096 backward passes a sample; an importance that is not finite.
            RuntimeError: ``chunk_size > 1`` and ``torch.func.vmap`` cannot run the model.
        """
        if n_samples is not None:
            _check_positive_int("n_samples", n_samples)
        parameters = _trainable(self.model)
        total = {
            name: torch.zeros_like(p, dtype=accumulation_dtype(p.dtype))
            for name, p in parameters.items()
        }
        estimator = ESTIMATORS[self.estimator]
        seen = classes = 0
        with _evaluation_mode(self.model), torch.enable_grad():
            for index, batch in enumerate(batches):
                inputs, targets = checked_pair(batch, index)
                if n_samples is not None:
                    inputs, targets = inputs[: n_samples - seen], targets[: n_samples - seen]
                if seen == 0:
                    classes = check_logits(self.model(inputs[:1]), targets[:1]).shape[-1]
                check_targets(targets, classes, index)
                self._check_cost(targets[0].numel(), classes)
                for x, y in zip(
                    inputs.split(self.chunk_size), targets.split(self.chunk_size), strict=True
                ):
                    noise = self._noise(y, classes)
                    add_squared_gradients(total, self.model, parameters, estimator, x, y, noise)
                seen += len(targets)
                if seen == n_samples:
                    break
        if seen == 0:
            raise ValueError("batches is empty: the Fisher needs at least one sample")
        if n_samples is not None and seen < n_samples:
            raise ValueError(
                f"n_samples={n_samples}, but batches held only {seen} samples; "
                f"provide more, or pass n_samples=None to use the {seen}"
            )
        for name, tensor in total.items():
            tensor /= seen
            if not tensor.isfinite().all():
                raise ValueError(
                    f"the importance of {name!r} is not finite; check that the model's logits and "
                    "gradients are finite (float16 overflows: use bfloat16 or float32)"
                )
        self._importance = _stored(total, self.dtype)
        self._n_samples = seen
        return self

    def _check_cost(self, positions: int, classes: int) -> None:
        backwards = positions * classes
        if self.estimator == "exact" and backwards > MAX_EXACT_BACKWARDS:
            raise ValueError(
                f"estimator='exact' would take positions * classes = {positions} * {classes} = "
                f"{backwards} backward passes a sample, more than {MAX_EXACT_BACKWARDS}; use "
                "estimator='sketch', which is unbiased and takes one"
            )

    def _noise(self, targets: Tensor, classes: int) -> Tensor:
        """Draw the random numbers of each sample in turn, whatever chunk it comes in."""
        draw = ESTIMATORS[self.estimator].draw
        device = targets.device if self.generator is None else self.generator.device
        positions = targets[0].numel()
        samples = [draw(positions, classes, self.generator, device) for _ in targets]
        return torch.stack(samples).to(targets.device)


def _check_positive_int(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _stored(
    importance: dict[str, Tensor], dtype: torch.dtype | None
) -> dict[str, Tensor] | dict[str, Quantized]:
    if dtype == torch.uint8:
        return {name: quantize(tensor) for name, tensor in importance.items()}
    return {name: tensor.to(dtype or tensor.dtype) for name, tensor in importance.items()}


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("the model has no parameter with requires_grad=True")
    for name, p in parameters.items():
        if p.is_complex():
            raise TypeError(f"parameter {name!r} is complex; only real parameters are supported")
    return parameters


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
