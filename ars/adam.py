"""ARSAdam and ARSAdamW: the controller, the clipping and the penalty inside Adam's step."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, _use_grad_for_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ars.config import CONDITIONED, ARSConfig
from ars.controller import ARSController
from ars.penalty import (
    Penalty,
    Term,
    check_group_strengths,
    check_strength,
    parameter_names,
    read_settings,
    read_terms,
    refresh_,
)
from ars.sharded import Group, is_sharded, part_of, shard_number
from ars.step import choose
from ars.step.agree import Agreement
from ars.step.batch import (
    DIAGNOSTICS,
    Batch,
    Collector,
    Hyper,
    Options,
    has_gradient,
    hyper_rows,
    is_decoupled,
    make_operands,
    read_hyper,
)
from ars.step.compile import OPTIMIZERS, TracedOptimizer
from ars.step.compile import step_ as step_in_graph
from ars.step.loading import check_state_dict, take_controller, unchanged_on_error
from ars.step.shares import check_share, engine_of
from ars.step.state import (
    CounterPool,
    Precision,
    change_rows_,
    check_operands,
    complete_state,
    is_trial,
    restore_dtypes,
    step_kind,
)
from ars.surprise import (
    Replicas,
    StepLosses,
    check_watched,
    choose_surprise,
    warn_of_fallback,
)

__all__ = ["ARSAdam", "ARSAdamW"]


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

    _engine: str | None = None  # whose share of a model these parameters are
    _implementation: choose.Implementation
    _losses: StepLosses
    _penalty: Penalty | None
    _step_supports_amp_scaling: bool
    _terms: dict[Tensor, Term]  # of the penalty
    _version: Any  # of the penalty whose terms these are

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
        process_group: Group = None,
        penalty: Penalty | None = None,
        max_grad_norm: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        stochastic_rounding: bool = False,
        master_weights: bool = False,
        seed: int = 0,
    ) -> None:
        if ars is not None and not isinstance(ars, ARSConfig):
            raise TypeError(f"ars must be an ARSConfig or None, got {ars!r}")
        replicas = Replicas(process_group)
        _check_max_grad_norm(max_grad_norm)
        _check_not_text_or_model(params, lr=lr, eps=eps, weight_decay=weight_decay)
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
        params = self._parameters()
        self._precision = Precision(stochastic_rounding, master_weights, seed)
        self._precision.check(params, differentiable=differentiable)
        device = params[0].device if params else torch.device("cpu")
        self._controller = None if ars is None else ARSController(ars, device)
        self._name_controller()
        self._watches: str | None = None
        self._replicas = replicas
        self._engine = engine_of(params)
        self._max_grad_norm = max_grad_norm
        self._buffer = torch.zeros(len(DIAGNOSTICS), dtype=torch.float64, device=device)
        self._start_caches()
        self.penalty = penalty
        self._start_placement()

    def _start_caches(self) -> None:
        """Make what is kept from step to step, and is not pickled."""
        self._steppers = choose.Steppers()
        self._collector = Collector()
        self._pool = CounterPool()
        self._traced = TracedOptimizer(self)
        self._agreement: Agreement | None = None
        # Fabric and Lightning hold it too, in their copies of this optimizer's attributes.
        self.__dict__.setdefault("_losses", StepLosses()).clear()
        # A hook that came and went with each state_dict() would be in the way of another thread's.
        if _add_controller not in self._optimizer_state_dict_post_hooks.values():
            self.register_state_dict_post_hook(_add_controller, prepend=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`__getstate__` returned, or what another version did."""
        own = [group["penalty_strength"] for group in self.__dict__.get("param_groups", ())]
        super().__setstate__(state)
        self.__dict__.setdefault("_precision", Precision(stochastic=False, master=False, seed=0))
        for index, group in enumerate(self.param_groups):  # a state of torch's does not have it
            group.setdefault("penalty_strength", own[index] if own else None)
        self._name_controller()
        self.__dict__.setdefault("_replicas", Replicas(None))
        self._start_caches()
        if "_penalty" in state:  # a copy: of other tensors, perhaps on another machine
            self.penalty = self._penalty
            self._start_placement()

    def _name_controller(self) -> None:
        """Name the controller in the groups, where each state dict has it.

        ``torch.distributed.checkpoint`` takes of a flat state what the groups name.
        """
        for group in self.param_groups if self._controller is not None else ():
            group["controller"] = None

    @property
    def controller(self) -> ARSController | None:
        """The controller, or None with ``ars=None``."""
        return self._original()._controller

    @property
    def process_group(self) -> Group:
        """The processes that gate alike; may be set, as after unpickling."""
        return self._original()._replicas.group

    @process_group.setter
    def process_group(self, process_group: Group) -> None:
        self._original()._replicas = Replicas(process_group)

    def _original(self) -> "ARSAdam":
        """Return the optimizer that steps: Fabric and Lightning hand out copies of its attributes.

        What is set on such a copy would have no effect.
        """
        if torch.compiler.is_dynamo_compiling():  # it does not trace weak references
            return self
        found = OPTIMIZERS.get(self._traced.name)
        return found if isinstance(found, ARSAdam) else self

    @property
    def diagnostics(self) -> Mapping[str, Tensor]:
        """What the last step saw and did, as 0-d float64 tensors on the device.

        ``surprise``, ``rho``, ``psi``, ``phi``, ``chi`` of the controller (eqs. 1 to 4); ``lr``,
        ``beta1``, ``beta2`` of the first group, as gated; ``grad_norm``, NaN when the step did not
        need it; ``penalty``, its value before the step. The tensors are overwritten by each step;
        reading one (``float(...)``) waits for the device, so read what you log, when you log it.
        """
        return dict(zip(DIAGNOSTICS, self._original()._buffer.unbind(), strict=True))

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def watch(self, loss: Tensor | float) -> None:
        """Note the loss of the next step, for callers that cannot pass it to :meth:`step`.

        Called once for each micro-batch of a step, it has the controller watch their mean. A
        closure's loss is not watched then. Nothing waits for the device.

        Args:
            loss: The loss, 0-d, not divided by the number of micro-batches.

        Raises:
            TypeError: It is neither a tensor nor a number.
            ValueError: It is not a scalar.

        Example:
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> opt = ARSAdam([weight], lr=0.1)
            >>> for scale in (1.0, 2.0):  # two micro-batches
            ...     loss = scale * weight.sum()
            ...     opt.watch(loss)
            ...     (loss / 2).backward()
            >>> opt.step()
            >>> float(opt.diagnostics["surprise"])
            3.0
        """
        self._losses.add(loss)

    def reset_controller(self) -> None:
        """Start the controller afresh: as where a resumed run watches another quantity.

        Its window is empty then, the gate is open, and it may watch the loss, the gradient norm or
        else from the next step on.

        Example:
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> opt = ARSAdam([weight])
            >>> weight.sum().backward()
            >>> opt.step(loss=1.0)
            >>> opt.reset_controller()
            >>> int(opt.controller.state_dict()["counts"][0])
            0
        """
        own = self._original()
        if own._controller is not None:
            fresh = ARSController(own._controller.config).state_dict()
            own._controller.load_state_dict(fresh)
        own._watches = None

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        loss: Tensor | float | None = None,
        surprise: Tensor | float | None = None,
    ) -> Any:
        """Take one step; without a gradient nothing happens, as in torch.

        Args:
            closure: Re-evaluates the model and returns the loss, as for every torch optimizer. If
                it returns None once but there are gradients, the last loss counts again.
            loss: The loss, 0-d: the surprise that the controller watches. Without it (and without
                :meth:`watch` or a closure that returns one) the controller watches the gradient
                norm, and the first step says so.
            surprise: With ``ARSConfig(surprise="entropy")``, what is watched instead, 0-d, such as
                :func:`ars.prediction_entropy`.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError: The loss or the surprise is neither a tensor nor a number.
            ValueError: It is not a scalar, the surprise is missing or not what is watched, it
                changed its kind between steps, or the groups differ in ``decoupled_weight_decay``.
            RuntimeError: A gradient is sparse; or it, a moment or the penalty has not the
                parameter's shape, dtype or device; or ``foreach`` or ``fused`` was forced where the
                parameters are. Nothing has moved then.
        """
        if torch.compiler.is_dynamo_compiling():
            return step_in_graph(self, closure, loss, surprise)
        return self._step(closure, loss, surprise)

    @_use_grad_for_differentiable
    def _step(
        self,
        closure: Callable[[], Any] | None,
        loss: Tensor | float | None,
        surprise: Tensor | float | None,
    ) -> Any:
        """Take one step, as :meth:`step` describes it."""
        self._accelerator_graph_capture_health_check()
        given = (closure, self._losses.choose(loss, None), surprise)
        if not self.state and given == (None, None, None) and is_trial(self.param_groups):
            self._follow_parameters()  # for the state is made where the step is taken
            self._collect(proximal=False).grads = []
            return None
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
        loss = self._losses.choose(loss, returned)
        if loss is None and surprise is None and not has_gradient(self.param_groups):
            return returned
        if loss is None and closure is not None and self._watches == "loss":
            assert self._controller is not None
            loss = self._controller.latest()
        watches, watched = choose_surprise(self._controller, loss, surprise)
        if self._controller is not None:
            check_watched(self._watches, watches)
        if self._engine is not None:
            gated = self._controller is not None
            check_share(
                self._engine,
                norm=self._max_grad_norm is not None or (gated and watched is None),
                penalty=self._penalty is not None,
                alone=gated and self._replicas.group is False,
            )
        if self._controller is not None:
            warn_of_fallback(self._controller, self._watches, watches)
        self._follow_parameters()
        if self._controller is not None and not self._is_sharded:
            watched = self._replicas.mean(watched, self._buffer.device)
        hypers, options = self._read_settings(watched)
        batch = self._collect(proximal=options.proximal)
        self._losses.clear()
        if not batch.tensors:
            return returned
        if self._controller is not None and self._is_sharded and not batch.is_sharded:
            watched = self._replicas.mean(watched, self._buffer.device)
            options = options._replace(surprise=watched)
        # Once it is known that all tensors fit.
        options = options._replace(penalty=refresh_(self._penalty))
        self._watches = watches
        try:
            if batch.is_sharded:
                self._take_sharded_step(batch, hypers, options)
            else:
                choose.step_(self._implementation, batch, hypers, options, self._steppers)
        finally:
            batch.grads = []  # zero_grad(set_to_none=True) must free their memory
        if watched is None and self._controller is not None:
            self._controller.check_norm(self.param_groups)
        return returned

    def _take_sharded_step(self, batch: Batch, hypers: list[Hyper], options: Options) -> None:
        """Take a step on parts of DTensors, agreed on with who holds the others."""
        if self._agreement is None or self._agreement.batch is not batch:
            self._agreement = Agreement(batch)
        agreement, implementation = self._agreement, self._implementation
        options = agreement.reach(batch, options, self._replicas, choose.NORMS[implementation])
        if self._penalty is None:
            choose.step_(implementation, batch, hypers, options, self._steppers)
            return
        before = agreement.penalty_before(batch, hypers)
        own = options._replace(penalty=None)
        choose.step_(implementation, batch, hypers, own, self._steppers)
        agreement.report_penalty_(batch, options, before)

    def write_hyperparameters(self) -> None:
        """Send the groups' numbers to the device without a step: before a CUDA graph is replayed.

        A graph replays no Python: it sees a float that a scheduler has changed (lr, betas, eps,
        weight decay, strengths) only after this. Tensors it reads live. Without the Triton kernels
        there is nothing to send.

        Raises:
            TypeError: A strength is not a number.
            ValueError: A strength is out of its range, or the penalty's mode unknown, or the groups
                differ in ``decoupled_weight_decay``.
            RuntimeError: A graph is being captured, which would replay these numbers for ever.

        Example:
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> opt = ARSAdam([weight], lr=0.1)  # on a GPU, with a captured graph
            >>> opt.param_groups[0]["lr"] = 0.05
            >>> opt.write_hyperparameters()  # and then graph.replay()
        """
        if self._implementation == "triton":
            hypers, options = self._read_settings(None)
            rows = hyper_rows(hypers, unused=self._collector.has_unused())
            self._steppers.triton.write_hyper(rows, options.max_norm, self._buffer.device)

    def change_rows(
        self, param: Tensor, keep: Tensor | None = None, added: Tensor | None = None
    ) -> None:
        """Remove rows of a parameter, or add some, with all that belongs to them.

        Kept rows take their moments and their gradient along. Added rows begin with moments and a
        gradient of 0; they share the parameter's step count, as all its rows do, so their first
        updates may be larger than the learning rate (3.2 times with betas 0.9 and 0.999). The
        parameter stays the same object. It must not be in a penalty: its anchor has the old rows.

        Args:
            param: A parameter of this optimizer, of at least one dimension.
            keep: The rows that stay, in this order: indices, int64, or a mask of all rows, bool.
                None keeps all.
            added: Rows to put after them, shape (n, ...) as the parameter's; converted to its dtype
                and device.

        Raises:
            TypeError: ``keep`` or ``added`` has another dtype.
            ValueError: The parameter is not in this optimizer, or in its penalty; or a shape or an
                index does not fit. Nothing has been changed then.
            RuntimeError: What belongs to the parameter does not fit it as it is.

        Example:
            >>> weight = torch.nn.Parameter(torch.ones(3, 2))
            >>> opt = ARSAdam([weight], lr=0.1)
            >>> weight.sum().backward()
            >>> opt.step()
            >>> opt.change_rows(weight, keep=torch.tensor([0, 2]), added=torch.zeros(1, 2))
            >>> weight.shape, opt.state[weight]["exp_avg"][:, 0]
            (torch.Size([3, 2]), tensor([0.1000, 0.1000, 0.0000]))
        """
        own, names = self._original(), parameter_names(self.param_groups)
        if param not in names:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is not in this optimizer: pass one of "
                "its param_groups"
            )
        if param in own._terms:
            raise ValueError(
                f"the penalty holds {names[param]}, with an anchor of its old rows: set "
                "optimizer.penalty to None, change the rows, then build the penalty anew"
            )
        own._check(param, param.grad)
        change_rows_(param, names[param], self.state.get(param, {}), keep, added)

    def _parameters(self) -> list[Tensor]:
        """Return the parameters of all groups, in order."""
        return [param for group in self.param_groups for param in group["params"]]

    @property
    def _keeps_products(self) -> bool:
        """Whether the betas vary, so that their products are not powers of the step."""
        return self._controller is not None and "betas" in self._controller.config.gate

    def _start_placement(self) -> None:
        """Place the optimizer for the first time, here or where a copy of it is made."""
        self._implementation = "loop"
        self._is_sharded = False
        self._step_supports_amp_scaling = False
        if not self._buffer.is_meta:  # parameters there may get data, elsewhere, before a step
            self._move_to_parameters()

    def _follow_parameters(self) -> None:
        """Follow parameters that have moved since, and a penalty that has other tensors now."""
        if choose.is_misplaced(self.param_groups, self._buffer.device):
            self._move_to_parameters()
        if getattr(self._penalty, "version", 0) != self._version:
            self.penalty = self._penalty

    def _move_to_parameters(self) -> None:
        """Choose the implementation, and bring what the step keeps, where the parameters are.

        Raises:
            RuntimeError: ``foreach`` or ``fused`` was forced where it cannot be had.
            TypeError: The penalty has lost a member.
            ValueError: The penalty is not where the parameters are. Whatever is raised, nothing
                has been changed then.
        """
        params = self._parameters()
        flags = {name: self.defaults[name] for name in ("foreach", "fused", "differentiable")}
        # Autograd knows the whole, not its parts.
        parts = params if self.defaults["differentiable"] else list(map(part_of, params))
        chosen = choose.choose(parts, **flags, rounding=not self._precision.is_plain)
        moves = bool(params) and params[0].device != self._buffer.device
        terms = self._read_terms(self._penalty) if moves else self._terms
        self._implementation = chosen
        self._is_sharded = any(map(is_sharded, params)) and not self.defaults["differentiable"]
        # On a GPU the loop would have to wait for found_inf: there a GradScaler unscales the
        # gradients itself, and skips the step.
        on_cpu = all(param.device.type == "cpu" for param in params)
        self._step_supports_amp_scaling = chosen != "loop" or on_cpu
        if not moves:
            return
        self._terms = terms
        self._buffer = torch.zeros_like(self._buffer, device=params[0].device)
        self._steppers = choose.Steppers()
        if self._controller is not None:
            memory = self._controller.state_dict()
            self._controller = ARSController(self._controller.config, params[0].device)
            if not memory["window"].is_meta:
                self._controller.load_state_dict(memory)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as with every torch optimizer.

        Args:
            param_group: Its parameters, and what differs from the defaults.

        Raises:
            TypeError: It is not a dictionary, or its strength not a number.
            ValueError: A parameter is in it twice, or in another group too; or its strength is out
                of its range.
            RuntimeError: ``foreach`` or ``fused`` was forced and cannot be had for all groups.
        """
        _complete_group(param_group)
        super().add_param_group(param_group)
        if "_implementation" in self.__dict__:  # after the constructor
            self._name_controller()
            self._version = None  # the penalty may have been waiting for these: ask again
            device, new = self._buffer.device, param_group["params"]
            if any(p.device != device or is_traceable_wrapper_subclass(p) for p in new):
                try:
                    self._move_to_parameters()
                except (RuntimeError, TypeError, ValueError):
                    self.param_groups.pop()
                    raise

    @property
    def penalty(self) -> Penalty | None:
        """The penalty towards what an earlier model knew; may be replaced between steps."""
        return self._original()._penalty

    @penalty.setter
    def penalty(self, penalty: Penalty | None) -> None:
        own = self._original()
        own._terms = own._read_terms(penalty)
        own._penalty, own._version = penalty, getattr(penalty, "version", 0)
        own._traced.penalised = penalty is not None

    def _read_terms(self, penalty: Penalty | None) -> dict[Tensor, Term]:
        """Ask a penalty for its terms, and check them."""
        return {} if penalty is None else read_terms(penalty, parameter_names(self.param_groups))

    def _step_kind(self, group: dict[str, Any], param: Tensor) -> dict[str, Any]:
        """Return the device and dtype of the parameter's step counter."""
        return step_kind(group, param, triton=self._implementation == "triton")

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by this class or by torch's Adam and AdamW.

        Moments stay float32 under half-precision parameters. A state without a controller starts
        this optimizer's controller afresh.

        Args:
            state_dict: What ``state_dict()`` returned.

        Raises:
            TypeError: Something in it has another type.
            ValueError: The state is of other parameters or of another controller, something in it
                is missing or out of its range, or the penalty is not where the parameters now are.
            RuntimeError: ``foreach`` or ``fused`` was forced where the parameters now are. Whatever
                is raised, nothing has been changed then.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"a state dict must be a dict, got {type(state_dict).__name__}")
        loaded: dict[str, Any] = {}

        def check(_: Any, state_dict: dict[str, Any]) -> None:
            self._follow_parameters()  # for the state is restored where the step is taken
            take_controller(state_dict)
            saved = state_dict.get("controller")
            if self._controller is not None and saved is not None:
                self._controller.check_state_dict(saved)
            check_state_dict(self, state_dict, products=self._keeps_products)
            loaded.update(state_dict)

        # Hooks of the user's may replace the state before, and change what was loaded after.
        handles = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(lambda _: self._restore(loaded), prepend=True),
        )
        try:
            with unchanged_on_error(self, self._controller):
                super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _restore(self, loaded: dict[str, Any]) -> None:
        """Bring back what torch has cast or does not know of a state that it has loaded.

        Raises:
            ValueError: The groups differ in ``decoupled_weight_decay``.
        """
        is_decoupled(self.param_groups)
        for group, old in zip(self.param_groups, loaded["param_groups"], strict=True):
            for param, key in zip(group["params"], old["params"], strict=True):
                if key in loaded["state"]:
                    kind = self._step_kind(group, param)
                    own, old_state = self.state[param], loaded["state"][key]
                    restore_dtypes(
                        own, param, old_state, kind, self._precision, products=self._keeps_products
                    )
        if self._controller is not None:
            saved = loaded.get("controller")
            fresh = ARSController(self._controller.config).state_dict()
            self._controller.load_state_dict(fresh if saved is None else saved)
            self._watches = None if saved is None else saved.get("watches")

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the controller and the penalty too; the rest is made and chosen anew."""
        state: dict[str, Any] = super().__getstate__()
        for name in (
            "_controller", "_watches", "_replicas", "_penalty", "_max_grad_norm", "_buffer",
            "_precision", "_engine",
        ):  # fmt: skip
            state[name] = self.__dict__[name]
        return state

    def _collect(self, *, proximal: bool) -> Batch:
        return self._collector.collect(
            self.param_groups,
            self.state,
            self._terms,
            self._append,
            self._check,
            proximal=proximal,
            parts=not self.defaults["differentiable"],
        )

    def _check(self, param: Tensor, grad: Tensor | None) -> None:
        """Raise unless all that belongs to a parameter fits it."""
        state, term = self.state.get(param, {}), self._terms.get(param, Term())
        check_operands(param, grad, state, term, self.param_groups, self._precision)

    def _read_settings(self, surprise: Tensor | None) -> tuple[list[Hyper], Options]:
        """Read what this step shall do, but for the penalty's value."""
        strength, proximal = read_settings(self._penalty)
        check_group_strengths(self._penalty, self.param_groups)
        return [read_hyper(group, strength) for group in self.param_groups], Options(
            decoupled=is_decoupled(self.param_groups),
            controller=self._controller,
            surprise=surprise,
            max_norm=self._max_grad_norm,
            proximal=proximal,
            penalty=None,
            diagnostics=self._buffer,
            grad_scale=getattr(self, "grad_scale", None),  # set by a GradScaler for this step
            found_inf=getattr(self, "found_inf", None),
            stochastic=self._precision.stochastic,
            seed=self._precision.seed,
        )

    def _append(self, batch: Batch, index: int, number: int, param: Tensor) -> None:
        """Complete a parameter's state and add it to the batch."""
        group, state = self.param_groups[index], self.state[param]
        kind, precision = self._step_kind(group, param), self._precision
        kept = {"amsgrad": group["amsgrad"], "products": self._keeps_products}
        complete_state(state, param, step_kind=kind, precision=precision, pool=self._pool, **kept)
        term, parts = self._terms.get(param, Term()), not self.defaults["differentiable"]
        tensors = make_operands(param, state, term, master=precision.master, parts=parts, **kept)
        if parts and is_sharded(param):  # of which each part is rounded by itself
            number += shard_number(param) * len(self._parameters())
        batch.append(param, tensors, index, number)


