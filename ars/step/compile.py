"""The step inside a graph of ``torch.compile``: one opaque operator that takes the ordinary step.

The graph holds the operator, the parameters, the gradients and the surprise. State, controller and
hyperparameters stay outside, and are read when the operator runs: changing a learning rate never
compiles anything again.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ars.surprise import read_surprise

__all__ = ["OPTIMIZERS", "TracedOptimizer", "step_"]


class Optimizer(Protocol):
    """What is stepped: an :class:`ars.ARSAdam`."""

    defaults: dict[str, Any]
    param_groups: list[dict[str, Any]]
    _buffer: Tensor  # its diagnostics
    _traced: "TracedOptimizer"

    @property
    def penalty(self) -> Any: ...

    def _step(
        self,
        closure: Callable[[], Any] | None,
        loss: Tensor | float | None,
        surprise: Tensor | float | None,
    ) -> Any: ...


# The operator finds its optimizer by the only kind of constant that Dynamo never makes symbolic.
OPTIMIZERS: WeakValueDictionary[str, Optimizer] = WeakValueDictionary()
_NUMBERS = itertools.count()


class TracedOptimizer:
    """What Dynamo shall see of an optimizer: what the step reads of it, and nothing else.

    Dynamo guards the learning rates of whoever asks an optimizer for its ``param_groups``: the same
    list by another name is guarded as far as it is read.

    Args:
        optimizer: The optimizer, kept by weak reference.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.name = str(next(_NUMBERS))
        self.groups = optimizer.param_groups
        self.penalised = optimizer.__dict__.get("_penalty") is not None  # follows the penalty
        OPTIMIZERS[self.name] = optimizer


def step_(
    optimizer: Optimizer,
    closure: Callable[[], Any] | None,
    loss: Tensor | float | None,
    surprise: Tensor | float | None,
) -> Any:
    """Put a step of the optimizer into the graph that is being traced.

    A closure, and ``differentiable=True``, break the graph: neither runs through an operator.

    Args:
        optimizer: The optimizer.
        closure: As for :meth:`ars.ARSAdam.step`.
        loss: Likewise.
        surprise: Likewise.

    Returns:
        What the closure returned, or None.
    """
    if closure is not None or optimizer.defaults["differentiable"]:
        return _step_outside(optimizer, closure, loss, surprise)
    traced, loss = optimizer._traced, read_surprise(loss)
    surprise = read_surprise(surprise, "the surprise")
    if _is_changed(traced.name):
        torch._dynamo.graph_break(msg="the compiled function changes a group or the penalty")
    params, grads, indices, others = [], [], [], []
    for index, param in enumerate(p for group in traced.groups for p in group["params"]):
        if param.grad is not None:
            params.append(param)
            grads.append(param.grad)
            indices.append(index)
        elif traced.penalised and param.requires_grad:  # perhaps moved by the penalty alone
            others.append((index, param))
    if params:
        indices += [index for index, _ in others]
        params += [param for _, param in others]
        with torch.no_grad():
            torch.ops.ars.step_(
                params, optimizer._buffer, grads, loss, surprise, indices, traced.name
            )
    return None


@torch._disable_dynamo  # type: ignore[attr-defined]
def _step_outside(
    optimizer: Optimizer,
    closure: Callable[[], Any] | None,
    loss: Tensor | float | None,
    surprise: Tensor | float | None,
) -> Any:
    return optimizer._step(closure, loss, surprise)


def _is_changed(name: str) -> bool:
    """Whether the function being traced has changed what the operator will read.

    Dynamo applies changes of Python objects after the graph that contains the operator: too late.

    Raises:
        RuntimeError: It has set an attribute of the optimizer, which Dynamo forgets.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    optimizer = OPTIMIZERS[name]
    effects = InstructionTranslator.current_tx().output.side_effects
    for variable, attributes in effects.store_attr_mutations.items():
        if getattr(variable, "value", None) is optimizer:
            raise RuntimeError(
                f"torch.compile forgets changes of an optimizer's attributes ({[*attributes]}): "
                "make them outside of the compiled function"
            )
    objects = (optimizer.param_groups, *optimizer.param_groups, optimizer.penalty)
    variables = (effects.id_to_variable.get(id(object_)) for object_ in objects)
    return any(variable is not None and effects.is_modified(variable) for variable in variables)


# What torch.compiler.assume_constant_result does; calling it would import Dynamo, for everybody.
_is_changed._dynamo_marked_constant = True  # type: ignore[attr-defined]


@torch.library.custom_op(
    "ars::step_",
    mutates_args=("params", "diagnostics"),
    schema="(Tensor(a!)[] params, Tensor(b!) diagnostics, Tensor[] grads, Tensor? loss, "
    "Tensor? surprise, int[] indices, str optimizer) -> ()",
    # A captured graph would replay the kernels with the numbers of its capture.
    tags=(torch.Tag.cudagraph_unsafe,),
)
def _operator(
    params: Sequence[Tensor],
    diagnostics: Tensor,
    grads: Sequence[Tensor],
    loss: Tensor | None,
    surprise: Tensor | None,
    indices: Sequence[int],
    optimizer: str,
) -> None:
    """Take the ordinary step with the gradients of the graph.

    Backends other than Inductor hand over copies of what is mutated, and copy these back.

    Args:
        params: The parameters that have a gradient, then those that the penalty may move, or copies
            of them.
        diagnostics: The optimizer's diagnostics, or a copy.
        grads: The gradients of the first of them.
        loss: 0-d, or None.
        surprise: Likewise.
        indices: Which parameters of the optimizer they are.
        optimizer: Its name here.

    Raises:
        RuntimeError: The optimizer is no more, or has been given another list of groups.
    """
    stepped = OPTIMIZERS.get(optimizer)
    if stepped is None:
        raise RuntimeError(
            "this graph steps an optimizer that is no more: compile the function again"
        )
    if stepped._traced.groups is not stepped.param_groups:
        raise RuntimeError(
            "this graph steps the groups of a list that is param_groups no more: change that list "
            "in place, as in optimizer.param_groups[:] = groups"
        )
    owned = [param for group in stepped.param_groups for param in group["params"]]
    found = [param.grad for param in owned]
    given = dict(zip(indices, grads, strict=False))
    copies = [
        (owned[index], param)
        for index, param in zip(indices, params, strict=True)
        if param.data_ptr() != owned[index].data_ptr()
    ]
    with torch.no_grad():
        for param, copy in copies:
            param.copy_(copy)
        try:
            for index, param in enumerate(owned):
                param.grad = given.get(index)
            stepped._step(None, loss, surprise)
        finally:
            for param, grad in zip(owned, found, strict=True):
                param.grad = grad
        for param, copy in copies:
            copy.copy_(param)
        if diagnostics.data_ptr() != stepped._buffer.data_ptr():
            diagnostics.copy_(stepped._buffer)


@_operator.register_fake
def _(*args: Any) -> None:
    """Nothing is returned, whatever the shapes."""
