r"""Diagonal of the Fisher information, one sequence at a time.

    Omega_i = 1/N sum_n sum_k ( sum_t v_nkt . d logits_nt / d theta_i )^2

n runs over N samples, t over the valid positions of a sample, k over the cotangents v of the
estimator (:mod:`ars.regularizers.fisher.estimators`). The square is taken after the sum over
positions and over every use of a tied weight, never after a sum over samples: that is another
quantity.
"""

import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, distributed, nn

from ars.regularizers.checks import (
    check_can_differentiate,
    check_draws,
    check_generator,
    check_logits,
    check_positive_int,
    check_targets,
    checked_choice,
    checked_module,
    evaluation_mode,
    trainable,
)
from ars.regularizers.fisher.adam_moment import adam_importance
from ars.regularizers.fisher.batches import (
    Batch,
    LossFunction,
    check_loss_fn,
    labelled_samples,
    samples_with_losses,
)
from ars.regularizers.fisher.diagonal_state import STORED, Kept, measured_in, state_of
from ars.regularizers.fisher.estimators import (
    ESTIMATORS,
    UNITS,
    Unit,
    count_units,
    drawn,
    of_losses,
)
from ars.regularizers.fisher.gathered import gathered
from ars.regularizers.fisher.per_sample import (
    METHODS,
    Differentiator,
    Method,
    add_squared_batch_gradient,
    zero_sums,
)
from ars.regularizers.fisher.processes import Group, Processes
from ars.regularizers.storage import Quantized, dequantize, quantize
from ars.sharded import is_sharded, place_as, reshard, whole

__all__ = ["DiagonalFisher"]


