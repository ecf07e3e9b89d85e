r"""Kronecker-factored Fisher information (KFAC) of linear layers, convolutions and their like.

A layer y_t = W a_t + b adds to the Fisher of [W b], with a_t extended by a 1 for the bias and g_nkt
the logits' cotangent v_nk (:mod:`ars.regularizers.fisher.estimators`) pulled back to y_t,

    F = 1/N sum_n sum_k vec(S_nk) vec(S_nk)^T  ~  G (x) A,      S_nk = sum_t g_nkt a_nt^T.

What A and G are depends on how the positions t share the weight:

    expand   A = mean_nt a_nt a_nt^T                     G = 1/N sum_nkt g_nkt g_nkt^T
    reduce   A = mean_n (mean_t a_nt) (mean_t a_nt)^T    G = 1/N sum_nk s_nk s_nk^T,
                                                         s_nk = sum_t g_nkt
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from ars.regularizers.checks import (
    check_can_differentiate,
    check_draws,
    check_generator,
    check_logits,
    check_targets,
    check_trainable,
    checked_choice,
    checked_module,
)
from ars.regularizers.fisher.batches import (
    Batch,
    LossFunction,
    check_loss_fn,
    labelled_samples,
    samples_with_losses,
)
from ars.regularizers.fisher.estimators import (
    ESTIMATORS,
    Chunk,
    Samples,
    cotangents,
    drawn,
    of_losses,
)
from ars.regularizers.fisher.layers import (
    MatrixLayer,
    Use,
    batched_rows,
    check_blocks,
    check_order_by_gradients,
    fit_layers,
    outer_products,
    proven_batches,
    recorded_uses,
    uses_by_matrix,
    warn_of_others,
)
from ars.regularizers.fisher.own_products import Block
from ars.regularizers.fisher.processes import Group, Processes
from ars.regularizers.fisher.row_proof import computed_in

__all__ = ["KroneckerFactors", "KroneckerFisher", "nearest_product"]

Sharing: TypeAlias = Literal["expand", "reduce"]
_SHARINGS: tuple[Sharing, ...] = get_args(Sharing)
# A batch's gradient, squared or not, has no factors.
_ESTIMATORS = tuple(name for name in ESTIMATORS if name != "batched")


class KroneckerFactors(NamedTuple):
    """The two factors of one layer's Fisher, F = G (x) A; of several matrices, those of each.

    A parameter that holds several matrices, such as experts', has a block of F for each of them,
    and its factors one dimension more, in front.

    Args:
        inputs: A, the second moment of the layer's inputs: (d, d), or (d + 1, d + 1) with the bias
            as the last column. For a convolution d counts channels times kernel elements.
        outputs: G, the second moment of the gradients of its outputs: (p, p).
    """

    inputs: Tensor
    outputs: Tensor


class FactorSums(NamedTuple):
    """Sums of one layer's outer products, and how many rows the inputs' is of."""

    inputs: Tensor
    outputs: Tensor
    positions: Tensor

    @classmethod
    def zero(cls, rows: Tensor, p: int, block: Block | None) -> "FactorSums":
        """Start with nothing, of rows (..., d) of inputs and of ``p`` outputs."""
        d, blocks = rows.shape[-1], () if block is None else (block.of,)
        positions = rows.new_zeros(blocks, dtype=torch.int64)
        return cls(rows.new_zeros(*blocks, d, d), rows.new_zeros(*blocks, p, p), positions)

    def of(self, block: Block | None) -> "FactorSums":
        """Return the sums of one matrix, which share this one's memory."""
        return self if block is None else FactorSums(*(each[block.number] for each in self))

    def add_inputs(self, rows: Tensor, valid: Tensor, *, reduce: bool) -> None:
        """Add what the layer read.

        Args:
            rows: (B, t, d).
            valid: Which of them count, (B, t).
            reduce: Average the positions of a sample first.
        """
        if reduce:
            weights = valid.to(rows.dtype)
            rows = torch.einsum("btd,bt->bd", rows, weights / weights.sum(1, keepdim=True).clamp(1))
            valid = valid.any(1)
        self.inputs.add_(outer_products(rows[valid]))
        self.positions.add_(valid.sum())

    def add_outputs(self, rows: Tensor, *, reduce: bool) -> None:
        """Add the gradients of what the layer returned, (B, t, p), summed over t to ``reduce``."""
        rows = rows.to(self.outputs.dtype)
        self.outputs.add_(outer_products(rows.sum(1) if reduce else rows.flatten(0, 1)))

    def means(self, samples: int) -> KroneckerFactors:
        """Return the factors, given how many samples there were."""
        positions = self.positions.clamp(min=1)[..., None, None]
        return KroneckerFactors(self.inputs / positions, self.outputs / samples)


