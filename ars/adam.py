"""Adam with the controller, the clipping and the penalty inside the step."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, _use_grad_for_differentiable

from ars import compiled, functional
from ars.batch import DIAGNOSTICS, Batch, Options, is_decoupled, read_hyper
from ars.collect import Collector
from ars.controller import ARSConfig, ARSController, check_watched, read_surprise
from ars.penalty import Penalty, Term, parameter_names, read_terms
from ars.state import complete_state, restore_dtypes, step_kind

__all__ = ["CONDITIONED", "ARSAdam"]

# The default controller. Settings are immutable, so all optimizers may share them.
CONDITIONED = ARSConfig()


class ARSAdam(torch.optim.Adam):
    r"""Adam with an on-device stability controller and an inheritance penalty in the same pass.

    As :class:`ars.ARSAdamW`, with L2 weight decay (``weight_decay * param`` joins the gradient)
    that defaults to 0, unless ``decoupled_weight_decay=True`` makes it AdamW's. See there for the
    equations and the arguments.

    Example:
        >>> import torch
        >>> from ars import ARSAdam
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> opt = ARSAdam([weight], lr=0.1)
        >>> weight.sum().backward()
        >>> opt.step()
        >>> weight.detach()
        tensor([0.9000, 0.9000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        ars: ARSConfig | None = CONDITIONED,
        penalty: Penalty | None = None,
        max_grad_norm: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        if ars is not None and not isinstance(ars, ARSConfig):
            raise TypeError(f"ars must be an ARSConfig or None, got {ars!r}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be > 0, or None not to clip, got {max_grad_norm}")
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        # A GradScaler must unscale the gradients itself, and skip the step on inf.
        self._step_supports_amp_scaling = False
        params = self._parameters()
        device = params[0].device if params else torch.device("cpu")
        self._controller = None if ars is None else ARSController(ars, device)
        self._watches: str | None = None
        self._max_grad_norm = max_grad_norm
        self._buffer = torch.zeros(len(DIAGNOSTICS), dtype=torch.float64, device=device)
        self._kept = functional.Kept()
        self._collector = Collector()
        self._traced = compiled.TracedOptimizer(self)
        self.penalty = penalty
        self._implementation: functional.Implementation = "loop"
        if device.type != "meta":  # those may get data, elsewhere, before the first step
            self._place()

    def _parameters(self) -> list[Tensor]:
        """Return the parameters of all groups, in order."""
        return [param for group in self.param_groups for param in group["params"]]

    def _place(self) -> None:
        """Choose the implementation, and bring what the step keeps, where the parameters are.

        Raises:
            RuntimeError: ``foreach`` or ``fused`` was forced where it cannot be had.
        """
        params = self._parameters()
        flags = {name: self.defaults[name] for name in ("foreach", "fused", "differentiable")}
        self._implementation = functional.choose(params, **flags)
        if not params or params[0].device == self._buffer.device:
            return
        self._buffer = torch.zeros_like(self._buffer, device=params[0].device)
        self._kept = functional.Kept()
        if self._controller is not None:
            memory = self._controller.state_dict()
            self._controller = ARSController(self._controller.config, params[0].device)
            if not memory["window"].is_meta:
                self._controller.load_state_dict(memory)
        self.penalty = self._penalty  # checked again

    @property
    def penalty(self) -> Penalty | None:
        """The penalty towards what an earlier model knew; may be replaced between steps."""
        return self._penalty

    @penalty.setter
    def penalty(self, penalty: Penalty | None) -> None:
        names = parameter_names(self.param_groups)
        self._terms: dict[Tensor, Term] = {} if penalty is None else read_terms(penalty, names)
        self._penalty = penalty

    @property
    def controller(self) -> ARSController | None:
        """The controller, or None with ``ars=None``."""
        return self._controller

    @property
    def diagnostics(self) -> Mapping[str, Tensor]:
        """What the last step saw and did, as 0-d float64 tensors on the device.

        ``surprise``, ``rho``, ``psi``, ``phi``, ``chi`` of the controller (eqs. 1 to 4); ``lr``,
        ``beta1``, ``beta2`` of the first group, as gated; ``grad_norm``, NaN when the step did not
        need it; ``penalty``, its value before the step. The tensors are overwritten by each step;
        reading one (``float(...)``) waits for the device, so read what you log, when you log it.
        """
        return dict(zip(DIAGNOSTICS, self._buffer.unbind(), strict=True))

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        loss: Tensor | float | None = None,
    ) -> Any:
        """Take one step.

        Args:
            closure: Re-evaluates the model and returns the loss, as for every torch optimizer.
            loss: The loss, 0-d: the surprise that the controller watches. Without it (and without
                a closure that returns one) the controller watches the gradient norm.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError: The loss is neither a tensor nor a number.
            ValueError: The loss is not a scalar, the surprise changed its kind between steps, or
                the groups differ in ``decoupled_weight_decay``.
            RuntimeError: A gradient is sparse, or ``foreach`` or ``fused`` was forced where the
                parameters are.
        """
        if torch.compiler.is_dynamo_compiling():
            return compiled.step_(self, closure, loss)
        return self._step(closure, loss)

    @_use_grad_for_differentiable
    def _step(self, closure: Callable[[], Any] | None, loss: Tensor | float | None) -> Any:
        """Take one step, as :meth:`step` describes it."""
        self._accelerator_graph_capture_health_check()
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
        surprise = read_surprise(returned if loss is None else loss)
        watches = "grad_norm" if surprise is None else "loss"
        if self._controller is not None:
            check_watched(self._watches, watches)
        if functional.have_moved(self.param_groups, self._buffer.device):
            self._place()
        batch = self._collector.collect(self.param_groups, self.state, self._terms, self._append)
        if not batch.params:
            return returned
        self._watches = watches
        options = Options(
            decoupled=is_decoupled(self.param_groups),
            controller=self._controller,
            surprise=surprise,
            max_norm=self._max_grad_norm,
            strength=0.0 if self._penalty is None else self._penalty.strength,
            proximal=self._penalty is not None and self._penalty.mode == "proximal",
            diagnostics=self._buffer,
        )
        hypers = [read_hyper(group) for group in self.param_groups]
        try:
            functional.step_(self._implementation, batch, hypers, options, self._kept)
        finally:
            batch.grads = []  # zero_grad(set_to_none=True) must free their memory
        return returned

    def _append(self, batch: Batch, index: int, param: Tensor) -> None:
        """Complete a parameter's state and add it to the batch."""
        group, state = self.param_groups[index], self.state[param]
        gated = self._controller is not None
        complete_state(
            state,
            param,
            betas=group["betas"],
            amsgrad=group["amsgrad"],
            step_kind=self._step_kind(group, param),
            gated=gated,
        )
        term = self._terms.get(param)
        batch.append(param, index, state, amsgrad=group["amsgrad"], gated=gated, term=term)

    def _step_kind(self, group: dict[str, Any], param: Tensor) -> dict[str, Any]:
        """Return the device and dtype of the parameter's step counter."""
        return step_kind(group, param, triton=self._implementation == "triton")

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict; with a controller, its tensors under ``"controller"`` too."""

        def add(_: Any, state_dict: dict[str, Any]) -> None:
            if self._controller is not None:
                memory = self._controller.state_dict()
                state_dict["controller"] = {**memory, "watches": self._watches}

        handle = self.register_state_dict_post_hook(add, prepend=True)  # the user's see it whole
        try:
            return super().state_dict()
        finally:
            handle.remove()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by this class or by torch's Adam and AdamW.

        Moments stay float32 under half-precision parameters. A state without a controller starts
        this optimizer's controller afresh.

        Args:
            state_dict: What ``state_dict()`` returned.

        Raises:
            ValueError: The state is of other parameters or of another controller; nothing has
                been changed then.
        """
        loaded: dict[str, Any] = {}

        def check(_: Any, state_dict: dict[str, Any]) -> None:
            saved = state_dict.get("controller")
            if self._controller is not None and saved is not None:
                self._controller.check_state_dict(saved)
            loaded.update(state_dict)

        # Hooks of the user's may replace the state before, and change what was loaded after.
        handles = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(lambda _: self._restore(loaded), prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _restore(self, loaded: dict[str, Any]) -> None:
        """Bring back what torch has cast or does not know of a state that it has loaded."""
        for group, old in zip(self.param_groups, loaded["param_groups"], strict=True):
            for param, key in zip(group["params"], old["params"], strict=True):
                if key in loaded["state"]:
                    kind = self._step_kind(group, param)
                    restore_dtypes(self.state[param], param, loaded["state"][key], kind)
        if self._controller is not None:
            saved = loaded.get("controller")
            fresh = ARSController(self._controller.config).state_dict()
            self._controller.load_state_dict(fresh if saved is None else saved)
            self._watches = None if saved is None else saved.get("watches")

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the controller and the penalty too; the kernel's tables are made anew."""
        state: dict[str, Any] = super().__getstate__()
        for name in (
            "_controller", "_watches", "_penalty", "_terms", "_max_grad_norm", "_buffer",
            "_implementation", "_step_supports_amp_scaling",
        ):  # fmt: skip
            state[name] = self.__dict__[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; the kernel's tables are made anew."""
        super().__setstate__(state)
        self._kept = functional.Kept()
        self._collector = Collector()
        self._traced = compiled.TracedOptimizer(self)
