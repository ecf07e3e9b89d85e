r"""Kronecker-factored Fisher information (KFAC) of linear and convolution layers.

A layer y_t = W a_t + b adds to the Fisher of [W b], with a_t extended by a 1 for the bias and g_nkt
the logits' cotangent v_nk (:mod:`ars.regularizers.estimators`) pulled back to y_t,

    F = 1/N sum_n sum_k vec(S_nk) vec(S_nk)^T  ~  G (x) A,      S_nk = sum_t g_nkt a_nt^T.

What A and G are depends on how the positions t share the weight:

    expand   A = mean_nt a_nt a_nt^T                     G = 1/N sum_nkt g_nkt g_nkt^T
    reduce   A = mean_n (mean_t a_nt) (mean_t a_nt)^T    G = 1/N sum_nk s_nk s_nk^T,
                                                         s_nk = sum_t g_nkt
"""

from collections.abc import Iterable
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from ars.regularizers.batches import (
    check_cost,
    check_logits,
    check_targets,
    checked_batch,
    take_samples,
)
from ars.regularizers.checks import (
    check_can_differentiate,
    check_draws,
    check_generator,
    checked_batches,
    checked_choice,
    checked_module,
)
from ars.regularizers.cotangents import Chunk, cotangents
from ars.regularizers.estimators import ESTIMATORS, IGNORE_INDEX
from ars.regularizers.evaluation import check_trainable, computed_in
from ars.regularizers.factors import FactorSums, KroneckerFactors
from ars.regularizers.layer_checks import (
    check_counts,
    check_order_by_gradients,
    check_used,
    warn_of_others,
)
from ars.regularizers.layers import (
    MatrixLayer,
    Use,
    batched_rows,
    matrix_layers,
    output_rows,
    recorded_uses,
)
from ars.regularizers.operators import Passes

__all__ = ["KroneckerFisher"]

Sharing: TypeAlias = Literal["expand", "reduce"]
_SHARINGS: tuple[Sharing, ...] = get_args(Sharing)
# A batch's gradient, squared or not, has no factors.
_ESTIMATORS = tuple(name for name in ESTIMATORS if name != "batched")


