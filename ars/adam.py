"""Adam with the controller, the clipping and the penalty inside the step."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, _use_grad_for_differentiable

from ars import compiled, functional
from ars.batch import DIAGNOSTICS, Batch, Hyper, Options, is_decoupled, read_hyper, rows
from ars.checkpoint import CheckpointedAdam
from ars.collect import Collector
from ars.config import CONDITIONED, ARSConfig
from ars.controller import ARSController
from ars.counters import CounterPool
from ars.groups import check_max_grad_norm, has_gradient, is_trial
from ars.penalty import (
    Penalty,
    Term,
    check_group_strengths,
    parameter_names,
    read_settings,
    refresh_,
)
from ars.rows import change_rows_
from ars.state import Precision, check_operands, complete_state
from ars.surprise import Group, Replicas, check_watched, choose_surprise

__all__ = ["ARSAdam"]


class ARSAdam(CheckpointedAdam):
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
        check_max_grad_norm(max_grad_norm)
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
        self._watches: str | None = None
        self._replicas = replicas
        self._max_grad_norm = max_grad_norm
        self._buffer = torch.zeros(len(DIAGNOSTICS), dtype=torch.float64, device=device)
        self._renew()
        self.penalty = penalty
        self._start()

    def _renew(self) -> None:
        """Make what is kept from step to step anew."""
        self._kept = functional.Kept()
        self._collector = Collector()
        self._pool = CounterPool()
        self._traced = compiled.TracedOptimizer(self)
        self._save_controller()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`__getstate__` returned, or what another version did."""
        own = [group["penalty_strength"] for group in self.__dict__.get("param_groups", ())]
        super().__setstate__(state)
        self.__dict__.setdefault("_precision", Precision(stochastic=False, master=False, seed=0))
        for index, group in enumerate(self.param_groups):  # a state of torch's does not have it
            group.setdefault("penalty_strength", own[index] if own else None)
        self.__dict__.setdefault("_replicas", Replicas(None))
        self._renew()
        if "_penalty" in state:  # a copy: of other tensors, perhaps on another machine
            self.penalty = self._penalty
            self._start()

    @property
    def controller(self) -> ARSController | None:
        """The controller, or None with ``ars=None``."""
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
        surprise: Tensor | float | None = None,
    ) -> Any:
        """Take one step; without a gradient nothing happens, as in torch.

        Args:
            closure: Re-evaluates the model and returns the loss, as for every torch optimizer. If
                it returns None once but there are gradients, the last loss counts again.
            loss: The loss, 0-d: the surprise that the controller watches. Without it (and without
                a closure that returns one) the controller watches the gradient norm.
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
            return compiled.step_(self, closure, loss, surprise)
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
        given = (closure, loss, surprise)
        if not self.state and given == (None, None, None) and is_trial(self.param_groups):
            self._follow()  # for the state is made where the step is taken
            self._collect().grads = []
            return None
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
        loss = returned if loss is None else loss
        if loss is None and surprise is None and not has_gradient(self.param_groups):
            return returned
        if loss is None and closure is not None and self._watches == "loss":
            assert self._controller is not None
            loss = self._controller.latest()
        watches, watched = choose_surprise(self._controller, loss, surprise)
        if self._controller is not None:
            check_watched(self._watches, watches)
        self._follow()
        if self._controller is not None:
            watched = self._replicas.mean(watched, self._buffer.device)
        hypers, options = self._settings(watched)
        batch = self._collect()
        if not batch.params:
            return returned
        options = self._refresh(options)
        self._watches = watches
        try:
            functional.step_(self._implementation, batch, hypers, options, self._kept)
        finally:
            batch.grads = []  # zero_grad(set_to_none=True) must free their memory
        if watched is None and self._controller is not None:
            self._controller.check_norm(self.param_groups)
        return returned

    def write_hyperparameters(self) -> None:
        """Send the groups' numbers to the device without a step: before a CUDA graph is replayed.

        A graph replays no Python: it sees a float that a scheduler has changed (lr, betas, eps,
        weight decay, strengths) only after this. Tensors it reads live. Without the Triton kernels
        there is nothing to send.

        Raises:
            TypeError: A strength is not a number.
            ValueError: A strength is out of its range, or the penalty's mode unknown.
            RuntimeError: A graph is being captured, which would replay these numbers for ever.

        Example:
            >>> weight = torch.nn.Parameter(torch.ones(2))
            >>> opt = ARSAdam([weight], lr=0.1)  # on a GPU, with a captured graph
            >>> opt.param_groups[0]["lr"] = 0.05
            >>> opt.write_hyperparameters()  # and then graph.replay()
        """
        if self._implementation == "triton":
            device = self._buffer.device
            hypers = rows(self._hypers(), unused=self._collector.has_unused())
            self._kept.device.write_hyper(hypers, self._max_grad_norm, device)

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
        names = parameter_names(self.param_groups)
        if param not in names:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is not in this optimizer: pass one of "
                "its param_groups"
            )
        if param in self._terms:
            raise ValueError(
                f"the penalty holds {names[param]}, with an anchor of its old rows: set "
                "optimizer.penalty to None, change the rows, then build the penalty anew"
            )
        self._check(param, param.grad)
        change_rows_(param, names[param], self.state.get(param, {}), keep, added)

    def _hypers(self) -> list[Hyper]:
        strength, _ = read_settings(self._penalty)
        return [read_hyper(group, strength) for group in self.param_groups]

    def _collect(self) -> Batch:
        return self._collector.collect(
            self.param_groups,
            self.state,
            self._terms,
            self._append,
            self._check,
            proximal=read_settings(self._penalty)[1],
        )

    def _check(self, param: Tensor, grad: Tensor | None) -> None:
        """Raise unless all that belongs to a parameter fits it."""
        state, term = self.state.get(param, {}), self._terms.get(param, Term())
        check_operands(param, grad, state, term, self.param_groups, self._precision)

    def _settings(self, surprise: Tensor | None) -> tuple[list[Hyper], Options]:
        """Read what this step shall do."""
        _, proximal = read_settings(self._penalty)
        check_group_strengths(self._penalty, self.param_groups)
        return self._hypers(), Options(
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

    def _refresh(self, options: Options) -> Options:
        """Let the penalty prepare for the step, once it is known that all tensors fit."""
        return options._replace(penalty=refresh_(self._penalty))

    def _append(self, batch: Batch, index: int, number: int, param: Tensor) -> None:
        """Complete a parameter's state and add it to the batch."""
        group, state = self.param_groups[index], self.state[param]
        kind, precision = self._step_kind(group, param), self._precision
        both = {"amsgrad": group["amsgrad"], "products": self._keeps_products}
        complete_state(state, param, step_kind=kind, precision=precision, pool=self._pool, **both)
        term = self._terms.get(param, Term())
        batch.append(param, index, number, state, master=precision.master, term=term, **both)
