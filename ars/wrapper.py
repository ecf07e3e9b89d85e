"""The controller around any optimizer."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ars import reference
from ars.config import CONDITIONED, ARSConfig
from ars.controller import ARSController
from ars.effective import (
    GatedGradients,
    Replay,
    check_gateable,
    check_groups,
    evaluates_first,
    gated_groups,
)
from ars.groups import has_gradient, is_trial
from ars.loading import check_state_dict, unchanged_on_error
from ars.surprise import Group, Replicas, check_watched, choose_surprise

__all__ = ["ARSOptimizer"]

# The signals before the first step.
UNSEEN = reference.Signals(surprise=math.nan, rho=0.0, psi=1.0, phi=1.0, chi=0.0)


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
            one. False: each by itself. With several processes, all of them must take the step.

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
        check_gateable(base_optimizer, config)
        self._replicas = Replicas(process_group)
        self.base = base_optimizer
        # Makes the hooks, and wants to make groups and state, which are the base's.
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        self._watches: str | None = None
        self._controller = ARSController(config, self._device())
        self._buffer = torch.tensor(UNSEEN, dtype=torch.float64, device=self._device())

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
            check_groups(self.base, [group], self._controller.config)
            self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients, as the base optimizer does.

        Args:
            set_to_none: Drop them rather than set them to 0.
        """
        self.base.zero_grad(set_to_none)

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
            loss: The loss, 0-d: what the controller watches. Without it (and without a closure)
                the controller watches the gradient norm.
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
        given = (closure, loss, surprise)
        if not base.state and given == (None, None, None) and is_trial(groups):
            return base.step()
        check_groups(base, groups, config)
        replay, returned = None, None
        if closure is not None:
            replay = Replay(closure, groups, careful=not evaluates_first(base))
            known = (
                loss is not None if config.surprise in ("auto", "loss") else surprise is not None
            )
            if not (known and has_gradient(groups)):
                returned = replay.evaluate()
        with torch.no_grad():
            signals = self._observe(given, returned)
        gradients = GatedGradients(groups, signals.phi if "grad" in config.gate else 1.0)
        with gated_groups(groups, signals, config):
            try:
                if replay is None:
                    gradients.put()
                    result = base.step()
                else:
                    replay.begin(gradients)
                    result = base.step(replay)
            finally:
                gradients.restore()
        if signals is not UNSEEN and self._watches == "grad_norm":
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
        loss = returned if loss is None else loss
        if not grads and loss is None and surprise is None:
            return UNSEEN  # the base may still count the step
        if loss is None and closure is not None and self._watches == "loss":
            loss = self._controller.latest()
        watches, watched = choose_surprise(self._controller, loss, surprise)
        check_watched(self._watches, watches)
        watched = self._replicas.mean(watched, self._device())
        if not grads:
            return UNSEEN
        if watched is None:
            if any(grad.is_sparse for grad in grads):
                raise RuntimeError(
                    "the norm of sparse gradients cannot be the surprise: pass step(loss=loss)"
                )
            watched = reference.grad_norm(grads)
        self._place()
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

    def _place(self) -> None:
        """Bring the controller to where the parameters are."""
        device = self._device()
        if device == self._buffer.device:
            return
        memory = self._controller.state_dict()
        self._controller = ARSController(self._controller.config, device)
        if not self._buffer.is_meta:
            self._controller.load_state_dict(memory)
        self._buffer = torch.tensor(UNSEEN, dtype=torch.float64, device=device)

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict, with the controller under ``"controller"``."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state: dict[str, Any] = dict(self.base.state_dict())
        state["controller"] = {**self._controller.state_dict(), "watches": self._watches}
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
        saved = state_dict.pop("controller", None)
        with unchanged_on_error(self, self._controller), unchanged_on_error(self.base, None):
            self._load(state_dict, saved)

    def _load(self, state_dict: dict[str, Any], saved: Any) -> None:
        """Load the base's state, and what was saved of the controller."""
        self._place()
        if saved is not None:
            self._controller.check_state_dict(saved)

        # The base's own hooks may still replace the state.
        def check(base: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
            groups = state_dict.get("param_groups")
            if isinstance(groups, list) and all(isinstance(group, dict) for group in groups):
                check_groups(base, groups, self._controller.config)
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