class KroneckerFisher:
    r"""Kronecker-factored Fisher information (KFAC) of a model with categorical outputs.

    .. math:: F_{[W\,b]} \approx G \otimes A, \quad
              A = \mathbb{E}[a a^T], \quad G = \mathbb{E}[g g^T]

    for every :class:`torch.nn.Linear` and every convolution with one group, with the layer's inputs
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

    Parameters of other layers have no factors; :meth:`fit` warns and names them.

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
        generator: Source of the random signs and labels; by default torch's own for the device.

    Raises:
        TypeError: ``model`` is not a module, or ``generator`` not a generator.
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

    def __init__(
        self,
        model: nn.Module,
        estimator: str = "sketch",
        *,
        sharing: Sharing = "expand",
        draws: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        self.model = checked_module(model)
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
        """Samples (sequences) that :attr:`factors` average over, 0 before :meth:`fit`."""
        return self._n_samples

    def fit(
        self, batches: Iterable[tuple[Tensor, Tensor]], n_samples: int | None = None
    ) -> "KroneckerFisher":
        """Estimate the factors over ``batches``; every call starts afresh.

        The model is in evaluation mode meanwhile and afterwards as it was. Batches are used as
        they are: their size changes the memory and the speed, not the result.

        Args:
            batches: Pairs (inputs, targets) as for :meth:`ars.regularizers.DiagonalFisher.fit`. A
                target of -100 masks its position: it sends no gradient, and does not count in A
                of a layer with as many positions as targets (nor does a fully masked sample).
            n_samples: Stop after exactly that many samples, within a batch if need be, >= 1; by
                default all are used.

        Returns:
            This object.

        Raises:
            TypeError: A batch is not a pair of tensors, targets are not int64, or the model does
                not return a floating-point tensor.
            ValueError: No samples, or fewer than ``n_samples``; shapes or devices that do not fit;
                a target out of range; more than 4096 backward passes a sample; no layer to factor,
                or samples that are mixed in one; a factor that is not finite.
            RuntimeError: A layer ran outside autograd.
        """
        check_can_differentiate("fit")
        check_trainable({n: p for n, p in self.model.named_parameters() if p.requires_grad})
        layers = matrix_layers(self.model)
        sums: dict[str, FactorSums] = {}
        seen, passes, orders = 0, Passes(self.model), Passes(self.model)
        pairs = (
            checked_batch(batch, i, segments=False)
            for i, batch in enumerate(checked_batches(batches))
        )
        with recorded_uses(self.model, layers) as uses, torch.enable_grad():
            for index, (inputs, targets) in enumerate(take_samples(pairs, n_samples)):
                uses.clear()
                ordered = self.sharing == "reduce" or bool((targets == IGNORE_INDEX).any())
                checks = orders if ordered else passes
                logits = check_logits(checks.run(inputs), targets)
                check_targets(targets, logits.shape[-1], index)
                check_used(self.model, uses)
                if len(targets) > 1 and checks.needs_proof:
                    check_counts(self.model, uses, inputs)
                    told = self._check_order(uses, logits, index) if ordered else torch.tensor(True)
                    checks.proven(logits, told)
                chunk = self._chunk(inputs, targets, logits.shape[-1])
                # A copy: activation checkpointing runs layers again during the backward pass.
                self._add(sums, layers, list(uses), logits, chunk)
                seen += len(targets)
        factors = {}
        for name in [name for name in layers if name in sums]:
            factors[name] = sums[name].means(seen)
            if not all(factor.isfinite().all() for factor in factors[name]):
                raise ValueError(
                    f"a factor of {name!r} is not finite; check that the model's activations and "
                    "gradients are finite (float16 overflows: use bfloat16 or float32)"
                )
        warn_of_others("KroneckerFisher", self.model, layers, factors)
        self._factors, self._n_samples = factors, seen
        return self

    def _check_order(self, uses: list[Use], logits: Tensor, seed: int) -> Tensor:
        generator = torch.Generator(logits.device).manual_seed(seed)
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
    ) -> None:
        """Add one batch: the inputs of every layer once, its output gradients a cotangent."""
        reduce = self.sharing == "reduce"
        edges = [_edge(use) for use in uses]
        for name in {use.weight: None for use in uses}:
            mine = [use for use in uses if use.weight == name]
            with_bias = layers[name].bias is not None
            rows, valid = batched_rows(mine, chunk.targets, with_bias=with_bias)
            if name not in sums:
                sums[name] = FactorSums.of(rows, len(mine[0].module.weight))
            sums[name].add_inputs(rows, valid, reduce=reduce)
        for cotangent in cotangents(self.estimator, logits.detach(), chunk):
            found = torch.autograd.grad(
                logits, edges, cotangent, retain_graph=True, allow_unused=True
            )
            gradients: dict[str, list[Tensor]] = {}
            for use, gradient in zip(uses, found, strict=True):
                if gradient is not None:
                    rows = output_rows(use.module, gradient).unflatten(0, (len(logits), -1))
                    gradients.setdefault(use.weight, []).append(rows)
            for name, parts in gradients.items():
                sums[name].add_outputs(torch.cat(parts, 1), reduce=reduce)

    def _chunk(self, inputs: Tensor, targets: Tensor, classes: int) -> Chunk:
        """Draw the random numbers of each sample in turn, whatever batch it comes in."""
        positions = targets[0].numel()
        if self.estimator == "exact":
            check_cost("estimator='exact'", "positions * classes", positions, classes)
        draw = ESTIMATORS[self.estimator].draw
        device = targets.device if self.generator is None else self.generator.device
        shape = (self.draws, positions, classes)
        noise = torch.stack([draw(shape, self.generator, device) for _ in targets])
        return Chunk(inputs, targets, noise.to(targets.device), units=None, n_units=1)


def _edge(use: Use) -> GradientEdge:
    if use.output is None:
        raise RuntimeError(
            f"the layer of {use.weight!r} ran without a graph; remove torch.no_grad() from the "
            "model's forward, and give activation checkpointing use_reentrant=False"
        )
    return use.output
