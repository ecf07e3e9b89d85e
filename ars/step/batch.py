"""What one step works on: its tensors, kept from step to step, and its numbers.

Every implementation gets both from here, and begins its step by :func:`begin`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from itertools import chain, compress, repeat
from operator import attrgetter, is_, is_not, itemgetter, not_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ars import reference
from ars.controller import ARSController
from ars.csrc_triton.layout import Operands
from ars.penalty import Term, check_strength
from ars.reference import Scalar
from ars.sharded import is_sharded, local_memory, part_of, parts_like, placements_of
from ars.step.state import PRODUCTS, PRODUCTS_STEP, SHAPED_STATE

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # torch's own, and for compiled code: it may take it away
    TensorGuards = None  # type: ignore[assignment, misc]

__all__ = [
    "DIAGNOSTICS", "Batch", "Collector", "Hyper", "Options", "StepStart", "apply_gate", "begin",
    "check_terms", "has_gradient", "hyper_rows", "is_decoupled", "make_operands", "read_hyper",
    "to_device", "write_diagnostics",
]  # fmt: skip

# The order of the entries of an optimizer's diagnostics buffer, shape (10,), float64.
DIAGNOSTICS = (
    "surprise", "rho", "psi", "phi", "chi", "lr", "beta1", "beta2", "grad_norm", "penalty",
)  # fmt: skip


@dataclasses.dataclass(eq=False)
class Batch:
    """The tensors of one step: entry i of every list belongs to parameter i.

    Args:
        tensors: What belongs to parameters that have a gradient, or a penalty that takes its place;
            complex tensors as their real view.
        grads: Their gradients, or zeros.
        groups: Index of the parameter's row in the list of :class:`Hyper`, see :func:`hyper_rows`.
        numbers: Index of the parameter in its optimizer; of a shard, another one for each.
        owners: The parameters, of which the tensors may be views or parts.
        layout: Another object whenever the gradients are laid out in another way.
        unused: Whether some have no gradient, and zeros in its place.
        is_sharded: Whether some tensors are the parts that this process holds of DTensors.
        proximal_only: Parameters without a gradient that only the proximal step moves: a batch
            without gradients, or None.
    """

    tensors: list[Operands] = dataclasses.field(default_factory=list)
    grads: list[Tensor] = dataclasses.field(default_factory=list)
    groups: list[int] = dataclasses.field(default_factory=list)
    numbers: list[int] = dataclasses.field(default_factory=list)
    owners: list[Tensor] = dataclasses.field(default_factory=list)
    layout: object = None
    unused: bool = False
    is_sharded: bool = False
    proximal_only: "Batch | None" = None

    def append(self, owner: Tensor, tensors: Operands, group: int, number: int) -> None:
        """Add a parameter, but not its gradient.

        Args:
            owner: The parameter.
            tensors: What belongs to it.
            group: Index of its group.
            number: Its own index in the optimizer.
        """
        self.owners.append(owner)
        self.tensors.append(tensors)
        self.groups.append(group)
        self.numbers.append(number)

    def has_anchor(self) -> bool:
        """Whether the step itself has a penalty's value to report."""
        return any(one.anchor is not None for one in self.tensors)


def make_operands(
    param: Tensor,
    state: dict[str, Any],
    term: Term,
    *,
    amsgrad: bool,
    products: bool,
    master: bool,
    parts: bool = True,
) -> Operands:
    """Return what belongs to a parameter; complex tensors as their real view.

    Args:
        param: The parameter.
        state: Its optimizer state, complete.
        term: Its penalty.
        amsgrad: Whether the running maximum of the second moment is used.
        products: Whether a gate makes the betas vary.
        master: Whether bfloat16 parameters are master weights with their remainder.
        parts: Whether to take the parts of DTensors that this process holds.
    """

    def view(tensor: Any) -> Any:
        part = part_of(tensor) if parts else tensor
        return torch.view_as_real(part) if param.is_complex() and part is not None else part

    return Operands(
        param=view(param),
        exp_avg=view(state["exp_avg"]),
        exp_avg_sq=view(state["exp_avg_sq"]),
        step=state["step"],
        max_exp_avg_sq=view(state["max_exp_avg_sq"]) if amsgrad else None,
        products=state[PRODUCTS] if products else None,
        products_step=state[PRODUCTS_STEP] if products else None,
        remainder=view(state.get("param_remainder")) if master else None,
        **dict(zip(term._fields, map(view, term), strict=True)),
    )


