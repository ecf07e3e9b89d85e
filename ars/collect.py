"""The tensors of a step, kept from one step to the next: only the gradients are read anew."""

from collections.abc import Callable, Iterable
from itertools import chain, compress, repeat
from operator import attrgetter, is_, is_not, itemgetter, not_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ars.batch import Batch
from ars.penalty import Term
from ars.state import SHAPED_STATE

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # torch's own, and for compiled code: it may take it away
    TensorGuards = None  # type: ignore[assignment, misc]

__all__ = ["Collector", "check_terms"]

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
Check = Callable[[Tensor, Tensor | None], None]


class _Kept(NamedTuple):
    """A batch, and the objects it was made of."""

    batch: Batch
    params: list[Tensor]
    present: list[bool]  # whether each of them had a gradient
    zeros: dict[int, Tensor]  # in the place of gradients that are not there
    included: list[bool]  # whether each of them is in the batch
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
        unused: list[int],
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
            and list(self.zeros) == unused
            and _same(self.params, params)
            and self.layout == _layout(groups)
            and _same(self.states, list(state.values()))
            and _same(self.values, _values(self.active))
            and self.addresses == list(map(Tensor.data_ptr, self.viewed))
            and self.alike(*self.operands)
        )

    def fill(self, grads: list[Tensor | None]) -> list[Tensor]:
        """Return the gradients of the batch, of those of all parameters."""
        for number, zero in self.zeros.items():
            grads[number] = zero
        return list(compress(grads, self.included))  # type: ignore[arg-type]


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
        *,
        proximal: bool = False,
        whole: bool = True,
    ) -> Batch:
        """Return the batch of all parameters that have a gradient, or that the penalty pulls at.

        A parameter without a gradient that the penalty pulls at has a gradient of 0 where the
        penalty's joins it. A proximal penalty moves it by itself. If none has a gradient, there is
        no step, and the batch is empty.

        Args:
            groups: The optimizer's parameter groups.
            state: Its state.
            terms: Its penalty; a new dictionary for a new penalty.
            append: Called for each of them in order, with the batch, the index of its group, its
                own index among all parameters, and itself: completes its state and puts all but its
                gradient into the batch.
            check: Called first for each of them that may not be as it was, with its gradient:
                raises if what belongs to it does not fit it.
            proximal: Whether the penalty is.
            whole: Whether these are all groups, so that the penalty holds none but their
                parameters.

        Returns:
            The batch, the same object until something but the gradients changes. Forget its
            gradients after the step, or they outlive ``zero_grad``.

        Raises:
            RuntimeError: A gradient is sparse; or it, a moment or a part of the penalty has another
                shape, dtype or device than its parameter; or the penalty's parameter has left the
                groups. Nothing has been changed then.
        """
        params = list(chain.from_iterable(map(_PARAMS, groups)))
        grads = list(map(_GRAD, params))
        present = list(map(is_not, grads, repeat(None)))
        unused: list[int] = []
        held: list[int] = []
        if terms and False in present and True in present:
            unused, held = _without_gradient(params, present, terms, proximal=proximal)
            for number in held:
                check(params[number], None)
        kept = self._kept
        if kept is None or not kept.holds(params, present, unused, groups, state, terms):
            self._kept = None  # lest it stay when making the new one fails
            if whole:
                check_terms(terms, params)
            included = list(present)
            for number in unused:
                included[number] = True
            for param, grad in compress(zip(params, grads, strict=True), included):
                check(param, grad)
            kept = _make(params, present, included, groups, state, terms, append)
            grads = kept.fill(grads)
            self._kept = kept
            self._alike, kept.batch.layout = _alike(grads), object()
            self.rebuilds += 1
        else:
            grads = kept.fill(grads)
            if not self._alike(*grads):
                _check_gradients(list(compress(params, kept.included)), grads, check)
                self._alike, kept.batch.layout = _alike(grads), object()
        batch = kept.batch
        batch.grads = grads
        batch.held = _gathered(params, held, groups, append) if held else None
        if kept.viewed:
            batch.grads = [torch.view_as_real(g) if g.is_complex() else g for g in grads]
        return batch

    def has_unused(self) -> bool:
        """Whether the last batch has parameters without a gradient."""
        return self._kept is not None and self._kept.batch.unused