class KroneckerFisher:
    r"""Kronecker-factored Fisher information (KFAC) of a model with categorical outputs.

    .. math:: F_{[W\,b]} \approx G \otimes A, \quad
              A = \mathbb{E}[a a^T], \quad G = \mathbb{E}[g g^T]

    for every :class:`torch.nn.Linear`, GPT-2's ``Conv1D`` (whose weight is stored transposed, W^T),
    every convolution with one group, the projections of :class:`torch.nn.MultiheadAttention` and
    the experts of Mixtral and its like, with the layer's inputs
    :math:`a` (patches of a convolution; a 1 is appended for a trained bias) and the gradients
    :math:`g` of its outputs. Where the diagonal Fisher holds one number a weight, this keeps which
    directions of the inputs and of the outputs matter.

    A sample is a sequence; the positions t of a layer share its weight. With ``"expand"``,
    :math:`A = \operatorname{mean}_{nt} a a^T` and :math:`G = \frac1N \sum_{nt} g g^T`: exact for a
    linear network with a loss at every position, as in a language model. With ``"reduce"``,
    :math:`A = \operatorname{mean}_n \bar a \bar a^T` with :math:`\bar a = \operatorname{mean}_t a`
    and :math:`G = \frac1N \sum_n s s^T` with :math:`s = \sum_t g`: exact for a linear network that
    averages its positions, as many image models do. With one position they are equal. Several uses
    of one weight count as further positions.

    Factors of a parameter that holds several matrices have a dimension in front: an expert's rows
    are the tokens routed to it, and where attention's query, key and value are not one tensor,
    ``in_proj_weight`` is three matrices.

    Parameters of other layers have no factors; :meth:`fit` warns and names them.

    Several processes average over the samples of all, as those of a
    :class:`~ars.regularizers.DiagonalFisher` do. Sharded parameters are gathered meanwhile; the
    factors are whole in each process.

    Cost: one forward pass and one backward pass without weight gradients (``"exact"``: one for
    each class and target position) a batch, and d^2 + p^2 products a position and layer.

    Args:
        model: Maps a batch of inputs, shape (B, ...), to logits of shape (B, C), or (B, T, C) for
            sequences; samples may not influence one another.
        estimator: Where the gradients come from: ``"sketch"``, ``"mc"``, ``"exact"``,
            ``"empirical"`` or ``"logit_reversal"``, as for
            :class:`~ars.regularizers.DiagonalFisher`.
        sharing: ``"expand"`` or ``"reduce"``.
        draws: Independent signs or labels a sample, >= 1, averaged; ``"sketch"`` and ``"mc"`` only.
        generator: Source of the random signs and labels; by default torch's own for the device. Of
            several processes each draws from its own: give each another seed. By default they draw
            different numbers, however they are seeded.
        process_group: The processes whose samples are averaged over: None for torch's default
            group, if ``torch.distributed`` is initialised; False for this process alone.

    Raises:
        TypeError: ``model`` is not a module, ``generator`` not a generator, or ``process_group``
            not a group that this process is in.
        ValueError: Unknown ``estimator`` or ``sharing``; ``draws`` not a positive integer, or of an
            estimator that draws nothing.

    Example:
        >>> import torch
        >>> from ars.regularizers import KroneckerFisher
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)  # p = (1/2, 1/2) for every input
        >>> batch = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([0, 1])
        >>> factors = KroneckerFisher(model, "exact").fit([batch]).factors["weight"]
        >>> factors.inputs  # mean of x x^T
        tensor([[5., 1.],
                [1., 2.]])
        >>> factors.outputs  # diag(p) - p p^T
        tensor([[ 0.2500, -0.2500],
                [-0.2500,  0.2500]])

    References:
        Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate
        curvature", arXiv:1503.05671.
        Grosse and Martens, "A Kronecker-factored approximate Fisher matrix for convolution layers",
        arXiv:1602.01407.
        Eschenhagen et al., "Kronecker-factored approximate curvature for modern neural network
        architectures", arXiv:2311.00636.
    """

    _processes = Processes(None)  # of pickles of version 0.1.0, which have none

    def __init__(
        self,
        model: nn.Module,
        estimator: str = "sketch",
        *,
        sharing: Sharing = "expand",
        draws: int = 1,
        generator: torch.Generator | None = None,
        process_group: Group = None,
    ) -> None:
        self.model = checked_module(model)
        self._processes = Processes(process_group)
        self.estimator: str = checked_choice("estimator", estimator, _ESTIMATORS)
        self.sharing: Sharing = checked_choice("sharing", sharing, _SHARINGS)
        check_draws(draws, estimator)
        check_generator(generator)
        self.draws = draws
        self.generator = generator
        self._factors: dict[str, KroneckerFactors] | None = None
        self._n_samples = 0

    @property
    def factors(self) -> dict[str, KroneckerFactors]:
        """The factors of each layer, by the name of its weight.

        Raises:
            RuntimeError: :meth:`fit` has not succeeded yet.
        """
        if self._factors is None:
            raise RuntimeError("this KroneckerFisher is not fitted; call fit(batches) first")
        return self._factors

    @property
    def n_samples(self) -> int:
        """Samples of all processes that :attr:`factors` average over, 0 before :meth:`fit`."""
        return self._n_samples

    def fit(
        self,
        batches: Iterable[Batch] | Iterable[Any],
        n_samples: int | None = None,
        *,
        loss_fn: LossFunction | None = None,
    ) -> "KroneckerFisher":
        """Estimate the factors over ``batches``; every call starts afresh.

        The model is in evaluation mode meanwhile and afterwards as it was. Batches are used as
        they are: their size changes the memory and the speed, not the result.

        Args:
            batches: Pairs (inputs, targets), or mappings with ``labels``, as for
                :meth:`ars.regularizers.DiagonalFisher.fit`. A target of -100 masks its position: it
                sends no gradient, and does not count in A of a layer with as many positions as
                targets (nor does a fully masked sample).
            n_samples: Stop after exactly that many samples of this process, within a batch if need
                be, >= 1; by default all are used.
            loss_fn: Another loss than the cross-entropy of the logits, with
                ``estimator="empirical"``, as for :meth:`ars.regularizers.DiagonalFisher.fit`. All
                positions count in A then.

        Returns:
            This object.

        Raises:
            TypeError: A batch is none of these, targets are not int64, the model does not
                return a floating-point tensor, or is one of FullyShardedDataParallel.
            ValueError: No samples, or fewer than ``n_samples``; shapes or devices that do not fit;
                a target out of range; more than 4096 backward passes a sample; no layer to factor,
                or samples that are mixed in one; a factor that is not finite; a wrong
                ``process_group`` of a sharded model.
            RuntimeError: A layer ran outside autograd, or another process could not fit its
                samples.
        """
        check_loss_fn(loss_fn, self.estimator, "sequence")
        check_can_differentiate("fit")
        add = partial(self._add_own_samples, batches, n_samples, loss_fn)
        layers, totals, seen = fit_layers(self.model, self._processes, FactorSums, add)
        factors = {}
        for name, total in totals:
            factors[name] = total.means(seen)
            if not all(factor.isfinite().all() for factor in factors[name]):
                raise ValueError(
                    f"a factor of {name!r} is not finite; check that the model's activations and "
                    "gradients are finite (float16 overflows: use bfloat16 or float32)"
                )
        warn_of_others("KroneckerFisher", self.model, layers, factors)
        self._factors, self._n_samples = factors, seen
        return self

    def _add_own_samples(
        self,
        batches: Iterable[Any],
        n_samples: int | None,
        loss_fn: LossFunction | None,
        layers: dict[str, MatrixLayer],
        sums: dict[str, FactorSums],
    ) -> int:
        """Add this process's samples to ``sums``, and count them."""
        check_trainable({n: p for n, p in self.model.named_parameters() if p.requires_grad})
        generator, seen = self.generator, 0
        alone = self._processes.count == 1
        if loss_fn is None:
            samples = labelled_samples(self.model, batches, n_samples, needed=alone)
        else:
            samples = samples_with_losses(self.model, batches, loss_fn, n_samples, needed=alone)
        estimator = "given" if loss_fn else self.estimator
        with recorded_uses(self.model, layers) as uses, torch.enable_grad():
            ordered = self.sharing == "reduce"
            order = partial(self._check_order, uses)
            proven = proven_batches(
                self.model, uses, samples, _checked_logits, order, ordered=ordered
            )
            for inputs, targets, logits in proven:
                if generator is None:
                    generator = self._processes.generator(targets.device)
                if loss_fn is None:
                    chunk = drawn(
                        inputs,
                        targets,
                        self.estimator,
                        draws=self.draws,
                        classes=logits.shape[-1],
                        generator=generator,
                    )
                else:
                    chunk = of_losses(inputs, targets)
                # A copy: activation checkpointing runs layers again during the backward pass.
                self._add(sums, layers, list(uses), logits, chunk, estimator)
                seen += len(targets)
        return seen

    def _check_order(self, uses: list[Use], _: Samples, logits: Tensor, number: int) -> Tensor:
        generator = torch.Generator(logits.device).manual_seed(number)
        float16 = torch.float16 in {computed_in(self.model.parameters(), logits), logits.dtype}
        edges = [_edge(use) for use in uses]
        return check_order_by_gradients(list(uses), edges, logits, generator, float16=float16)

    def _add(
        self,
        sums: dict[str, FactorSums],
        layers: dict[str, MatrixLayer],
        uses: list[Use],
        logits: Tensor,
        chunk: Chunk,
        estimator: str,
    ) -> None:
        """Add one batch: the inputs of every layer once, its output gradients a cotangent."""
        reduce = self.sharing == "reduce"
        edges = [_edge(use) for use in uses]
        for (name, block), mine in uses_by_matrix(uses).items():
            with_bias = layers[name].bias is not None
            rows, valid = batched_rows(mine, chunk.targets, with_bias=with_bias)
            if name not in sums:
                sums[name] = FactorSums.zero(rows, mine[0].width, block)
            check_blocks(name, sums[name].positions, block)
            sums[name].of(block).add_inputs(rows, valid, reduce=reduce)
        for cotangent in cotangents(estimator, logits.detach(), chunk):
            found = torch.autograd.grad(
                logits, edges, cotangent, retain_graph=True, allow_unused=True
            )
            gradients: dict[tuple[str, Block | None], list[Tensor]] = {}
            for use, gradient in zip(uses, found, strict=True):
                if gradient is not None:
                    rows = use.gradient_rows(gradient).unflatten(0, (len(logits), -1))
                    gradients.setdefault((use.weight, use.block), []).append(rows)
            for (name, block), parts in gradients.items():
                sums[name].of(block).add_outputs(torch.cat(parts, 1), reduce=reduce)


