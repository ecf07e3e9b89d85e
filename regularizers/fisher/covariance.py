r"""Second moments of what each layer reads: the directions a change of its weight acts on.

A change D of a weight matrix changes the layer's outputs by D a, on average over the inputs a by

    E ||D a||^2 = tr(D A D^T),      A = E[a a^T],

so A weighs each input direction by how much the data use it. It is not centred: a constant input
matters too.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ars.regularizers.checks import (
    checked_batch,
    checked_batches,
    checked_module,
)
from ars.regularizers.fisher.batches import Batch, Labels, take_samples, unlabelled_samples
from ars.regularizers.fisher.estimators import Samples
from ars.regularizers.fisher.layers import (
    MatrixLayer,
    batched_rows,
    check_blocks,
    check_order,
    fit_layers,
    matrix_layers,
    outer_products,
    proven_batches,
    recorded_uses,
    warn_of_others,
)
from ars.regularizers.fisher.own_products import Block
from ars.regularizers.fisher.processes import Group, Processes

__all__ = ["ActivationCovariance"]


class ActivationCovariance:
    r"""Uncentred covariance of the inputs of every linear and convolution layer.

    .. math:: A = \frac{1}{n} \sum_{i=1}^{n} a_i a_i^T

    over all positions :math:`a_i` of all samples, streamed batch by batch; the patches of a
    convolution are its inputs. A parameter that holds several matrices, such as experts', has one
    for each, in a dimension in front. It needs no labels and no backward pass. Its leading
    eigenvectors are the subspace that gradient projection memory protects;
    :class:`KroneckerPenalty` takes it whole, as a Kronecker-factored Fisher whose outputs all
    matter alike.

    Parameters of other layers have none; :meth:`fit` warns and names them.

    Several processes average over the samples of all, as those of a
    :class:`~ars.regularizers.DiagonalFisher` do. Sharded parameters are gathered meanwhile; the
    result is whole in each process.

    Args:
        model: Maps a batch of inputs, shape (B, ...), to anything.
        process_group: The processes whose samples are averaged over: None for torch's default
            group, if ``torch.distributed`` is initialised; False for this process alone.

    Raises:
        TypeError: ``model`` is not a module, or ``process_group`` not a group that this process is
            in.

    Example:
        >>> import torch
        >>> from ars.regularizers import ActivationCovariance
        >>> model = torch.nn.Linear(2, 3)
        >>> activations = ActivationCovariance(model)
        >>> activations.fit([torch.tensor([[1.0, 2.0], [3.0, 0.0]])]).covariance["weight"]
        tensor([[5., 1.],
                [1., 2.]])
        >>> activations.mean["weight"]
        tensor([2., 1.])

    References:
        Saha et al., "Gradient projection memory for continual learning", arXiv:2103.09762.
        Zeng et al., "Continual learning of context-dependent processing in neural networks",
        arXiv:1810.01256.
    """

    _processes = Processes(None)  # of pickles of version 0.1.0, which have none

    def __init__(self, model: nn.Module, *, process_group: Group = None) -> None:
        self.model = checked_module(model)
        self._processes = Processes(process_group)
        self._moments: dict[str, _Moment] | None = None
        self._n_samples = 0

    @property
    def covariance(self) -> dict[str, Tensor]:
        """E[a a^T], (d, d), by the name of the layer's weight.

        Raises:
            RuntimeError: :meth:`fit` has not succeeded yet.
        """
        return {name: moment[..., :-1, :-1] for name, moment in self.augmented.items()}

    @property
    def mean(self) -> dict[str, Tensor]:
        """E[a], (d,), by the name of the layer's weight.

        Raises:
            RuntimeError: :meth:`fit` has not succeeded yet.
        """
        return {name: moment[..., -1, :-1] for name, moment in self.augmented.items()}

    @property
    def augmented(self) -> dict[str, Tensor]:
        """E[a a^T] of inputs with a 1 appended, which is what the bias reads: (d + 1, d + 1).

        Raises:
            RuntimeError: :meth:`fit` has not succeeded yet.
        """
        return {name: moment.mean for name, moment in self._fitted().items()}

    @property
    def n_samples(self) -> int:
        """Samples (sequences) that all processes saw, 0 before :meth:`fit`."""
        return self._n_samples

    @torch.inference_mode(False)  # whose tensors could not be changed afterwards
    def fit(
        self,
        batches: Iterable[Tensor | Batch],
        n_samples: int | None = None,
    ) -> "ActivationCovariance":
        """Average over ``batches``; every call starts afresh.

        The model is in evaluation mode meanwhile and afterwards as it was.

        Args:
            batches: Inputs on the model's device, or pairs (inputs, targets) as for
                :meth:`ars.regularizers.DiagonalFisher.fit`, whose targets only say with -100 which
                positions do not count. Or mappings, of which the model is called with all but
                ``labels`` by name: positions count by their labels, as there; without labels by an
                ``attention_mask`` (B, T), if there is one.
            n_samples: Stop after exactly that many samples of this process, within a batch if need
                be, >= 1; by default all are used.

        Returns:
            This object.

        Raises:
            TypeError: A batch is neither a tensor, a pair of tensors nor a mapping, or the model is
                one of FullyShardedDataParallel.
            ValueError: No samples, or fewer than ``n_samples``; no layer to look at, or samples
                that are mixed in one; no position that counts, or activations that are not finite;
                a wrong ``process_group`` of a sharded model.
            RuntimeError: Another process could not fit its samples.
        """
        add = partial(self._add_own_samples, batches, n_samples)
        layers, totals, seen = fit_layers(self.model, self._processes, _Sums, add)
        moments = {}
        for name, total in totals:
            if not total.positions.any():
                raise ValueError(f"every position of {name!r} is masked: nothing to average over")
            counts = total.positions.clamp(min=1)[..., None, None]
            moments[name] = _Moment(total.products / counts, total.positions)
            if not moments[name].mean.isfinite().all():
                raise ValueError(
                    f"the inputs of {name!r} are not finite; look for an overflow in the model "
                    "(float16 overflows: use bfloat16 or float32)"
                )
        warn_of_others("ActivationCovariance", self.model, layers, moments)
        self._moments, self._n_samples = moments, seen
        return self

    def _add_own_samples(
        self,
        batches: Iterable[Tensor | Batch],
        n_samples: int | None,
        layers: dict[str, MatrixLayer],
        sums: dict[str, "_Sums"],
    ) -> int:
        """Add this process's samples to ``sums``, and count them.

        Raises:
            TypeError: The batches are one pair.
        """
        if _is_one_pair(batches):
            raise TypeError(
                "batches is a pair of inputs and targets, not a list of batches; pass it as "
                "[(inputs, targets)]"
            )
        given = checked_batches(batches)
        labels = Labels(self.model)
        pairs = (_labelled(labels, batch, index) for index, batch in enumerate(given))
        samples = take_samples(pairs, n_samples, needed=self._processes.count == 1)
        seen = 0
        with recorded_uses(self.model, layers) as uses, torch.no_grad():

            def order(inputs: Samples, *_: object) -> Tensor:
                return check_order(self.model, uses, inputs)

            proven = proven_batches(self.model, uses, samples, lambda outputs, *_: outputs, order)
            for _, targets, _ in proven:
                for use in uses:
                    rows, valid = batched_rows([use], targets, with_bias=True)
                    chosen = rows[valid]
                    if use.weight not in sums:
                        sums[use.weight] = _Sums.zero(rows, use.block)
                    check_blocks(use.weight, sums[use.weight].positions, use.block)
                    products, positions = sums[use.weight].of(use.block)
                    products.add_(outer_products(chosen))
                    positions.add_(len(chosen))
                seen += len(targets)
        return seen

    def merge(self, other: "ActivationCovariance") -> "ActivationCovariance":
        """Return what :meth:`fit` would have found on the data of both, of the model as it was.

        A layer that only one of the two has, such as a new head, is as it is there.

        Args:
            other: Fitted, of a model with layers of this one's model.

        Raises:
            TypeError: ``other`` is not an ActivationCovariance.
            ValueError: The other has a layer that this model does not have; names it.
            RuntimeError: One of the two is not fitted.
        """
        if not isinstance(other, ActivationCovariance):
            raise TypeError(f"other must be an ActivationCovariance, got {type(other).__name__}")
        mine, theirs = self._fitted(), other._fitted()
        layers = matrix_layers(self.model)
        for name in theirs:
            if name not in mine and name not in layers:
                raise ValueError(
                    f"the other has {name!r}, which is no layer of this one's "
                    f"{type(self.model).__name__}: fit both on one model"
                )
        merged = ActivationCovariance(self.model, process_group=self._processes.group)
        merged._moments = {}
        for name in mine | theirs:
            if name not in mine or name not in theirs:  # not run, or not there, in the one's data
                merged._moments[name] = mine.get(name) or theirs[name]
                continue
            moment, another = mine[name], theirs[name]
            if moment.mean.shape != another.mean.shape:
                raise ValueError(
                    f"{name!r} has {len(another.mean) - 1} inputs in the other, "
                    f"{len(moment.mean) - 1} here: fit both on one model"
                )
            positions = moment.positions + another.positions
            share = another.positions.double() / positions.clamp(min=1)
            difference = (another.mean - moment.mean) * share[..., None, None].to(moment.mean)
            merged._moments[name] = _Moment(moment.mean + difference, positions)
        merged._n_samples = self.n_samples + other.n_samples
        return merged

    def _fitted(self) -> dict[str, "_Moment"]:
        if self._moments is None:
            raise RuntimeError("this ActivationCovariance is not fitted; call fit(batches) first")
        return self._moments


class _Sums(NamedTuple):
    """Sum of a a^T over the positions of one layer, and their number, int64."""

    products: Tensor
    positions: Tensor

    @classmethod
    def zero(cls, rows: Tensor, block: Block | None) -> "_Sums":
        """Start with nothing, of rows (..., d)."""
        size, blocks = rows.shape[-1], () if block is None else (block.of,)
        positions = rows.new_zeros(blocks, dtype=torch.int64)
        return cls(rows.new_zeros(*blocks, size, size), positions)

    def of(self, block: Block | None) -> "_Sums":
        """Return the sums of one matrix, which share this one's memory."""
        return self if block is None else _Sums(*(each[block.number] for each in self))