class Hyper(NamedTuple):
    """Hyperparameters of one group; lr and betas may be 0-d tensors on the device."""

    lr: Scalar
    beta1: Scalar
    beta2: Scalar
    eps: float
    weight_decay: float
    maximize: bool
    strength: Scalar  # of the penalty
    factor: Scalar = 1.0  # of the task's gradient, after clipping
    beta_factor: Scalar = 1.0  # of the betas, besides the gate of this step; for the kernels alone


class Options(NamedTuple):
    """What holds for all groups of one step."""

    decoupled: bool  # AdamW's weight decay rather than Adam's
    controller: ARSController | None
    surprise: Tensor | None  # None: the gradient norm
    max_norm: float | None
    proximal: bool
    penalty: Tensor | None  # 0-d, value of the part of the penalty that the pulls are of
    diagnostics: Tensor  # (10,) float64, written by the step; see DIAGNOSTICS
    grad_scale: Tensor | None = None  # 1 element, what the gradients are to be divided by
    found_inf: Tensor | None = None  # 1 element; unless 0, nothing moves
    norm: Scalar | None = None  # of the gradients as they are, where it is known already
    stochastic: bool = False  # rounding of bfloat16 parameters and their moments
    seed: int = 0  # of that rounding

    @property
    def needs_norm(self) -> bool:
        """Whether the step needs the gradient norm: as its surprise, or to clip."""
        return self.max_norm is not None or (self.controller is not None and self.surprise is None)


def read_hyper(group: dict[str, Any], strength: Scalar) -> Hyper:
    """Read a parameter group's hyperparameters, which schedulers change between steps.

    Args:
        group: The group.
        strength: The penalty's, if the group has none of its own.

    Raises:
        TypeError: The group's strength is not a number.
        ValueError: The group's strength is out of its range.
    """
    beta1, beta2 = group["betas"]
    own = group["penalty_strength"]
    if own is not None:
        check_strength("penalty_strength", own)
    return Hyper(
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        maximize=group["maximize"],
        strength=strength if own is None else own,
    )


def hyper_rows(hypers: list[Hyper], *, unused: bool) -> list[Hyper]:
    """Return the rows that a batch refers to: the groups', and those of what has no gradient.

    Args:
        hypers: Each group's hyperparameters.
        unused: Whether there are parameters without a gradient; they do not decay.
    """
    return [*hypers, *(h._replace(weight_decay=0.0) for h in hypers)] if unused else hypers


def is_decoupled(groups: list[dict[str, Any]]) -> bool:
    """Return whether the weight decay is AdamW's rather than Adam's: one for all groups.

    Raises:
        ValueError: The groups differ.
    """
    kinds = {bool(group["decoupled_weight_decay"]) for group in groups}
    if len(kinds) > 1:
        raise ValueError(
            "some parameter groups have decoupled_weight_decay=True and some False: one step does "
            "one of them, so use an optimizer for each"
        )
    return kinds.pop()


class StepStart(NamedTuple):
    """How far every step goes before it updates a tensor."""

    hypers: list[Hyper]  # gated
    factor: Scalar  # of the gradients: unscaling and clipping
    values: dict[str, Scalar]  # of the diagnostics, but for the penalty

    def report(self, buffer: Tensor, penalty: Scalar) -> None:
        """Write the diagnostics.

        Args:
            buffer: Where they go.
            penalty: The penalty's value before the step.
        """
        write_diagnostics(buffer, self.values | {"penalty": penalty})