class ARSAdamW(ARSAdam):
    r"""AdamW with an on-device stability controller and an inheritance penalty in the same pass.

    .. math::
        \Phi, \chi &= \text{controller}(S), \quad
        \eta^{\text{eff}} = \eta (1 + \chi) \Phi, \quad \beta_i^{\text{eff}} = \beta_i \\
        g &\leftarrow \text{clip}(g) + \lambda \Omega (\theta - \theta^*) \\
        m &\leftarrow \beta_1^{\text{eff}} m + (1 - \beta_1^{\text{eff}}) g, \quad
        v \leftarrow \beta_2^{\text{eff}} v + (1 - \beta_2^{\text{eff}}) g^2, \quad
        B_i \leftarrow B_i \beta_i^{\text{eff}} \\
        \theta &\leftarrow (1 - \eta^{\text{eff}} w) \theta
            - \eta^{\text{eff}} \frac{m / (1 - B_1)}{\sqrt{v / (1 - B_2)} + \epsilon}

    Phi multiplies what ``ars.gate`` names; by default the learning rate, as here. In
    :meth:`ars.ARSConfig.paper` it is the betas, :math:`\beta_i^{\text{eff}} = \beta_i \Phi`.

    With ``ars=None, penalty=None, max_grad_norm=None`` it is :class:`torch.optim.AdamW`. Moments
    are float32 (float64 for float64 parameters), also under half-precision parameters.

    Args:
        params: Parameters, named parameters or parameter groups, which may also have their own
            ``penalty_strength`` (None: the penalty's).
        lr: Learning rate, >= 0; a 1-element tensor stays on its device.
        betas: Decays of the moments, in [0, 1).
        eps: Added to the root, >= 0.
        weight_decay: Decoupled weight decay w, >= 0.
        amsgrad: Use the running maximum of the second moment.
        ars: The controller's settings; None for plain AdamW.
        process_group: The processes whose controllers observe the mean of their surprises, so that
            all gate alike: a ``torch.distributed`` group. None: the default group, once there is
            one. False: each by itself, but for those that hold shards of the same parameters. With
            several processes, all of them must take the step.
        penalty: A penalty such as :class:`ars.regularizers.EWC`; see :class:`ars.penalty.Penalty`.
        max_grad_norm: Clip the norm of the task's gradient, over all groups, to this value.
        maximize: Ascend the objective.
        foreach: True: torch's foreach kernels (CPU). False with ``fused`` not True: a plain loop,
            as with ``fused=False``.
        capturable: The step may be captured in a CUDA graph; see :meth:`write_hyperparameters`.
        differentiable: Autograd may run through the step, a plain loop then.
        fused: True: fused kernels, Triton's on one GPU and torch's on a CPU. None: these where they
            can be had, otherwise (several GPUs, no Triton) the loop.
        stochastic_rounding: bfloat16 parameters have bfloat16 moments, and all three are rounded
            up or down at random, so that small updates are not lost on average. On a CPU this and
            ``master_weights`` take the loop.
        master_weights: bfloat16 parameters keep the 16 bits that they lack to float32 master
            weights in ``state[p]["param_remainder"]``.
        seed: Key of the random rounding, 0 <= seed < 2^63; the same on all replicas.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range, or the penalty belongs to another model.
        RuntimeError: ``foreach``, ``fused`` or a rounding was asked for where it cannot be had.

    Example:
        >>> import torch
        >>> from ars import ARSAdamW
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> torch.nn.init.ones_(model.weight).sum().item()
        2.0
        >>> opt = ARSAdamW(model.parameters(), lr=0.1, weight_decay=0.0)
        >>> loss = model(torch.ones(4, 2)).square().mean()
        >>> loss.backward()
        >>> opt.step(loss=loss)
        >>> model.weight.detach()
        tensor([[0.9000, 0.9000]])
        >>> float(opt.diagnostics["surprise"]), float(opt.diagnostics["phi"])
        (4.0, 1.0)

    References:
        Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv:1711.05101.
        Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks",
        arXiv:1612.00796.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        ars: ARSConfig | None = CONDITIONED,
        process_group: Group = None,
        penalty: Penalty | None = None,
        max_grad_norm: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        stochastic_rounding: bool = False,
        master_weights: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            ars=ars,
            process_group=process_group,
            penalty=penalty,
            max_grad_norm=max_grad_norm,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            stochastic_rounding=stochastic_rounding,
            master_weights=master_weights,
            seed=seed,
            decoupled_weight_decay=True,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; a state of Adam's stays decoupled here, as in torch."""
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True


