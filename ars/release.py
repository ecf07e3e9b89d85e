"""Gradient release: step each parameter during the backward pass, and free its gradient there."""

import weakref
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ars.adam import ARSAdam
from ars.compiled import OPTIMIZERS
from ars.parameterwise import ParameterwiseStep
from ars.penalty import parameter_names
from ars.surprise import check_watched, choose_surprise, read_surprise

__all__ = ["GradientRelease"]


class GradientRelease:
    r"""Steps each parameter as soon as its gradient is complete, and frees the gradient.

    The gradients of a model then never exist together: they take the memory of the largest one.
    The step is the optimizer's ``step(loss=loss)``, with one gate for all parameters. On a GPU it
    launches two kernels a parameter instead of two for all of them, and with a controller copies
    three numbers for each. Of several processes, those of the optimizer's ``process_group`` gate as
    one.

    What needs all gradients before the first parameter may move is refused: clipping, a controller
    of the gradient norm, accumulation over several backward passes, a ``GradScaler``. Refusing is
    not possible under ``DistributedDataParallel``, which averages gradients after this has used
    them, nor for optimizers of other packages that share a parameter: do not use it there.

    Args:
        optimizer: The optimizer; refuses ``step()`` until :meth:`remove`.

    Raises:
        ValueError: It clips, is differentiable, watches the gradient norm, has step hooks, is
            released already, or shares a parameter with another optimizer.

    Example:
        >>> import torch
        >>> from ars import ARSAdamW, GradientRelease
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> opt = ARSAdamW([weight], lr=0.1, weight_decay=0.0)
        >>> with GradientRelease(opt) as release:
        ...     release.backward(weight.sum())  # in place of loss.backward() and opt.step()
        >>> weight.detach(), weight.grad
        (tensor([0.9000, 0.9000]), None)

    References:
        Lv et al., "Full parameter fine-tuning for large language models with limited resources",
        arXiv:2306.09782.
    """

    def __init__(self, optimizer: ARSAdam) -> None:
        if _refuse_step in optimizer._optimizer_step_pre_hooks.values():
            raise ValueError("this optimizer's gradients are released already: remove() that first")
        _check(optimizer)
        self._optimizer = optimizer
        self._step = ParameterwiseStep(optimizer)
        self._is_running = False
        self._handles: dict[Tensor | None, RemovableHandle] = {}
        # The hooks know this object by weak reference: they go with it.
        self._finalizer = weakref.finalize(self, _remove, self._handles)
        self._handles[None] = optimizer.register_step_pre_hook(_refuse_step)
        self._add_hooks()

    def backward(self, loss: Tensor, *, surprise: Tensor | float | None = None) -> None:
        """Differentiate the loss, and step every parameter that gets a gradient.

        What fails in the middle leaves the parameters that were first stepped and the others not.

        Args:
            loss: The loss, 0-d, not scaled; the surprise that the controller watches.
            surprise: As for :meth:`ars.ARSAdamW.step`.

        Raises:
            TypeError: The loss is not a tensor.
            ValueError: The loss is not a scalar, or the optimizer does now what is refused.
            RuntimeError: A parameter has a gradient already, gets a second one or a sparse one; or
                :meth:`remove` was called.
        """
        if not self._finalizer.alive:
            raise RuntimeError("this GradientRelease was removed: make another one")
        if not isinstance(loss, Tensor):
            raise TypeError(f"the loss must be a 0-d tensor, got {type(loss).__name__}")
        optimizer = self._optimizer
        watches, watched = choose_surprise(optimizer.controller, loss, surprise)
        read_surprise(loss)
        _check(optimizer, watches)
        optimizer._follow()
        for param, name in parameter_names(optimizer.param_groups).items():
            if param.grad is not None:
                raise RuntimeError(
                    f"{name} has a gradient already: gradients cannot be accumulated when each is "
                    "used at once. Sum the losses instead, or call zero_grad() to drop it"
                )
            optimizer._check(param, None)
        if optimizer.controller is not None:
            watched = optimizer._replicas.mean(watched, optimizer._buffer.device)
        self._add_hooks()
        self._step.begin(watches, watched)
        self._is_running = True
        try:
            loss.backward()
        finally:
            self._is_running = False
        self._step.finish()

    def remove(self) -> None:
        """Take the hooks away: the optimizer is stepped as usual again."""
        self._finalizer()

    def __enter__(self) -> "GradientRelease":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def _add_hooks(self) -> None:
        """Watch the parameters that are not watched yet: new ones, and ones no longer frozen.

        Those that have left the optimizer are let go.
        """
        released = weakref.ref(self)

        def hook(param: Tensor) -> None:
            release = released()
            if release is not None:
                release._release(param)

        params = self._optimizer._parameters()
        for gone in self._handles.keys() - {None, *params}:
            self._handles.pop(gone).remove()
        for param in params:
            if param.requires_grad and param not in self._handles:
                self._handles[param] = param.register_post_accumulate_grad_hook(hook)

    def _release(self, param: Tensor) -> None:
        """Step one parameter, whose gradient is complete.

        Raises:
            RuntimeError: This is not a backward pass of :meth:`backward`.
        """
        if not self._is_running:
            raise RuntimeError(
                "a gradient has arrived outside of GradientRelease.backward(loss): call that "
                "instead of loss.backward(), or remove() the GradientRelease. The gradient has "
                "not been used; zero_grad() drops it"
            )
        self._step.take_(param)


def _check(optimizer: ARSAdam, watches: str = "") -> None:
    """Refuse what needs all gradients before the first parameter may move.

    Raises:
        ValueError: The optimizer does it.
    """
    if optimizer._max_grad_norm is not None:
        raise ValueError(
            "max_grad_norm needs the norm of all gradients before the first parameter moves: set "
            "it to None, or do not release the gradients"
        )
    if optimizer.defaults["differentiable"]:
        raise ValueError("differentiable=True needs the gradients afterwards: do not release them")
    if optimizer.controller is not None:
        kind = optimizer.controller.config.surprise
        # Before the first step "auto" is what the loss makes of it.
        expected = "callable" if callable(kind) else "loss" if kind == "auto" else kind
        watches = watches or expected
        if watches == "grad_norm":
            raise ValueError(
                "ARSConfig(surprise='grad_norm') needs all gradients before the first parameter "
                "moves: watch the loss, or do not release the gradients"
            )
        check_watched(optimizer._watches, watches)
    hooks = [*optimizer._optimizer_step_pre_hooks.values()]
    hooks += optimizer._optimizer_step_post_hooks.values()
    if set(hooks) - {_refuse_step}:
        raise ValueError(
            "step hooks do not run when each parameter is stepped by itself: remove them, and call "
            "them after backward()"
        )
    names = parameter_names(optimizer.param_groups)
    others = [other for other in OPTIMIZERS.values() if other is not optimizer]
    for other in others:
        for group in other.param_groups:
            for param in group["params"]:
                if param in names:
                    raise ValueError(
                        f"{names[param]} is in another optimizer too, which would never see its "
                        "gradient: give it to one of them, or delete the other"
                    )


def _refuse_step(*_: Any) -> None:
    raise RuntimeError(
        "this optimizer steps in GradientRelease.backward(loss), when no gradient is left for "
        "step(): call that instead of loss.backward() and step(). A GradScaler, which must see "
        "all gradients before, cannot be used; remove() ends the release"
    )


def _remove(handles: dict[Tensor | None, RemovableHandle]) -> None:
    for handle in handles.values():
        handle.remove()
    handles.clear()