def begin(
    batch: Batch,
    hypers: list[Hyper],
    options: Options,
    grad_norm: Callable[[list[Tensor]], Scalar] = reference.grad_norm,
) -> StepStart | None:
    """Begin a step: unscale, take the norm, observe, gate and clip; the kernels do it themselves.

    Scalars stay where they are, so nothing waits for a device; but ``found_inf`` is read.

    Args:
        batch: The tensors.
        hypers: The rows of hyperparameters.
        options: What holds for all groups.
        grad_norm: Takes the norm of the gradients.

    Returns:
        What the update needs, or None where ``found_inf`` says that nothing may move.
    """
    if options.found_inf is not None and options.found_inf.item() != 0:
        return None
    unscale: Scalar = 1.0
    if options.grad_scale is not None:
        scale = options.grad_scale.to(options.diagnostics.device, torch.float64)
        unscale = 1 / reference.read(scale.reshape(()))
    norm: Scalar = math.nan
    if options.needs_norm:
        norm = (grad_norm(batch.grads) if options.norm is None else options.norm) * unscale
    signals = reference.Signals(surprise=math.nan, rho=0.0, psi=1.0, phi=1.0, chi=0.0)
    controller = options.controller
    if controller is not None:
        signals = controller.observe(norm if options.surprise is None else options.surprise)
        hypers = [apply_gate(hyper, signals, controller.config.gate) for hyper in hypers]
    factor = unscale
    if options.max_norm is not None:
        factor = reference.clip_coefficient(norm, options.max_norm) * unscale
    first = hypers[0]
    values = {**signals._asdict(), "lr": first.lr, "beta1": first.beta1, "beta2": first.beta2}
    return StepStart(hypers, factor, {**values, "grad_norm": norm})


def apply_gate(hyper: Hyper, signals: reference.Signals, gate: tuple[str, ...]) -> Hyper:
    """Apply the controller's signals: ``lr (1 + chi)``, and Phi to what ``gate`` names.

    A tensor among them is brought to Phi's device, if Phi is one.
    """
    phi, factor = signals.phi, 1 + signals.chi

    def scaled(value: Any, scale: Scalar) -> Any:
        return (to_device(value, phi.device) if isinstance(phi, Tensor) else value) * scale

    hyper = hyper._replace(lr=scaled(hyper.lr, factor * phi if "lr" in gate else factor))
    if "betas" in gate:
        hyper = hyper._replace(beta1=scaled(hyper.beta1, phi), beta2=scaled(hyper.beta2, phi))
    return hyper._replace(factor=phi) if "grad" in gate else hyper


def to_device(value: Any, device: torch.device) -> Any:
    """Return a 1-element tensor on a device, 0-d, without waiting for it; leave numbers alone."""
    if not isinstance(value, Tensor):
        return value
    return value.to(device, non_blocking=device.type != "cpu").reshape(())


def write_diagnostics(buffer: Tensor, values: dict[str, Scalar]) -> None:
    """Write all ten diagnostics to ``buffer``, without waiting for a device."""
    row = [values[name] for name in DIAGNOSTICS]
    if buffer.device.type == "cpu":
        numbers = [x.detach().item() if isinstance(x, Tensor) else x for x in row]
        buffer.copy_(torch.tensor(numbers, dtype=buffer.dtype, device="cpu"))
        return
    tensors = [torch.as_tensor(x, dtype=buffer.dtype, device=buffer.device) for x in row]
    buffer.copy_(torch.stack([x.detach().reshape(()) for x in tensors]))


def has_gradient(groups: list[dict[str, Any]]) -> bool:
    """Whether a parameter has a gradient.

    Args:
        groups: The parameter groups.
    """
    return any(param.grad is not None for group in groups for param in group["params"])


_GRAD, _IS_SPARSE = attrgetter("grad"), attrgetter("is_sparse")
_PARAMS = itemgetter("params")
_LAYOUT: tuple[Callable[[Tensor], Any], ...] = (
    *map(attrgetter, ("layout", "dtype", "device", "shape")),
    Tensor.stride,
)
_MUST_MATCH: tuple[Callable[[Tensor], Any], ...] = (
    attrgetter("shape"),
    attrgetter("device"),
    Tensor.is_complex,
)

Groups = list[dict[str, Any]]
State = dict[Tensor, dict[str, Any]]
Append = Callable[[Batch, int, int, Tensor], None]
Check = Callable[[Tensor, Tensor | None], None]


