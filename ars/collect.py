"""The tensors of a step, kept from one step to the next: only the gradients are read anew."""

from collections.abc import Callable
from itertools import chain, compress, repeat
from operator import attrgetter, is_, is_not, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ars.batch import Batch
from ars.penalty import Term
from ars.state import SHAPED_STATE

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # torch's own, and for compiled code: it may take it away
    TensorGuards = None  # type: ignore[assignment, misc]

__all__ = ["Collector"]

_GRAD, _IS_SPARSE = attrgetter("grad"), attrgetter("is_sparse")
_LAYOUT: tuple[Callable[[Tensor], Any], ...] = (
    *map(attrgetter, ("layout", "dtype", "device", "shape")),
    Tensor.stride,
)
_MUST_FIT: tuple[Callable[[Tensor], Any], ...] = (
    attrgetter("shape"),
    attrgetter("device"),
    Tensor.is_complex,
)
_PARAMS = itemgetter("params")

Groups = list[dict[str, Any]]
State = dict[Tensor, dict[str, Any]]
Append = Callable[[Batch, int, int, Tensor], None]
Check = Callable[[Tensor, Tensor], None]


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
    operands: list[Tensor]  # all that belongs to the parameters, but steps and gradients
    alike: Callable[..., bool]  # whether the operands are laid out as when they were found to fit

    def holds(
        self,
        params: list[Tensor],
        present: list[bool],
        groups: Groups,
        state: State,
        terms: dict[Tensor, Term],
    ) -> bool:
        """Whether the batch is still made of these very objects, and they are laid out as then.

        Objects are compared, not their names or values: a user may put another tensor into the
        state, or another parameter into a group, without telling the optimizer; or another memory
        into a tensor, by ``param.data = ...``. Where an object's memory is does not matter here,
        but to the kernels, which look themselves.
        """
        return (
            self.terms is terms
            and self.present == present
            and _same(self.params, params)
            and self.layout == _layout(groups)
            and _same(self.states, list(state.values()))
            and _same(self.values, _values(self.active))
            and self.addresses == list(map(Tensor.data_ptr, self.viewed))
            and self.alike(*self.operands)
        )


class Collector:
    """Gathers what a step works on, and refuses what does not fit.

    Every implementation gets its tensors from here, so none of them sees a gradient, a moment or a
    penalty of another shape than its parameter's. Looking whether anything has changed costs a
    tenth of gathering it: a Python loop over the tensors costs microseconds a tensor, ``map`` over
    a C function tens of nanoseconds.

    Attributes:
        rebuilds: How often everything was gathered.
    """

    def __init__(self) -> None:
        self.rebuilds = 0
        self._kept: _Kept | None = None
        self._alike = _alike([])  # whether gradients are laid out as the last ones that fitted

    def collect(
        self,
        groups: Groups,
        state: State,
        terms: dict[Tensor, Term],
        append: Append,
        check: Check,
    ) -> Batch:
        """Return the batch of all parameters that have a gradient.

        Args:
            groups: The optimizer's parameter groups.
            state: Its state.
            terms: Its penalty; a new dictionary for a new penalty.
            append: Called for each of them in order, with the batch, the index of its group, its
                own index among all parameters, and itself: completes its state and puts all but its
                gradient into the batch.
            check: Called first for each of them that may not be as it was, with its gradient:
                raises if what belongs to it does not fit it.

        Returns:
            The batch, the same object until something but the gradients changes. Forget its
            gradients after the step, or they outlive ``zero_grad``.

        Raises:
            RuntimeError: A gradient is sparse; or it, a moment or a part of the penalty has another
                shape, dtype or device than its parameter. Nothing has been changed then.
        """
        params = list(chain.from_iterable(map(_PARAMS, groups)))
        grads = list(map(_GRAD, params))
        present = list(map(is_not, grads, repeat(None)))
        if False in present:
            grads = list(compress(grads, present))
        kept = self._kept
        if kept is None or not kept.holds(params, present, groups, state, terms):
            self._kept = None  # lest it stay when making the new one fails
            for param, grad in zip(compress(params, present), grads, strict=True):
                check(param, grad)
            self._kept = kept = _make(params, present, groups, state, terms, append)
            self._alike, kept.batch.layout = _alike(grads), object()
            self.rebuilds += 1
        elif not self._alike(*grads):
            _check_gradients(list(compress(params, present)), grads, check)
            self._alike, kept.batch.layout = _alike(grads), object()
        batch = kept.batch
        batch.grads = grads
        if kept.viewed:
            batch.grads = [torch.view_as_real(g) if g.is_complex() else g for g in grads]
        return batch


def _alike(tensors: list[Tensor]) -> Callable[..., bool]:
    """Return a function that says whether as many tensors are laid out as these are now."""
    if TensorGuards is None or not tensors:  # of no tensors, it crashes
        seen = [list(map(what, tensors)) for what in _LAYOUT]
        return lambda *now: all(
            list(map(what, now)) == then for what, then in zip(_LAYOUT, seen, strict=True)
        )
    # A quarter of the time that reading these properties takes. Without the names it crashes.
    guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    return guards.check


def _check_gradients(params: list[Tensor], grads: list[Tensor], check: Check) -> None:
    """Look whether gradients of another layout than before fit, which they may."""
    alike = all(list(map(what, grads)) == list(map(what, params)) for what in _MUST_FIT)
    if not alike or any(map(_IS_SPARSE, grads)):
        for param, grad in zip(params, grads, strict=True):
            check(param, grad)


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
    active, viewed, operands = [], [], []
    for number, (param, index) in compress(enumerate(zip(params, owners, strict=True)), present):
        append(batch, index, number, param)
        active.append(state[param])
        shaped = [param, *(state[param][key] for key in SHAPED_STATE if key in state[param])]
        operands += [*shaped, *(t for t in terms.get(param, ()) if t is not None)]
        if param.is_complex():
            viewed += shaped
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
        operands=operands,
        alike=_alike(operands),
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
