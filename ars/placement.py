"""What depends on where an optimizer's parameters are: its implementation, controller, penalty."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ars import functional
from ars.batch import read_hyper
from ars.compiled import TracedOptimizer
from ars.controller import ARSController
from ars.groups import complete_group
from ars.penalty import Penalty, Term, parameter_names, read_terms
from ars.state import Precision

__all__ = ["PlacedAdam"]


class PlacedAdam(torch.optim.Adam):
    """Adam that takes its step, and keeps what the step needs, where its parameters are."""

    _buffer: Tensor
    _controller: ARSController | None
    _implementation: functional.Implementation
    _kept: functional.Kept
    _penalty: Penalty | None
    _precision: Precision
    _step_supports_amp_scaling: bool
    _terms: dict[Tensor, Term]
    _traced: TracedOptimizer
    _version: Any  # of the penalty whose terms these are

    def _parameters(self) -> list[Tensor]:
        """Return the parameters of all groups, in order."""
        return [param for group in self.param_groups for param in group["params"]]

    @property
    def _keeps_products(self) -> bool:
        """Whether the betas vary, so that their products are not powers of the step."""
        return self._controller is not None and "betas" in self._controller.config.gate

    def _start(self) -> None:
        """Place the optimizer for the first time, here or where a copy of it is made."""
        self._implementation = "loop"
        self._step_supports_amp_scaling = False
        if not self._buffer.is_meta:  # parameters there may get data, elsewhere, before a step
            self._place()

    def _follow(self) -> None:
        """Follow parameters that have moved since, and a penalty that has other tensors now."""
        if functional.have_moved(self.param_groups, self._buffer.device):
            self._place()
        if getattr(self._penalty, "version", 0) != self._version:
            self.penalty = self._penalty

    def _place(self) -> None:
        """Choose the implementation, and bring what the step keeps, where the parameters are.

        Raises:
            RuntimeError: ``foreach`` or ``fused`` was forced where it cannot be had.
            TypeError: The penalty has lost a member.
            ValueError: The penalty is not where the parameters are. Whatever is raised, nothing
                has been changed then.
        """
        params = self._parameters()
        flags = {name: self.defaults[name] for name in ("foreach", "fused", "differentiable")}
        chosen = functional.choose(params, **flags, rounding=not self._precision.is_plain)
        moves = bool(params) and params[0].device != self._buffer.device
        terms = self._read_terms(self._penalty) if moves else self._terms
        self._implementation = chosen
        # On a GPU the loop would have to wait for found_inf: there a GradScaler unscales the
        # gradients itself, and skips the step.
        on_cpu = all(param.device.type == "cpu" for param in params)
        self._step_supports_amp_scaling = chosen != "loop" or on_cpu
        if not moves:
            return
        self._terms = terms
        self._buffer = torch.zeros_like(self._buffer, device=params[0].device)
        self._kept = functional.Kept()
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
        complete_group(param_group)
        super().add_param_group(param_group)
        if "_implementation" in self.__dict__:  # after the constructor
            self._version = None  # the penalty may have been waiting for these: ask again
            device, new = self._buffer.device, param_group["params"]
            if any(p.device != device or is_traceable_wrapper_subclass(p) for p in new):
                try:
                    self._place()
                except (RuntimeError, TypeError, ValueError):
                    self.param_groups.pop()
                    raise

    @property
    def penalty(self) -> Penalty | None:
        """The penalty towards what an earlier model knew; may be replaced between steps."""
        return self._penalty

    @penalty.setter
    def penalty(self, penalty: Penalty | None) -> None:
        self._terms = self._read_terms(penalty)
        self._penalty, self._version = penalty, getattr(penalty, "version", 0)
        self._traced.penalised = penalty is not None

    def _read_terms(self, penalty: Penalty | None) -> dict[Tensor, Term]:
        """Ask a penalty for its terms, and check them and the groups' own strengths."""
        for group in self.param_groups:
            read_hyper(group, 0.0)
        return {} if penalty is None else read_terms(penalty, parameter_names(self.param_groups))