def _checked_logits(outputs: object, targets: Tensor, number: int) -> Tensor:
    logits = check_logits(outputs, targets)
    check_targets(targets, logits.shape[-1], number)
    return logits


def _edge(use: Use) -> GradientEdge:
    if use.output is None:
        raise RuntimeError(
            f"the layer of {use.weight!r} ran without a graph; remove torch.no_grad() from the "
            "model's forward, and give activation checkpointing use_reentrant=False"
        )
    return use.output


def nearest_product(first: KroneckerFactors, second: KroneckerFactors) -> KroneckerFactors:
    """Return the Kronecker product nearest to the sum of two, in the Frobenius norm.

    Rearranged, G (x) A is the outer product vec(G) vec(A)^T, so the nearest one is the leading term
    of a singular value decomposition of rank two. It takes inner products of the factors only: with
    S_G and S_A the 2 x 2 Gram matrices of the vec(G_i) and vec(A_i), the leading right singular
    vector is sum_i y_i vec(A_i), where y = L w, S_G = L L^T, and w is the leading eigenvector of
    L^T S_A L. Positive semi-definite factors have inner products >= 0, hence (Perron and Frobenius)
    y >= 0, and the result is positive semi-definite again.

    Args:
        first: A_1 and G_1, symmetric and positive semi-definite.
        second: A_2 and G_2, of the same shapes.

    Returns:
        A, a weighted mean of the two A_i, and G, a sum of the G_i with weights; exact where the
        A_i, or the G_i, are multiples of one another.

    References:
        Van Loan and Pitsianis, "Approximation with Kronecker products", 1993.
    """
    s_a, s_g = (_gram(one, two) for one, two in zip(first, second, strict=True))
    values, vectors = torch.linalg.eigh(s_g)
    root = vectors * values.clamp(min=0).sqrt()  # L
    y = root @ torch.linalg.eigh(root.T @ s_a @ root).eigenvectors[:, -1]
    y = y.abs()  # an eigenvector's sign is arbitrary, and in a tie its direction
    (a1, g1), (a2, g2) = first, second
    if not y @ s_a @ y > 0:  # both products are 0, and so is that of the sums
        return KroneckerFactors(a1 + a2, g1 + g2)
    y = y / y.sum()
    x = s_a @ y / (y @ s_a @ y)
    y, x = y.to(a1.dtype), x.to(g1.dtype)
    return KroneckerFactors(y[0] * a1 + y[1] * a2, x[0] * g1 + x[1] * g2)


def _gram(first: Tensor, second: Tensor) -> Tensor:
    """Inner products of two matrices with themselves and each other, (2, 2) float64."""
    one, two = first.double().flatten(), second.double().flatten()
    return torch.stack([one @ one, one @ two, two @ one, two @ two]).view(2, 2)
