"""ARSOptimizer: the controller around any optimizer, whose values it gates and then puts back."""

import contextlib
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer

from ars import reference
from ars.config import CONDITIONED, ARSConfig
from ars.controller import ARSController
from ars.reference import Scalar, Signals
from ars.sharded import Group, is_sharded, mean_over_meshes, norm_of_parts
from ars.step.batch import has_gradient, to_device
from ars.step.loading import check_state_dict, take_controller, unchanged_on_error
from ars.step.state import is_trial
from ars.surprise import (
    Replicas,
    StepLosses,
    check_watched,
    choose_surprise,
    warn_of_fallback,
)

__all__ = ["ARSOptimizer"]

# The signals before the first step.
NOT_OBSERVED = reference.Signals(surprise=math.nan, rho=0.0, psi=1.0, phi=1.0, chi=0.0)


class ARSOptimizer(torch.optim.Optimizer):
    r"""Gates any :class:`torch.optim.Optimizer` by the controller of :class:`ars.ARSAdamW`.

    .. math::
        \Phi, \chi = \text{controller}(S), \qquad \eta^{\text{eff}} = \eta (1 + \chi)

    and Phi multiplies what ``config.gate`` names: ``"lr"``; ``"betas"``, which is the group's
    ``betas`` or ``momentum``; ``"grad"``. The base optimizer takes its own step with these values;
    afterwards, or if it raises, the groups and gradients are as before, so schedulers, hooks,
    ``GradScaler`` and checkpoints work on this optimizer as on the base.

    The base knows nothing of the gate: an Adam among them corrects its bias by powers of the
    effective betas, exactly so only while these are constant (:class:`ars.ARSAdamW` multiplies them
    up). ``"grad"`` needs memory for a copy of the gradients.

    Where the base holds a number (a float lr) and its parameters are on a GPU, the step must read
    the gate from the device, and waits for it. It does not for a tensor lr (``capturable=True`` or
    ``fused=True``) with ``gate=("lr",)``, nor for ``gate=("grad",)`` with ``jitter=0`` or a tensor.

    Args:
        base_optimizer: The optimizer; step this one in its stead.
        config: The controller's settings.
        process_group: The processes whose controllers observe the mean of their surprises, so that
            all gate alike: a ``torch.distributed`` group. None: the default group, once there is
            one. False: each by itself, but for those that hold shards of the same parameters. With
            several processes, all of them must take the step.

    Attributes:
        base: The base optimizer. Its groups and state are this one's, the same objects.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The base has a controller, is differentiable, has a group without lr, or has
            nothing that the gate could act on; or a group has a value that is no number (None,
            say) where the gate acts.

    Example:
        >>> import torch
        >>> from ars import ARSConfig, ARSOptimizer
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> base = torch.optim.SGD([weight], lr=0.1)
        >>> opt = ARSOptimizer(base, ARSConfig(gate=("lr",)))
        >>> loss = weight.sum()
        >>> loss.backward()
        >>> opt.step(loss=loss)
        >>> weight.detach(), float(opt.diagnostics["phi"])
        (tensor([0.9000, 0.9000]), 1.0)
    """

    _replicas = Replicas(None)  # what pickles of earlier versions do not hold

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        config: ARSConfig = CONDITIONED,
        *,
        process_group: Group = None,
    ) -> None:
        _check_gateable(base_optimizer, config)
        self._replicas = Replicas(process_group)
        self.base = base_optimizer
        # Makes the hooks, and wants to make groups and state, which are the base's.
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        self._watches: str | None = None
        self._controller = ARSController(config, self._device())
        self._losses = StepLosses()
        self._buffer = torch.tensor(NOT_OBSERVED, dtype=torch.float64, device=self._device())

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if "_controller" in self.__dict__:  # not in the constructor
            self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's state."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        if "_controller" in self.__dict__:
            self.base.state = state

    @property
    def controller(self) -> ARSController:
        """The controller."""
        return self._controller

    @property
    def process_group(self) -> Group:
        """The processes that gate alike; may be set, as after unpickling."""
        return self._replicas.group

    @process_group.setter
    def process_group(self, process_group: Group) -> None:
        self._replicas = Replicas(process_group)

    @property
    def diagnostics(self) -> Mapping[str, Tensor]:
        """``surprise``, ``rho``, ``psi``, ``phi`` and ``chi`` of the last step.

        0-d float64 tensors on the device, overwritten by each step; reading one waits for it.
        """
        return dict(zip(reference.Signals._fields, self._buffer.unbind(), strict=True))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer.

        Args:
            param_group: Its parameters, and what differs from the defaults.

        Raises:
            ValueError: It has no lr, or a value that cannot be gated.
        """
        if "_controller" in self.__dict__:
            group = {**self.base.defaults, **param_group}
            _check_groups(self.base, [group], self._controller.config)
            self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients, as the base optimizer does.

        Args:
            set_to_none: Drop them rather than set them to 0.
        """
        self.base.zero_grad(set_to_none)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def watch(self, loss: Tensor | float) -> None:
        """Note the loss of the next step, as :meth:`ars.ARSAdamW.watch` does.

        Args:
            loss: The loss, 0-d, of the step or of one of its micro-batches.

        Raises:
            TypeError: It is neither a tensor nor a number.
            ValueError: It is not a scalar.
        """
        self._losses.add(loss)

    def reset_controller(self) -> None:
        """Start the controller afresh, as :meth:`ars.ARSAdamW.reset_controller` does."""
        fresh = ARSController(self._controller.config).state_dict()
        self._controller.load_state_dict(fresh)
        self._watches = None

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        loss: Tensor | float | None = None,
        surprise: Tensor | float | None = None,
    ) -> Any:
        """Take one step of the base optimizer, gated.

        A closure is evaluated once before the step, and its loss is the surprise. The base gets
        that evaluation for its first, unless it has changed a parameter or a gradient since, as SAM
        does: then the closure is evaluated anew, as in each further call (LBFGS), all under the one
        gate. Where there are gradients and a ``loss`` is passed, the base alone evaluates it.

        To see such a change, an optimizer that is not torch's own needs memory for a copy of
        parameters and gradients while it is stepped with a closure, and waits for a GPU.

        Args:
            closure: Re-evaluates the model and returns the loss, as for every torch optimizer. If
                no parameter has a gradient then, nothing is observed. If it returns None once but
                there are gradients, the last loss counts again.
            loss: The loss, 0-d: what the controller watches. Without it (and without
                :meth:`watch` or a closure) the controller watches the gradient norm, and the first
                step says so.
            surprise: With ``ARSConfig(surprise="entropy")``, what is watched instead.

        Returns:
            What the base optimizer returned: the closure's first loss, or None.

        Raises:
            TypeError: The loss or the surprise is neither a tensor nor a number.
            ValueError: It is not a scalar, the surprise is missing or not what is watched, it
                changed its kind between steps, or a group has a value that cannot be gated.
            RuntimeError: The gradient norm is watched and a gradient is sparse.
        """
        base, config = self.base, self._controller.config
        groups = base.param_groups
        given = (closure, self._losses.choose(loss, None), surprise)
        if not base.state and given == (None, None, None) and is_trial(groups):
            return base.step()
        _check_groups(base, groups, config)
        replay, returned = None, None
        if closure is not None:
            replay = _Replay(closure, groups, careful=not _calls_closure_first(base))
            known = (
                loss is not None if config.surprise in ("auto", "loss") else surprise is not None
            )
            if not (known and has_gradient(groups)):
                returned = replay.evaluate()
        with torch.no_grad():
            signals = self._observe((closure, loss, surprise), returned)
        gradients = _GatedGradients(groups, signals.phi if "grad" in config.gate else 1.0)
        with _gated_groups(groups, signals, config):
            try:
                if replay is None:
                    gradients.put()
                    result = base.step()
                else:
                    replay.begin(gradients)
                    result = base.step(replay)
            finally:
                gradients.restore()
                self._losses.clear()  # also of what the base has evaluated again
        if signals is not NOT_OBSERVED and self._watches == "grad_norm":
            self._controller.check_norm(groups)
        return result

    def _observe(self, given: tuple[Any, Any, Any], returned: Any) -> reference.Signals:
        """Let the controller observe, if there is a gradient, and report what it says.

        Args:
            given: The closure, the loss and the surprise that were passed.
            returned: What the closure returned, if it was evaluated.

        Raises:
            RuntimeError: The gradient norm is watched and a gradient is sparse.
        """
        params = [param for group in self.base.param_groups for param in group["params"]]
        grads = [param.grad for param in params if param.grad is not None]
        closure, loss, surprise = given
        loss = self._losses.choose(loss, returned)
        if not grads and loss is None and surprise is None:
            return NOT_OBSERVED  # the base may still count the step
        if loss is None and closure is not None and self._watches == "loss":
            loss = self._controller.latest()
        watches, watched = choose_surprise(self._controller, loss, surprise)
        check_watched(self._watches, watches)
        warn_of_fallback(self._controller, self._watches, watches)
        watched = self._replicas.mean(watched, self._device())
        if watched is not None and self._replicas.group is not None:
            watched = mean_over_meshes(watched, params)  # halves of a matrix have one rate
        if not grads:
            return NOT_OBSERVED
        if watched is None:
            if any(grad.is_sparse for grad in grads):
                raise RuntimeError(
                    "the norm of sparse gradients cannot be the surprise: pass step(loss=loss)"
                )
            watched = _norm(grads, [param for param in params if param.grad is not None])
        self._move_controller()
        signals = self._controller.observe(watched)
        self._watches = watches
        if isinstance(signals.phi, Tensor):
            self._buffer.copy_(torch.stack([torch.as_tensor(signal) for signal in signals]))
        else:
            self._buffer.copy_(torch.tensor(signals, dtype=self._buffer.dtype))
        return signals

    def _device(self) -> torch.device:
        """Where the first parameter is."""
        params = (param for group in self.base.param_groups for param in group["params"])
        first: Tensor | None = next(params, None)
        return torch.device("cpu") if first is None else first.device

    def _move_controller(self) -> None:
        """Bring the controller to where the parameters are."""
        device = self._device()
        if device == self._buffer.device:
            return
        memory = self._controller.state_dict()
        self._controller = ARSController(self._controller.config, device)
        if not self._buffer.is_meta:
            self._controller.load_state_dict(memory)
        self._buffer = torch.tensor(NOT_OBSERVED, dtype=torch.float64, device=device)

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict, with the controller under ``"controller"``."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state: dict[str, Any] = dict(self.base.state_dict())
        state["controller"] = {**self._controller.state_dict(), "watches": self._watches}
        if isinstance(state.get("param_groups"), list):  # all that is kept by a checkpoint of torch
            groups = [
                {**group, "controller": state["controller"]} for group in state["param_groups"]
            ]
            state["param_groups"] = groups
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state)
            state = state if replaced is None else replaced
        return state

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by this class, or by the base optimizer's.

        A state without a controller starts this optimizer's controller afresh.

        Args:
            state_dict: What ``state_dict()`` returned.

        Raises:
            TypeError: Something in it has another type.
            ValueError: The state is of another controller, of groups of other sizes or with values
                that cannot be gated; something in it is missing or out of its range; or, as far as
                torch's own optimizers keep it, it is of parameters of other shapes. Whatever is
                raised, nothing has been changed then.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"a state dict must be a dict, got {type(state_dict).__name__}")
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else dict(replaced)
        take_controller(state_dict)
        saved = state_dict.pop("controller", None)
        with unchanged_on_error(self, self._controller), unchanged_on_error(self.base, None):
            self._load(state_dict, saved)

    def _load(self, state_dict: dict[str, Any], saved: Any) -> None:
        """Load the base's state, and what was saved of the controller."""
        self._move_controller()
        if saved is not None:
            self._controller.check_state_dict(saved)

        # The base's own hooks may still replace the state.
        def check(base: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            groups = state_dict.get("param_groups")
            if isinstance(groups, list) and all(isinstance(group, dict) for group in groups):
                _check_groups(base, groups, self._controller.config)
            known = type(base).__module__.startswith("torch.optim.")
            check_state_dict(base, state_dict, entries=known)

        handle = self.base.register_load_state_dict_pre_hook(check)
        try:
            self.base.load_state_dict(state_dict)
        finally:
            handle.remove()
        fresh = ARSController(self._controller.config).state_dict()
        self._controller.load_state_dict(fresh if saved is None else saved)
        self._watches = None if saved is None else saved.get("watches")
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the base optimizer and the controller; hooks stay behind, as in torch."""
        names = ("base", "defaults", "_controller", "_watches", "_replicas", "_buffer")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`__getstate__` returned."""
        super().__setstate__(state)
        self.__dict__.setdefault("_losses", StepLosses()).clear()


def _norm(grads: list[Tensor], params: list[Tensor]) -> Tensor:
    """Return the norm of gradients, of whole ones where processes hold parts."""
    divided = any(map(is_sharded, params))
    return norm_of_parts(grads, params) if divided else reference.grad_norm(grads)


def _check_gateable(base: Any, config: Any) -> None:
    """Refuse what cannot be gated.

    Args:
        base: The optimizer.
        config: The controller's settings.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The base or its groups cannot be gated as the settings say.
    """
    if not isinstance(base, torch.optim.Optimizer):
        raise TypeError(f"base_optimizer must be a torch.optim.Optimizer, got {base!r}")
    if not isinstance(config, ARSConfig):
        raise TypeError(f"config must be an ARSConfig, got {config!r}")
    name = type(base).__name__
    if getattr(base, "controller", None) is not None:
        raise ValueError(f"{name} has a controller already: pass it ars=None, or do not wrap it")
    if base.defaults.get("differentiable"):
        raise ValueError(
            f"{name} has differentiable=True, and autograd cannot run through values that are put "
            "back: use ARSAdamW(differentiable=True)"
        )
    _check_groups(base, base.param_groups, config)
    if config.gate == ("betas",) and not any(map(_has_decays, base.param_groups)):
        raise ValueError(
            f"gate=('betas',) has nothing to act on: {name} has neither betas nor a momentum "
            "other than 0; use ARSConfig(gate=('lr',))"
        )


def _check_groups(base: Any, groups: list[dict[str, Any]], config: ARSConfig) -> None:
    """Refuse values that the gate cannot multiply, whether it does so in this step or not.

    Args:
        base: The optimizer, for the message.
        groups: Its parameter groups.
        config: The controller's settings. What they leave alone may be anything.

    Raises:
        ValueError: A group has no lr, or a value that is no number, such as None.
    """
    names = _gated_names(config)
    for index, group in enumerate(groups):
        if "lr" not in group:
            raise ValueError(
                f"{type(base).__name__} has no lr in group {index}, which the controller varies"
            )
        for name in names:
            if name in group and not _is_gateable(group[name]):
                remedy = "give it a number"
                if name == "lr":
                    remedy += " (in Adafactor with relative_step=False), or leave lr alone by "
                    remedy += "ARSConfig(gate=('grad',), jitter=0)"
                else:
                    remedy += ", or leave it alone by ARSConfig(gate=('lr',))"
                raise ValueError(
                    f"{type(base).__name__} has {name}={group[name]!r} in group {index}, which the "
                    f"controller cannot multiply: {remedy}"
                )


def _gated_names(config: ARSConfig) -> tuple[str, ...]:
    """Return what of a group the controller ever multiplies."""
    rate = ("lr",) if "lr" in config.gate or config.jitter else ()
    return (*rate, "betas", "momentum") if "betas" in config.gate else rate


def _is_gateable(value: Any) -> bool:
    """Whether a value is a real number or a floating tensor, or a tuple or list of such."""
    if isinstance(value, Tensor):
        return value.is_floating_point()
    if isinstance(value, (tuple, list)):
        return all(_is_gateable(one) and not isinstance(one, (tuple, list)) for one in value)
    return isinstance(value, (float, int, numbers.Real))  # the quick ones first


def _has_decays(group: dict[str, Any]) -> bool:
    """Whether a parameter group has what Phi multiplies as betas: ``betas``, or momentum not 0."""
    momentum = group.get("momentum", 0)
    return "betas" in group or isinstance(momentum, Tensor) or momentum != 0


@contextlib.contextmanager
def _gated_groups(
    groups: list[dict[str, Any]], signals: Signals, config: ARSConfig
) -> Iterator[None]:
    """Give groups their effective lr, betas and momentum; the originals return afterwards.

    A tensor is changed in place, once however many groups share it, and gets back the same bits; so
    what has been captured in a graph, or refers to it, sees the change. Of a number only the group
    gets another; that reads a gate on another device, and waits for it.

    Args:
        groups: The optimizer's parameter groups.
        signals: The controller's signals of this step.
        config: The controller's settings, which name what Phi multiplies.
    """
    rate = 1 + signals.chi
    factors: dict[str, Scalar] = dict.fromkeys(_gated_names(config), signals.phi)
    if "lr" in factors:
        factors["lr"] = rate * signals.phi if "lr" in config.gate else rate
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    tensors: dict[int, tuple[Tensor, Tensor]] = {}

    def scaled(value: Any, factor: Scalar) -> Any:
        if not isinstance(value, Tensor):
            return value * float(factor)
        if id(value) not in tensors:
            tensors[id(value)] = value, value.detach().clone()
            value.detach().mul_(to_device(factor, value.device))
        return value

    try:
        for name, factor in factors.items():
            if not isinstance(factor, Tensor) and factor == 1:
                continue
            for group in groups:
                if name in group:
                    value = group[name]
                    replaced.append((group, name, value))
                    if isinstance(value, (tuple, list)):
                        several = [scaled(one, factor) for one in value]
                        group[name] = several if isinstance(value, list) else tuple(several)
                    else:
                        group[name] = scaled(value, factor)
        yield
    finally:
        for group, name, value in replaced:
            group[name] = value
        for value, before in tensors.values():
            value.detach().copy_(before)


class _GatedGradients:
    """Puts gradients times Phi in the place of the gradients, and these back.

    Args:
        groups: The optimizer's parameter groups.
        phi: What they are multiplied by.
    """

    def __init__(self, groups: list[dict[str, Any]], phi: Scalar) -> None:
        self._groups, self._phi = groups, phi
        self._replaced: list[tuple[Tensor, Tensor, Tensor]] = []  # with the gated gradient
        self._versions: list[int] = []

    def put(self) -> None:
        """Replace the gradients that there are."""
        if not isinstance(self._phi, Tensor) and self._phi == 1:
            return
        for group in self._groups:
            for param in group["params"]:
                if param.grad is not None:
                    grad, phi = param.grad, to_device(self._phi, param.device)
                    # A phi of double precision makes that of a 0-d gradient.
                    param.grad = (grad.detach() * phi).to(grad.dtype)
                    self._replaced.append((param, grad, param.grad))
        self._versions = [_version(gated) for _, _, gated in self._replaced]

    def restore(self) -> None:
        """Put back what was replaced, but what the base has dropped or changed since: that stays.

        A base that zeroes its gradients would otherwise find them again.
        """
        for (param, grad, gated), version in zip(self._replaced, self._versions, strict=True):
            if param.grad is gated:
                if _version(gated) != version:
                    grad.detach().copy_(gated)
                param.grad = grad
        self._replaced.clear()
        self._versions.clear()


class _Replay:
    """A closure that may have been evaluated before the base's step, for the gate.

    The base's first call then returns that evaluation if the base has changed nothing since: no
    parameter and no gradient, by their values, as ``param.data`` changes no version counter. SAM
    moves the weights first: then, and in every further call, the closure is evaluated.

    Args:
        closure: The closure.
        groups: The base's parameter groups.
        careful: Whether the base may do anything before its first call. It then begins with the
            gradients that it would begin with alone, and its parameters are compared: memory for a
            copy of both.
    """

    def __init__(
        self, closure: Callable[[], Any], groups: list[dict[str, Any]], *, careful: bool
    ) -> None:
        self._closure, self._careful = closure, careful
        self._params = [param for group in groups for param in group["params"]]
        self._gradients = _GatedGradients(groups, 1.0)
        self._is_new = False

    def evaluate(self) -> Any:
        """Make the first evaluation, and return what the closure returns."""
        found = [param.grad for param in self._params] if self._careful else []
        found = [grad if grad is None else grad.clone() for grad in found]
        with torch.enable_grad():
            self._first = self._closure()
        self._found, self._is_new = found, True
        return self._first

    def begin(self, gradients: _GatedGradients) -> None:
        """Prepare for the base's step, and put the gated gradients.

        Args:
            gradients: How the gradients of every evaluation are gated.
        """
        self._gradients = gradients
        if self._careful and self._is_new:
            self._left = [param.grad for param in self._params]
            self._copies = _copied(self._params), _copied(self._found)
            for param, grad in zip(self._params, self._found, strict=True):
                param.grad = grad
        gradients.put()

    def __call__(self) -> Any:
        """Return the first evaluation, or make another one."""
        self._gradients.restore()
        first, self._is_new = self._is_new, False
        returned = self._first if first and self._is_unchanged() else self._closure()
        with torch.no_grad():
            self._gradients.put()
        return returned

    def _is_unchanged(self) -> bool:
        """Whether the base has changed nothing; if so, give it the first evaluation's gradients."""
        if not self._careful:
            return True
        params, grads = self._copies
        del self._copies
        found = [param.grad for param in self._params]
        same = _are_equal(found, grads) and _are_equal(self._params, params)
        if same:
            for param, grad in zip(self._params, self._left, strict=True):
                param.grad = grad
        self._left.clear()
        self._found.clear()
        return same


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed; in inference mode that is not counted."""
    return 0 if tensor.is_inference() else tensor._version


def _copied(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [tensor if tensor is None else tensor.detach().clone() for tensor in tensors]


def _are_equal(tensors: Sequence[Tensor | None], copies: Sequence[Tensor | None]) -> bool:
    """Whether tensors have their copies' values; NaN is unequal to itself."""
    return all(
        copy is None if tensor is None else copy is not None and _is_equal(tensor.detach(), copy)
        for tensor, copy in zip(tensors, copies, strict=True)
    )


def _is_equal(tensor: Tensor, copy: Tensor) -> bool:
    if (tensor.dtype, tensor.device, tensor.layout) != (copy.dtype, copy.device, copy.layout):
        return False
    if tensor.is_meta:
        return tensor.shape == copy.shape
    if tensor.is_sparse:
        tensor, copy = tensor.coalesce(), copy.coalesce()
        return torch.equal(tensor.indices(), copy.indices()) and torch.equal(
            tensor.values(), copy.values()
        )
    return torch.equal(tensor, copy)


def _calls_closure_first(base: torch.optim.Optimizer) -> bool:
    """Whether a base is known to call its closure before it does anything else.

    torch's own optimizers and this package's do, without hooks.

    Args:
        base: The optimizer.
    """
    hooks = base._optimizer_step_pre_hooks or optimizer._global_optimizer_pre_hooks
    return type(base).__module__.startswith(("torch.optim.", "ars.")) and not hooks