class _CachedBatch(NamedTuple):
    """A batch, and the objects it was made of."""

    batch: Batch
    params: list[Tensor]
    present: list[bool]  # whether each of them had a gradient
    zeros: dict[int, Tensor]  # in the place of gradients that are not there
    included: list[bool]  # whether each of them is in the batch
    sizes: list[tuple[int, bool]]
    terms: dict[Tensor, Term]
    states: list[dict[str, Any]]  # of all parameters that have one
    active: list[dict[str, Any]]  # of those in the batch
    values: list[Any]
    viewed: list[Tensor]  # complex ones, of which the batch holds views
    addresses: list[int]
    operands: list[Tensor]  # all that belongs to the parameters, but steps and gradients
    placed: tuple[list[Any], list[Any]]  # how what is in the batch is placed, and its gradients
    parts: list[Any]  # of what is in the batch
    have_layout: Callable[..., bool]  # whether they are laid out as when they were found to fit

    def is_current(
        self,
        params: list[Tensor],
        present: list[bool],
        absent: list[int],
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
            and list(self.zeros) == absent
            and _are_same_objects(self.params, params)
            and self.sizes == _group_sizes(groups)
            and _are_same_objects(self.states, list(state.values()))
            and _are_same_objects(self.values, _state_values(self.active))
            and (not self.batch.is_sharded or self._are_parts_current())
            and self.addresses == list(map(Tensor.data_ptr, self.viewed))
            and self.have_layout(*self.operands)
        )

    def _are_parts_current(self) -> bool:
        """Whether the same memory is placed in the same way: a DTensor may be given another."""
        owners = self.batch.owners
        return _are_same_objects(self.parts, local_memory(owners)) and _are_same_objects(
            self.placed[0], placements_of(owners)
        )

    def fill(self, grads: list[Tensor | None]) -> list[Tensor]:
        """Return the gradients of the batch, of those of all parameters: the parts of DTensors."""
        for number, zero in self.zeros.items():
            grads[number] = zero
        found: list[Tensor] = list(compress(grads, self.included))  # type: ignore[arg-type]
        if not self.batch.is_sharded:
            return found
        return parts_like(found, self.batch.owners, self.placed[1])


class Collector:
    """Gathers what a step works on, and refuses what does not fit.

    Every implementation gets its tensors from here, so none of them sees a gradient, a moment or a
    penalty of another shape than its parameter's. The batch is kept from step to step, and only the
    gradients are read anew. Looking whether anything has changed costs a tenth of gathering it: a
    Python loop over the tensors costs microseconds a tensor, ``map`` over a C function tens of
    nanoseconds.

    Attributes:
        rebuilds: How often everything was gathered.
    """

    def __init__(self) -> None:
        self.rebuilds = 0
        self._cached: _CachedBatch | None = None
        self._have_layout = _layout_test([])  # of the last gradients that fitted

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
        parts: bool = True,
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
            parts: Whether to work on the parts of DTensors.

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
        absent: list[int] = []  # their steps are taken with a gradient of 0
        proximal_only: list[int] = []
        if terms and False in present and True in present:
            absent, proximal_only = _without_gradient(params, present, terms, proximal=proximal)
            for number in proximal_only:
                check(params[number], None)
        cached = self._cached
        if cached is None or not cached.is_current(params, present, absent, groups, state, terms):
            self._cached = None  # lest it stay when making the new one fails
            if whole:
                check_terms(terms, params)
            included = list(present)
            for number in absent:
                included[number] = True
            for param, grad in compress(zip(params, grads, strict=True), included):
                check(param, grad)
            cached = _gather(params, present, included, groups, state, terms, append, parts=parts)
            grads = cached.fill(grads)
            self._cached = cached
            self._have_layout, cached.batch.layout = _layout_test(grads), object()
            self.rebuilds += 1
        else:
            given = list(compress(grads, cached.included)) if cached.batch.is_sharded else None
            grads = cached.fill(grads)
            if not self._have_layout(*grads):
                _check_gradients(cached.batch.owners, cached.parts, given or grads, grads, check)
                self._have_layout, cached.batch.layout = _layout_test(grads), object()
        batch = cached.batch
        batch.grads = grads
        batch.proximal_only = None
        if proximal_only:
            batch.proximal_only, owners = Batch(), _owners(groups)
            for number in proximal_only:
                append(batch.proximal_only, owners[number], number, params[number])
        if cached.viewed:
            batch.grads = [torch.view_as_real(g) if g.is_complex() else g for g in grads]
        return batch

    def has_unused(self) -> bool:
        """Whether the last batch has parameters without a gradient."""
        return self._cached is not None and self._cached.batch.unused


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
    absent: list[int] = []
    proximal_only: list[int] = []
    for number in compress(range(len(params)), map(not_, present)):
        param = params[number]
        term = terms.get(param) if param.requires_grad else None
        if term is not None:
            (proximal_only if proximal and term.pull is None else absent).append(number)
    return absent, proximal_only