class DiagonalFisher:
    r"""Diagonal Fisher information of a model with categorical outputs.

    .. math:: \Omega_i = \frac{1}{N} \sum_{n=1}^{N}
              \Big( \sum_t v_{nt}^T \frac{\partial\, \ell_{nt}}{\partial \theta_i} \Big)^2

    with the logits :math:`\ell_{nt}` of position t in sample n and a random cotangent v whose
    covariance is that of the softmax scores. A sample is a sequence, or what ``unit`` says:
    :math:`\Omega` depends neither on the batch size, nor on ``chunk_size``, nor on whether the
    training loss is a mean or a sum (in half precision and under autocast as far as the model's own
    outputs do not: a kernel may round a larger batch otherwise).

    Estimators:

    * ``"sketch"``: Rademacher sketch of the generalised Gauss-Newton matrix; unbiased, and less
      noisy than ``"mc"`` at the same cost. The default.
    * ``"mc"``: labels sampled from the model, independently per position; unbiased.
    * ``"exact"``: every label, weighted by its probability, summed over positions. C backward
      passes a sample, or T * C for sequences; refused above 4096.
    * ``"empirical"``: the given targets. Biased: it vanishes where the model is right.
    * ``"logit_reversal"``: the given targets and the logits times -1, as EWC-DR has it. Not an
      estimate of the Fisher either, but it does not vanish where the model is right.
    * ``"batched"``: the square of a batch's mean gradient, averaged over the batches, which much
      EWC code takes for the Fisher. It is neither that nor ``"empirical"``: samples cancel before
      the square, so it depends on the batches the data comes in, is up to a batch size smaller,
      and needs a strength as much larger. For comparison with such code.
    * ``"adam"``: the second moment that an optimizer holds, by :meth:`from_optimizer`; free.

    Gradients are squared and summed in float32, in float64 for float64 parameters; they have that
    dtype themselves with hooks, the parameters' with the other methods. The softmax and the
    cotangents are formed in float32 at least.

    All samples of a batch share one forward and one backward pass (``method="hooks"``), in which
    each layer's input and output gradient give the squares of its weights' gradients: known are
    linear, embedding, 1d and 2d convolution, layer, RMS, group and batch norm, their biases, tied
    and broadcast weights. This way is taken only where it is proven: for every batch, that no
    parameter has a use outside of such a layer; for every batch of new shapes or operators, and for
    every batch if values decide where rows go (indices, masks, sorting, products of two computed
    matrices), that each row of each layer belongs to the sample it is taken for, which costs two
    further backward passes. The rules are besides compared with plain autograd on two samples, in
    float32 whatever the model's precision; a model that casts by itself, and so runs in half
    precision only, as it is.

    Args:
        model: Maps a batch of inputs, (B, ...), to logits, (B, C), or (B, T, C) for sequences; no
            sample may influence another. Parameters with ``requires_grad=False`` are left out; a
            tied weight appears once, under its first name, as in ``named_parameters()``.
        estimator: One of the above.
        unit: What is squared, and what N counts: ``"sequence"``; ``"segment"``, a document of a
            packed sequence, as numbered by the batches; or ``"token"``, a position that is not
            masked. Segments and tokens take a backward pass each, as positions may mix.
        draws: Independent signs or labels a sample, >= 1, averaged; ``"sketch"`` and ``"mc"`` only.
            A backward pass each, sharing one forward pass.
        method: ``"auto"`` is on a CPU what is predicted to be the fastest, by what one sample's
            forward pass does. Elsewhere, where that is ``"hooks"``, and where vmap cannot run the
            model, it is ``"hooks"``, or, from the batch on where that does not know a layer or is
            not proven, ``"vmap"`` (``torch.func.vmap``), or else, from the batch on where that
            fails, ``"loop"`` (plain autograd, one sample at a time), with a warning that names the
            layer. One of the three is taken or refused.
        chunk_size: Samples differentiated together, >= 1; by default a batch, with ``"vmap"`` 8.
            With hooks it bounds the activations held; with vmap each needs a gradient's memory.
        generator: Source of the random signs and labels; by default torch's own for the device. Of
            several processes each draws from its own: give each another seed. By default they draw
            different numbers, however they are seeded.
        dtype: What the result is stored in: ``torch.float32``, ``torch.bfloat16`` or
            ``torch.uint8`` (:func:`~ars.regularizers.quantize`: 1.06 bytes a parameter); by default
            what it was summed in, float32 or float64.
        process_group: The processes whose samples are added up: None for torch's default group, if
            ``torch.distributed`` is initialised; False for this process alone.

    Raises:
        TypeError: ``model`` is not a module, ``generator`` not a generator, or ``process_group``
            not a group that this process is in.
        ValueError: Unknown ``estimator``, ``unit``, ``method`` or ``dtype``; ``chunk_size`` or
            ``draws`` not a positive integer; a combination that has no meaning.

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

    _processes = Processes(None)  # of pickles of version 0.1.0, which have none

    def __init__(
        self,
        model: nn.Module,
        estimator: str = "sketch",
        *,
        unit: Unit = "sequence",
        draws: int = 1,
        method: Method = "auto",
        chunk_size: int | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        process_group: Group = None,
    ) -> None:
        self.model = checked_module(model)
        self._processes = Processes(process_group)
        self.estimator: str = checked_choice("estimator", estimator, (*ESTIMATORS, "adam"))
        self.unit: Unit = checked_choice("unit", unit, UNITS)
        self.draws = draws
        self.method: Method = checked_choice("method", method, METHODS)
        self.chunk_size = chunk_size
        self.generator = generator
        self.dtype = dtype
        if unit != "sequence" and estimator in {"batched", "adam"}:
            raise ValueError(f"estimator={estimator!r} has no units; leave unit='sequence'")
        if estimator in {"batched", "adam"} and (method != "auto" or chunk_size is not None):
            raise ValueError(
                f"estimator={estimator!r} takes no single samples; leave method='auto' and "
                "chunk_size=None"
            )
        check_generator(generator)
        if dtype not in {None, *STORED}:
            raise ValueError(f"importance cannot be stored in {dtype}; choose one of {STORED}")
        if chunk_size is not None:
            check_positive_int("chunk_size", chunk_size)
        check_draws(draws, estimator)
        self._importance: Kept | None = None
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

    def _fitted(self) -> Kept:
        if self._importance is None:
            raise RuntimeError("this DiagonalFisher is not fitted; call fit(batches) first")
        return self._importance

    @property
    def n_samples(self) -> int:
        """Sequences of all processes that :attr:`importance` is of, 0 before :meth:`fit`."""
        return self._n_samples

    def fit(
        self,
        batches: Iterable[Batch] | Iterable[Any],
        n_samples: int | None = None,
        *,
        loss_fn: LossFunction | None = None,
    ) -> "DiagonalFisher":
        """Estimate the Fisher over ``batches``; every call starts afresh.

        The model is in evaluation mode meanwhile and afterwards as it was, whatever happens:
        training flags, gradients, ``requires_grad``. A call that fails keeps the previous result.

        Args:
            batches: Pairs (inputs, targets) on the model's device. ``targets`` is int64 in [0, C),
                of shape (B,) for logits (B, C) and (B, T) for logits (B, T, C); -100 masks a
                position, for every estimator. A fully masked sequence counts, with gradient 0.
                With ``unit="segment"`` triples (inputs, targets, segments): int64 of the shape of
                ``targets``, equal at the positions of one document. Or mappings, as Hugging Face's
                collators make them: the model is called with all but ``labels`` by name, and
                ``labels`` are the targets, shifted by one if the model's own loss shifts them (its
                gradient by the logits tells, on one sample). An encoder-decoder gets the
                ``decoder_input_ids`` that it makes of labels.
            n_samples: Stop after exactly that many sequences of this process, within a batch if
                need be, >= 1; by default all are used.
            loss_fn: Another loss than the cross-entropy of the logits, with
                ``estimator="empirical"``: called with the model (out of a wrapper of torch's) and a
                batch, it returns the loss of every sample, (B,), of which each gradient is squared.
                Batches are then tensors, or tuples, lists and mappings of tensors, which all hold
                the samples in their first dimension. It must not let samples influence one another.

        Returns:
            This object.

        Raises:
            TypeError: A batch is none of these, targets are not int64, the model does not return a
                floating-point tensor, or a parameter is complex or one of FullyShardedDataParallel.
            ValueError: No samples, or fewer than ``n_samples``; an empty batch; shapes or devices
                that do not fit; a target out of range; a model whose own loss is no cross-entropy
                of its labels; a ``loss_fn`` with another estimator, of another shape, or that gives
                a sample another loss by itself than in its batch; nothing to differentiate; more
                than 4096 backward passes a sample; an importance that is not finite;
                ``dtype=torch.uint8`` or a wrong ``process_group`` of a sharded model.
            RuntimeError: The ``method`` asked for cannot differentiate the model, or another
                process could not fit its samples.

        Example:
            >>> import torch
            >>> from ars.regularizers import DiagonalFisher
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> _ = torch.nn.init.zeros_(model.weight)
            >>> def squared_error(model, batch):
            ...     return (model(batch["x"]) - batch["y"]).square().sum(1)
            >>> batch = {"x": torch.tensor([[1.0], [2.0]]), "y": torch.tensor([[3.0], [1.0]])}
            >>> fisher = DiagonalFisher(model, "empirical").fit([batch], loss_fn=squared_error)
            >>> fisher.importance["weight"]  # mean of (2 x y)^2
            tensor([[26.]])
        """
        if self.estimator == "adam":
            raise ValueError(
                "estimator='adam' needs no data; use DiagonalFisher.from_optimizer(model, opt)"
            )
        check_loss_fn(loss_fn, self.estimator, self.unit)
        check_can_differentiate("fit")
        _check_can_keep(self.model, self.dtype)
        processes, sharded = self._processes, dict[str, nn.Parameter]()
        several = distributed.is_available() and distributed.is_initialized()
        if not (several or processes.is_lost):
            total = zero_sums(trainable(self.model))
            own = [self._add_own_samples(total, batches, n_samples, loss_fn, alone=True)]
        else:
            with gathered(self.model, processes) as sharded:
                total, alone = zero_sums(trainable(self.model)), processes.count == 1
                add = partial(
                    self._add_own_samples, total, batches, n_samples, loss_fn, alone=alone
                )
                own = processes.each(add)
            processes.agreed([part.sums for part in own], everywhere=True)
        seen, units = sum(part.samples for part in own), sum(part.units for part in own)
        if seen == 0:
            raise ValueError("batches is empty in every process: at least one sample is needed")
        if units == 0:
            raise ValueError(f"every position is masked: there is no {self.unit} to average over")
        if len(own) > 1:
            processes.add_up_(total.values())
        for tensor in total.values():
            tensor.div_(units)
        return self._store(total, seen, sharded)

    def _add_own_samples(
        self,
        total: dict[str, Tensor],
        batches: Iterable[Any],
        n_samples: int | None,
        loss_fn: LossFunction | None,
        *,
        alone: bool,
    ) -> "_Part":
        """Add this process's samples to ``total``, and count them."""
        parameters = trainable(self.model)
        way = Differentiator(self.model, parameters, self.method, self.chunk_size)
        if loss_fn is None:
            segments = self.unit == "segment"
            samples = labelled_samples(
                self.model, batches, n_samples, segments=segments, needed=alone
            )
        else:
            samples = samples_with_losses(self.model, batches, loss_fn, n_samples, needed=alone)
        generator = self.generator
        seen = units = classes = 0
        with evaluation_mode(self.model), torch.enable_grad():
            for index, (inputs, targets, *numbers) in enumerate(samples):
                if seen == 0:
                    classes = check_logits(inputs[:1].run(self.model), targets[:1]).shape[-1]
                    if generator is None and not alone:
                        generator = self._processes.generator(targets.device)
                check_targets(targets, classes, index)
                if loss_fn is None:
                    batch = drawn(
                        inputs,
                        targets,
                        self.estimator,
                        draws=self.draws,
                        classes=classes,
                        generator=generator,
                        unit=self.unit,
                        segments=numbers[0] if numbers else None,
                    )
                else:
                    batch = of_losses(inputs, targets)
                if self.estimator == "batched":
                    add_squared_batch_gradient(total, self.model, parameters, batch)
                else:
                    way.add_squares(total, "given" if loss_fn else self.estimator, batch)
                seen += len(targets)
                units += len(targets) if batch.units is None else count_units(batch.units)
        return _Part({n: (t.shape, t.dtype) for n, t in total.items()}, seen, units)

    @classmethod
    def from_optimizer(
        cls,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scale: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> "DiagonalFisher":
        r"""Take the second moment of the Adam that trained the model for its Fisher.

        .. math:: \Omega = \text{scale} \cdot \hat v, \qquad
                  \hat v = \text{exp\_avg\_sq} / (1 - \beta_2^t)

        A running mean of squared batch gradients, like ``"batched"``. Where the loss is the mean
        over B sequences and single gradients are large beside their mean, ``scale=B`` brings it to
        the size of ``"empirical"``; a mean over the T positions of each takes ``scale=B * T**2``.

        Args:
            model: The model.
            optimizer: Has stepped every trainable parameter of ``model``; any that keeps
                ``exp_avg_sq`` (Adam, AdamW, NAdam, RAdam, :class:`ars.ARSAdamW`).
            scale: Finite, > 0.
            dtype: As in the constructor.

        Returns:
            A fitted DiagonalFisher; its ``n_samples`` is the number of steps taken.

        Raises:
            TypeError: ``optimizer`` is not an optimizer, or ``scale`` not a number.
            ValueError: A parameter has no second moment, ``scale`` is not positive, or an
                importance is not finite.

        Example:
            >>> import torch
            >>> from ars.regularizers import DiagonalFisher
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> opt = torch.optim.Adam(model.parameters())
            >>> model(torch.full((1, 1), 3.0)).sum().backward()
            >>> opt.step()
            >>> DiagonalFisher.from_optimizer(model, opt).importance["weight"]
            tensor([[9.]])

        References:
            "Fishers for Free? Approximating the Fisher Information Matrix by Recycling the Squared
            Gradient Accumulator", arXiv:2507.18807.
        """
        fisher = cls(model, "adam", dtype=dtype)
        _check_can_keep(model, dtype)
        reshard(model)
        return fisher._store(*adam_importance(trainable(model), optimizer, scale), {})

    def _store(
        self, importance: dict[str, Tensor], samples: int, sharded: Mapping[str, nn.Parameter]
    ) -> "DiagonalFisher":
        _check_finite(importance)
        _warn_of_zeros(importance, stacklevel=3)
        self._importance = _kept(importance, self.dtype, sharded)
        self._n_samples = samples
        return self

    def state_dict(self) -> dict[str, Any]:
        """What was measured, and how: tensors by parameter name, numbers and strings.

        :func:`~ars.regularizers.save_penalty` writes it to a file. A sharded importance is whole in
        it, which is a collective operation.

        Returns:
            The state; without a copy of an importance that is not sharded.

        Raises:
            RuntimeError: :meth:`fit` has not succeeded yet.

        Example:
            >>> import tempfile, torch
            >>> from ars.regularizers import DiagonalFisher, load_penalty, save_penalty
            >>> model = torch.nn.Linear(2, 2)
            >>> batch = torch.ones(3, 2), torch.zeros(3, dtype=torch.int64)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     save_penalty(DiagonalFisher(model).fit([batch]), f"{folder}/fisher.safetensors")
            ...     fisher = DiagonalFisher(model)
            ...     load_penalty(fisher, f"{folder}/fisher.safetensors")
            >>> fisher.n_samples
            3
        """
        return {
            "estimator": self.estimator,
            "unit": self.unit,
            "draws": self.draws,
            "n_samples": self.n_samples,
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
            **state_of(self._fitted()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what another DiagonalFisher of this model has measured, and how it did.

        Args:
            state: What :meth:`state_dict` returned, on any device.

        Raises:
            TypeError: An entry has the wrong type. Nothing has changed then.
            ValueError: The state is of another model or holds an invalid value. Nothing has changed
                then; the message names the first difference.
        """
        reshard(self.model)
        found = measured_in(state, self.model)
        _check_can_keep(self.model, found.dtype)
        self._importance, self._n_samples = found.importance, found.n_samples
        self.estimator, self.unit, self.draws = found.estimator, found.unit, found.draws
        self.dtype = found.dtype


class _Part(NamedTuple):
    """What one process has added up: the shape and dtype of each sum, and how many it is of."""

    sums: dict[str, tuple[torch.Size, torch.dtype]]
    samples: int
    units: int


def _check_can_keep(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Refuse scales of a sharded importance."""  # noqa: DOC501
    for name, p in model.named_parameters():
        if dtype == torch.uint8 and is_sharded(p):
            raise ValueError(
                f"parameter {name!r} is sharded, and the scales of dtype=torch.uint8 are of "
                "blocks of the whole: leave dtype None or take torch.bfloat16, and let "
                "EWC(storage='compact') compress each process's part"
            )


def _kept(
    importance: dict[str, Tensor], dtype: torch.dtype | None, sharded: Mapping[str, nn.Parameter]
) -> Kept:
    """Return what is kept of an importance, which is emptied."""
    if dtype == torch.uint8:
        return {name: quantize(tensor) for name, tensor in importance.items()}
    return {
        # Popped, so that no more than one is there in both ways.
        name: _placed(tensor.to(dtype or tensor.dtype), sharded.get(name))
        for name, tensor in ((n, importance.pop(n)) for n in list(importance))
    }


def _placed(tensor: Tensor, like: nn.Parameter | None) -> Tensor:
    return tensor if like is None else place_as(tensor, like)


def _check_finite(importance: Mapping[str, Tensor]) -> None:
    """Refuse an importance that is not finite."""  # noqa: DOC501
    for name, tensor in importance.items():
        if not _is_true(tensor.isfinite().all()):
            raise ValueError(
                f"the importance of {name!r} is not finite; check that the model's logits and "
                "gradients are finite (float16 overflows: use bfloat16 or float32)"
            )


def _warn_of_zeros(importance: Mapping[str, Tensor], *, stacklevel: int) -> None:
    """Say which parameters a penalty would not protect at all."""
    names = [name for name, tensor in importance.items() if not _is_true(tensor.any())]
    if names:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        warnings.warn(
            f"the importance of {', '.join(map(repr, names[:8]))}{more} is 0 throughout, so a "
            "penalty will not protect them: every sample's gradient is 0 there, as of A of a LoRA "
            "while B is 0. Fit after training, or freeze what is not used",
            stacklevel=stacklevel + 1,
        )


def _is_true(flag: Tensor) -> bool:
    return bool(flag if type(flag) is Tensor else whole(flag))