def check_terms(terms: dict[Tensor, Term], params: Iterable[Tensor]) -> None:
    """Raise if a parameter that the penalty pulls at has been taken out of the optimizer.

    Args:
        terms: The penalty.
        params: The optimizer's parameters.

    Raises:
        RuntimeError: One has; a frozen one may have, as it stays where it is.
    """
    for param in terms.keys() - set(params) if terms else ():
        if param.requires_grad:
            raise RuntimeError(
                f"the penalty pulls at a parameter of shape {tuple(param.shape)} that is in this "
                "optimizer no more: where another has taken its place, build the penalty anew and "
                "set optimizer.penalty; otherwise freeze it by requires_grad_(False)"
            )


def _without_gradient(
    params: list[Tensor],
    present: list[bool],
    terms: dict[Tensor, Term],
    *,
    proximal: bool,
) -> tuple[list[int], list[int]]:
    """Find the parameters without a gradient that the penalty pulls at; not the frozen ones.

    Returns:
        Those whose step is taken with a gradient of 0, and those that the proximal step alone
        moves.
    """
    unused: list[int] = []
    held: list[int] = []
    for number in compress(range(len(params)), map(not_, present)):
        param = params[number]
        term = terms.get(param) if param.requires_grad else None
        if term is not None:
            (held if proximal and term.pull is None else unused).append(number)
    return unused, held


def _gathered(params: list[Tensor], numbers: list[int], groups: Groups, append: Append) -> Batch:
    """Return a batch of some of the parameters, without gradients."""
    batch, owners = Batch(), _owners(groups)
    for number in numbers:
        append(batch, owners[number], number, params[number])
    return batch


def _owners(groups: Groups) -> list[int]:
    """Return the index of each parameter's group."""
    owners = ([i] * len(group["params"]) for i, group in enumerate(groups))
    return list(chain.from_iterable(owners))


def _zeros(params: dict[int, Tensor]) -> dict[int, Tensor]:
    """Return a gradient of 0 for each parameter, all in the same memory."""
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    for param in params.values():
        kind = param.dtype, param.device
        last = sum((n - 1) * stride for n, stride in zip(param.shape, param.stride(), strict=True))
        sizes[kind] = max(sizes.get(kind, 0), (1 + last) * (param.numel() > 0))
    memory = {kind: torch.zeros(n, dtype=kind[0], device=kind[1]) for kind, n in sizes.items()}
    return {
        number: torch.zeros_like(param)
        if is_traceable_wrapper_subclass(param)
        else memory[param.dtype, param.device].as_strided(param.shape, param.stride())
        for number, param in params.items()
    }


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
    included: list[bool],
    groups: Groups,
    state: State,
    terms: dict[Tensor, Term],
    append: Append,
) -> _Kept:
    batch, owners = Batch(), _owners(groups)
    active, viewed, operands, absent = [], [], [], {}
    for number, (param, index) in compress(enumerate(zip(params, owners, strict=True)), included):
        append(batch, index, number, param)
        if not present[number]:
            absent[number] = param
            batch.groups[-1] += len(groups)
        active.append(state[param])
        shaped = [param, *(state[param][key] for key in SHAPED_STATE if key in state[param])]
        operands += [*shaped, *(t for t in terms.get(param, ()) if t is not None)]
        if param.is_complex():
            viewed += shaped
    batch.unused = bool(absent)
    return _Kept(
        batch=batch,
        params=params,
        present=present,
        zeros=_zeros(absent),
        included=included,
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
