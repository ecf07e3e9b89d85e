"""Gradient release: step each parameter during the backward pass, and free its gradient there."""

import dataclasses
import threading
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ars import reference
from ars.adam import ARSAdam
from ars.config import ARSConfig
from ars.controller import ARSController
from ars.penalty import parameter_names, refresh_
from ars.sharded import is_sharded
from ars.step import choose
from ars.step.batch import DIAGNOSTICS, Batch, Collector, Hyper, Options, apply_gate, check_terms
from ars.step.compile import OPTIMIZERS
from ars.step.eager import take_proximal_step_
from ars.surprise import check_watched, choose_surprise, read_surprise

__all__ = ["GradientRelease"]

PENALTY = DIAGNOSTICS.index("penalty")


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
        self._step = _ParameterwiseStep(optimizer)
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
        optimizer._follow_parameters()
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

    def __exit__(self, *_: object) -> None:
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
    if any(map(is_sharded, optimizer._parameters())):
        raise ValueError(
            "gradient release is not for DTensors: FSDP2 divides gradients after the backward pass "
            "of a layer, without the hooks that this needs; it frees the whole ones itself, so "
            "call loss.backward() and optimizer.step()"
        )
    if not optimizer._losses.is_empty:
        raise ValueError(
            "watch(loss) notes a loss for step(): with a GradientRelease leave it out, as "
            "backward(loss) watches the loss"
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


class _ParameterwiseStep:
    """Takes the optimizer's ``step(loss=loss)`` in parts.

    The first parameter's part is an ordinary step: it observes the loss and writes the diagnostics.
    The others repeat its gate.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: ARSAdam) -> None:
        self._optimizer = optimizer
        self._parts: dict[Tensor, _Part] = {}
        self._first = _Part()  # whichever comes first: its kernels observe and report
        self._scratch = torch.zeros_like(optimizer._buffer)  # what the other parts report
        self._open: ARSController | None = None
        self._lock = threading.Lock()  # autograd has a thread for every device
        self.begin("loss", None)

    def begin(self, watches: str, surprise: Tensor | None) -> None:
        """Begin a step.

        Args:
            watches: What the surprise is.
            surprise: 0-d; None if there is no controller.
        """
        self._watches, self._surprise = watches, surprise
        self._places: dict[Tensor, tuple[int, int]] = {}  # indices of the group, of the parameter
        for index, group in enumerate(self._optimizer.param_groups):
            for param in group["params"]:
                self._places[param] = index, len(self._places)
        check_terms(self._optimizer._terms, self._places)
        # Parameters that have been replaced do not stay for the tables that were made of them.
        self._parts = {p: part for p, part in self._parts.items() if p in self._places}
        self._stepped: set[Tensor] = set()
        self._penalties: list[Tensor] = []
        self._hypers: list[list[Hyper]] = []  # for the parameters of each group, after the first
        self._options: Options | None = None

    @torch.no_grad()
    def take_(self, param: Tensor) -> None:
        """Step one parameter, and free its gradient.

        Args:
            param: Has a gradient. One that is in the optimizer no more is left alone.

        Raises:
            RuntimeError: Its gradient is sparse, or it has been stepped.
        """
        with self._lock:
            if param not in self._places:
                return
            if param in self._stepped:
                name = parameter_names(self._optimizer.param_groups)[param]
                raise RuntimeError(
                    f"{name} has got a second gradient in one backward pass, after its first was "
                    "used: a checkpoint with use_reentrant=True does that to tied weights, so pass "
                    "use_reentrant=False"
                )
            if self._options is None:
                self._take_first(param)
            else:
                self._take_next(param, self._options, self._hypers[self._places[param][0]])
            self._stepped.add(param)
            param.grad = None

    @torch.no_grad()
    def finish(self) -> None:
        """Let the penalty pull at what had no gradient, and report that there was a step."""
        if self._options is None:  # no parameter had a gradient
            return
        optimizer, proximal_only = self._optimizer, Batch()
        for param, (group, number) in self._places.items():
            term = optimizer._terms.get(param) if param.requires_grad else None
            if term is None or param in self._stepped:
                continue
            if self._options.proximal and term.pull is None:
                optimizer._append(proximal_only, group, number, param)
                continue
            param.grad = torch.zeros_like(param)
            hypers = [hyper._replace(weight_decay=0.0) for hyper in self._hypers[group]]
            self._take_next(param, self._options, hypers)
            self._stepped.add(param)
            param.grad = None
        if proximal_only.tensors:
            first = next(param for param in self._places if param in self._stepped)
            count = optimizer.state[first]["step"]
            value = take_proximal_step_(proximal_only, *self._given, count=count)
            self._penalties.append(value)
        if self._penalties:
            self._optimizer._buffer[PENALTY] += torch.stack(self._penalties).sum()
        # What learning rate schedulers look for.
        self._optimizer._opt_called = True  # type: ignore[attr-defined]

    def _take_first(self, param: Tensor) -> None:
        optimizer = self._optimizer
        optimizer._follow_parameters()
        hypers, options = optimizer._read_settings(self._surprise)
        batch = self._collect(param, self._first)
        options = options._replace(penalty=refresh_(optimizer._penalty))
        optimizer._watches = self._watches
        optimizer._buffer[PENALTY] = 0.0  # without a penalty of its own, it writes none
        self._step(batch, hypers, options, self._first)
        self._given = hypers, options
        self._reuse_gate(hypers, options)

    def _take_next(self, param: Tensor, options: Options, hypers: list[Hyper]) -> None:
        part = self._parts.setdefault(param, _Part())
        batch = self._collect(param, part)
        self._step(batch, hypers, options, part)
        if batch.has_anchor():
            self._penalties.append(self._scratch[PENALTY].clone())

    def _collect(self, param: Tensor, part: "_Part") -> Batch:
        """Gather one parameter's tensors, the last step's if they still are the same."""
        optimizer, place = self._optimizer, self._places[param]
        group = {**optimizer.param_groups[place[0]], "params": [param]}

        def append(batch: Batch, _: int, __: int, param: Tensor) -> None:
            optimizer._append(batch, *place, param)

        state = {param: optimizer.state[param]}
        return part.collector.collect(
            [group], state, optimizer._terms, append, optimizer._check, whole=False
        )

    def _step(self, batch: Batch, hypers: list[Hyper], options: Options, part: "_Part") -> None:
        implementation = self._optimizer._implementation
        # The kernels' tables are a part's own; the rest needs no more than memory to work in.
        steppers = part.steppers if implementation == "triton" else self._optimizer._steppers
        try:
            choose.step_(implementation, batch, hypers, options, steppers)
        finally:
            batch.grads = []

    def _reuse_gate(self, hypers: list[Hyper], options: Options) -> None:
        """Make of the first part's settings those that give the others the same gate."""
        buffer = options.diagnostics
        if self._scratch.device != buffer.device:
            self._scratch = torch.zeros_like(buffer)
        self._options = options._replace(diagnostics=self._scratch, penalty=None)
        self._hypers = [hypers] * len(hypers)
        if options.controller is None:
            return
        config = options.controller.config
        if self._optimizer._implementation != "triton":
            recorded = _RecordedController(config, reference.Signals.read(buffer))
            self._options = self._options._replace(controller=recorded)
            return
        # A kernel observes by itself. So it gets what is gated already, of its group alone, and a
        # controller that is open whatever it observes, with the constants it is compiled for.
        if self._open is None or self._open.window.device != buffer.device:
            settings = dataclasses.replace(config, phi_min=1.0, jitter=0.0)
            self._open = ARSController(settings, buffer.device)
        self._options = self._options._replace(controller=self._open)
        idle = [hyper._replace(lr=0.0, beta1=0.0, beta2=0.0, strength=0.0) for hyper in hypers]
        self._hypers = [
            [*idle[:i], _gate_on_device(hyper, buffer, config.gate), *idle[i + 1 :]]
            for i, hyper in enumerate(hypers)
        ]


class _Part:
    """What is kept from step to step of one parameter."""

    def __init__(self) -> None:
        self.collector = Collector()
        self.steppers = choose.Steppers()


class _RecordedController(ARSController):
    """Says again what a controller has said to the first parameter of a step."""

    def __init__(self, config: ARSConfig, signals: reference.Signals) -> None:
        self.config, self._signals = config, signals

    def observe(self, surprise: Tensor | float) -> reference.Signals:
        """Return the gate of this step, whatever the surprise."""
        return self._signals


def _gate_on_device(hyper: Hyper, diagnostics: Tensor, gate: tuple[str, ...]) -> Hyper:
    """Apply the gate on the device, in float64 as the kernel does."""
    signals = reference.Signals(*diagnostics[: len(reference.Signals._fields)].clone().unbind())
    lr = torch.as_tensor(hyper.lr, dtype=torch.float64, device=diagnostics.device)
    hyper = apply_gate(hyper._replace(lr=lr), signals, tuple({*gate} - {"betas"}))
    # The kernel needs the betas as they are, too.
    return hyper._replace(beta_factor=signals.phi) if "betas" in gate else hyper