def _add_controller(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Put the controller's tensors under ``"controller"`` in a state dict.

    And in its groups: ``torch.distributed.checkpoint`` keeps these and the states alone.
    """
    assert isinstance(optimizer, ARSAdam)
    if optimizer._controller is not None:
        memory = optimizer._controller.state_dict()
        state_dict["controller"] = {**memory, "watches": optimizer._watches}
        for group in state_dict["param_groups"]:
            group["controller"] = dict(state_dict["controller"])


def _check_not_text_or_model(params: Any, **numbers: Any) -> None:
    """Raise where torch would complain of an iteration or of a comparison.

    Args:
        params: What is to be optimized.
        numbers: Arguments by name.

    Raises:
        TypeError: A model was given for its parameters, or a text for a number.
    """
    if isinstance(params, torch.nn.Module):
        raise TypeError(
            f"params is a model, {type(params).__name__}: pass its parameters, model.parameters()"
        )
    for name, value in numbers.items():
        if isinstance(value, str):
            raise TypeError(
                f"{name} must be a number, got the text {value!r} (YAML reads 1e-3 as one, and "
                f"1.0e-3 as a number): use float({name})"
            )


def _check_max_grad_norm(norm: Any) -> None:
    """Raise unless gradients can be clipped to this norm, or it is None.

    Args:
        norm: The norm.

    Raises:
        TypeError: It is not a number.
        ValueError: It is not > 0.
    """
    if norm is None:
        return
    if not isinstance(norm, (int, float)) or isinstance(norm, bool):
        raise TypeError(f"max_grad_norm must be a number or None, got {norm!r}: use float(...)")
    if not norm > 0:
        raise ValueError(f"max_grad_norm must be > 0, or None not to clip, got {norm}")


def _complete_group(group: Any) -> None:
    """Check what torch does not check of a new group, and give it a penalty strength.

    Of a parameter that is in it twice torch only warns; our kernels would race for it.

    Args:
        group: The group; an iterator in it becomes a list.

    Raises:
        TypeError: It is not a dictionary, or its strength not a number.
        ValueError: It lists a parameter twice, or its strength is out of its range.
    """
    if not isinstance(group, dict):
        raise TypeError(f"param_group must be a dict, but got {type(group)}")
    if group.setdefault("penalty_strength", None) is not None:
        check_strength("penalty_strength", group["penalty_strength"])
    if isinstance(group["params"], (Tensor, set)):
        return
    group["params"] = list(group["params"])  # which may be an iterator
    first: dict[int, int] = {}
    for i, entry in enumerate(group["params"]):
        name, param = entry if isinstance(entry, tuple) else (f"parameter {i}", entry)
        if id(param) in first:
            raise ValueError(
                f"a parameter group with duplicate parameters: {name} is the same tensor as "
                f"parameter {first[id(param)]}; list every parameter once, as "
                "Module.parameters() does"
            )
        first[id(param)] = i
