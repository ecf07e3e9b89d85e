"""The tensors of a step, kept from one step to the next: only the gradients are read anew."""

from collections.abc import Callable
from itertools import chain, compress, repeat
from operator import attrgetter, is_, is_not, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ars.batch import Batch
from ars.penalty import Term

__all__ = ["Collector"]

_GRAD, _IS_SPARSE = attrgetter("grad"), attrgetter("is_sparse")
_PARAMS = itemgetter("params")

Groups = list[dict[str, Any]]
State = dict[Tensor, dict[str, Any]]
Append = Callable[[Batch, int, int, Tensor], None]


class _Kept(NamedTuple):
    """A batch, and the objects it was made of."""

    batch: Batch
    params: list[Tensor]
    present: list[bool]  # whether each of them had a gradient
    layout: list[tuple[int, bool]]
    terms: dict[Tensor, Term]
    states: list[dict[str, Any]]  # of all parameters that have one
    active: list[dict[str, Any]]  # of those in the batch
    values: list[Any]
    viewed: list[Tensor]  # complex ones, of which the batch holds views
    addresses: list[int]

    def holds(
        self,
        params: list[Tensor],
        present: list[bool],
        groups: Groups,
        state: State,
        terms: dict[Tensor, Term],
    ) -> bool:
        """Whether the batch is still made of these very objects.

        Objects are compared, not their names or values: a user may put another tensor into the
        state, or another parameter into a group, without telling the optimizer. Where an object's
        memory is does not matter here, but to the kernels, which look themselves.
        """
        return (
            self.terms is terms
            and self.present == present
            and _same(self.params, params)
            and self.layout == _layout(groups)
            and _same(self.states, list(state.values()))
            and _same(self.values, _values(self.active))
            and self.addresses == list(map(Tensor.data_ptr, self.viewed))
        )


class Collector:
    """Gathers what a step works on.

    Looking whether anything has changed costs a tenth of gathering it: a Python loop over the
    tensors costs microseconds a tensor, ``map`` over a C function tens of nanoseconds.

    Attributes:
        rebuilds: How often everything was gathered.
    """

    def __init__(self) -> None:
        self.rebuilds = 0
        self._kept: _Kept | None = None

    def collect(
        self, groups: Groups, state: State, terms: dict[Tensor, Term], append: Append
    ) -> Batch:
        """Return the batch of all parameters that have a gradient.

        Args:
            groups: The optimizer's parameter groups.
            state: Its state.
            terms: Its penalty; a new dictionary for a new penalty.
            append: Called for each of them in order, with the batch, the index of its group, its
                own index among all parameters, and itself: completes its state and puts all but its
                gradient into the batch.

        Returns:
            The batch, the same object until something but the gradients changes. Forget its
            gradients after the step, or they outlive ``zero_grad``.

        Raises:
            RuntimeError: A gradient is sparse; nothing has been changed then.
        """
        params = list(chain.from_iterable(map(_PARAMS, groups)))
        grads = list(map(_GRAD, params))
        present = list(map(is_not, grads, repeat(None)))
        if False in present:
            grads = list(compress(grads, present))
        if any(map(_IS_SPARSE, grads)):
            raise RuntimeError(
                "this optimizer does not support sparse gradients: use "
                "torch.optim.SparseAdam, or an embedding with sparse=False"
            )
        kept = self._kept
        if kept is None or not kept.holds(params, present, groups, state, terms):
            self._kept = None  # lest it stay when making the new one fails
            kept = self._kept = _make(params, present, groups, state, terms, append)
            self.rebuilds += 1
        batch = kept.batch
        batch.grads = grads
        if kept.viewed:
            batch.grads = [torch.view_as_real(g) if g.is_complex() else g for g in grads]
        return batch


def _make(
    params: list[Tensor],
    present: list[bool],
    groups: Groups,
    state: State,
    terms: dict[Tensor, Term],
    append: Append,
) -> _Kept:
    batch = Batch()
    owners = chain.from_iterable([i] * len(group["params"]) for i, group in enumerate(groups))
    active, viewed = [], []
    for number, (param, index) in compress(enumerate(zip(params, owners, strict=True)), present):
        append(batch, index, number, param)
        active.append(state[param])
        if param.is_complex():
            operands = (param, *state[param].values())
            viewed += [t for t in operands if isinstance(t, Tensor) and t.is_complex()]
    return _Kept(
        batch=batch,
        params=params,
        present=present,
        layout=_layout(groups),
        terms=terms,
        states=list(state.values()),
        active=active,
        values=_values(active),
        viewed=viewed,
        addresses=list(map(Tensor.data_ptr, viewed)),
    )


def _layout(groups: Groups) -> list[tuple[int, bool]]:
    """What the batch takes from the groups, but the parameters: hyperparameters are read live."""
    return [(len(group["params"]), group["amsgrad"]) for group in groups]


def _values(states: list[dict[str, Any]]) -> list[Any]:
    """All entries of the parameters' states, one after the other."""
    return list(chain.from_iterable(map(dict.values, states)))


def _same(ours: list[Any], theirs: list[Any]) -> bool:
    """Whether two lists hold the same objects; ``==`` would compare the tensors' elements."""
    return len(ours) == len(theirs) and all(map(is_, ours, theirs))