class _Moment(NamedTuple):
    """Mean of a a^T over the positions of one layer, a 1 appended to a, and their number."""

    mean: Tensor
    positions: Tensor


def _is_one_pair(batches: object) -> bool:
    """Whether these are not two batches of inputs, as far as their dtypes tell."""
    return (
        isinstance(batches, (tuple, list))
        and len(batches) == 2
        and all(isinstance(part, Tensor) for part in batches)
        and batches[1].dtype == torch.int64 != batches[0].dtype
    )


def _labelled(labels: Labels, batch: object, index: int) -> tuple[Samples, Tensor]:
    """Return samples and targets; for inputs alone, targets that mask nothing.

    Raises:
        ValueError: There are no inputs.
    """
    if isinstance(batch, Mapping):
        given = batch.get("labels")
        if not isinstance(given, Tensor) or given.dtype != torch.int64:
            return unlabelled_samples(batch, index)
        return labels.samples_and_targets(batch, index, differentiated=False)
    if not isinstance(batch, Tensor):
        inputs, targets = checked_batch(batch, index, segments=False, differentiated=False)
        return Samples.of_inputs(inputs), targets
    if batch.ndim == 0 or len(batch) == 0:
        raise ValueError(f"batch {index} is empty: inputs have shape {tuple(batch.shape)}")
    targets = torch.zeros(len(batch), dtype=torch.int64, device=batch.device)
    return Samples.of_inputs(batch), targets