def _owners(groups: Groups) -> list[int]:
    """Return the index of each parameter's group."""
    owners = ([i] * len(group["params"]) for i, group in enumerate(groups))
    return list(chain.from_iterable(owners))


def _zero_gradients(params: dict[int, Tensor]) -> dict[int, Tensor]:
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


def _layout_test(tensors: list[Tensor]) -> Callable[..., bool]:
    """Return a function that says whether as many tensors are laid out as these are now."""
    if TensorGuards is None or not tensors:  # of no tensors, it crashes
        seen = [list(map(what, tensors)) for what in _LAYOUT]
        return lambda *now: all(
            list(map(what, now)) == then for what, then in zip(_LAYOUT, seen, strict=True)
        )
    # A quarter of the time that reading these properties takes. Without the names it crashes.
    guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    return guards.check


def _check_gradients(
    owners: list[Tensor], parts: list[Tensor], given: list[Any], grads: list[Tensor], check: Check
) -> None:
    """Look whether gradients of another layout than before fit, which they may.

    Args:
        owners: The parameters.
        parts: Their parts.
        given: Their gradients, None where zeros take their place.
        grads: The parts of these.
        check: As for :meth:`Collector.collect`.
    """
    fit = all(list(map(what, grads)) == list(map(what, parts)) for what in _MUST_MATCH)
    if not fit or any(map(_IS_SPARSE, grads)):
        for owner, grad in zip(owners, given, strict=True):
            check(owner, grad)


def _gather(
    params: list[Tensor],
    present: list[bool],
    included: list[bool],
    groups: Groups,
    state: State,
    terms: dict[Tensor, Term],
    append: Append,
    *,
    parts: bool,
) -> _CachedBatch:
    batch, owners = Batch(), _owners(groups)
    batch.is_sharded = parts and any(map(is_sharded, compress(params, included)))
    local: Callable[[Tensor], Tensor] = part_of if batch.is_sharded else lambda tensor: tensor
    active, viewed, operands, absent, unplaced = [], [], [], {}, set()
    for number, (param, index) in compress(enumerate(zip(params, owners, strict=True)), included):
        append(batch, index, number, param)
        if not present[number]:
            absent[number] = local(param)
            unplaced.add(param)
            batch.groups[-1] += len(groups)
        active.append(state[param])
        own = [param, *(state[param][key] for key in SHAPED_STATE if key in state[param])]
        shaped = list(map(local, own))
        operands += [*shaped, *(local(t) for t in terms.get(param, ()) if t is not None)]
        if param.is_complex():
            viewed += shaped
    batch.unused = bool(absent)
    placements = placements_of(batch.owners)
    pairs = zip(batch.owners, placements, strict=True)
    of_gradients = [None if param in unplaced else how for param, how in pairs]
    return _CachedBatch(
        batch=batch,
        params=params,
        present=present,
        zeros=_zero_gradients(absent),
        included=included,
        sizes=_group_sizes(groups),
        terms=terms,
        states=list(state.values()),
        active=active,
        values=_state_values(active),
        viewed=viewed,
        addresses=list(map(Tensor.data_ptr, viewed)),
        operands=operands,
        placed=(placements, of_gradients),
        parts=list(map(local, batch.owners)),
        have_layout=_layout_test(operands),
    )


def _group_sizes(groups: Groups) -> list[tuple[int, bool]]:
    """What the batch takes from the groups, but the parameters: hyperparameters are read live."""
    return [(len(group["params"]), group["amsgrad"]) for group in groups]


def _state_values(states: list[dict[str, Any]]) -> list[Any]:
    """All entries of the parameters' states, one after the other."""
    return list(chain.from_iterable(map(dict.values, states)))


def _are_same_objects(ours: list[Any], theirs: list[Any]) -> bool:
    """Whether two lists hold the same objects; ``==`` would compare the tensors' elements."""
    return len(ours) == len(theirs) and all(map(is_, ours, theirs))
