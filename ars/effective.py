"""The effective values of any optimizer's step: what the controller gates, and then puts back."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ars.config import ARSConfig
from ars.reference import Signals
from ars.reference.scalars import Scalar

__all__ = ["GatedGradients", "Replay", "check_gateable", "gated_groups"]


def check_gateable(base: Any, config: Any) -> None:
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
    for index, group in enumerate(base.param_groups):
        if "lr" not in group:
            raise ValueError(f"{name} has no lr in group {index}, which the controller varies")
    if config.gate == ("betas",) and not any(map(_has_decays, base.param_groups)):
        raise ValueError(
            f"gate=('betas',) has nothing to act on: {name} has neither betas nor a momentum "
            "other than 0; use ARSConfig(gate=('lr',))"
        )


def _has_decays(group: dict[str, Any]) -> bool:
    """Whether a parameter group has what Phi multiplies as betas: ``betas``, or momentum not 0."""
    momentum = group.get("momentum", 0)
    return "betas" in group or isinstance(momentum, Tensor) or momentum != 0


@contextlib.contextmanager
def gated_groups(
    groups: list[dict[str, Any]], signals: Signals, gate: tuple[str, ...]
) -> Iterator[None]:
    """Give groups their effective lr, betas and momentum; the originals return afterwards.

    A tensor is changed in place, once however many groups share it, and gets back the same bits; so
    what has been captured in a graph, or refers to it, sees the change. Of a number only the group
    gets another; that reads a gate on another device, and waits for it.

    Args:
        groups: The optimizer's parameter groups.
        signals: The controller's signals of this step.
        gate: What Phi multiplies.
    """
    factors: dict[str, Scalar] = {"lr": 1 + signals.chi}
    if "lr" in gate:
        factors["lr"] = factors["lr"] * signals.phi
    if "betas" in gate:
        factors |= {"betas": signals.phi, "momentum": signals.phi}
    numbers: list[tuple[dict[str, Any], str, Any]] = []
    tensors: dict[int, tuple[Tensor, Tensor]] = {}

    def scaled(value: Any, factor: Scalar) -> Any:
        if not isinstance(value, Tensor):
            return value * float(factor)
        if id(value) not in tensors:
            tensors[id(value)] = value, value.detach().clone()
            there = factor.to(value.device) if isinstance(factor, Tensor) else factor
            value.detach().mul_(there)
        return value

    try:
        for name, factor in factors.items():
            if not isinstance(factor, Tensor) and factor == 1:
                continue
            for group in groups:
                if name in group:
                    value = group[name]
                    numbers.append((group, name, value))
                    several = isinstance(value, (tuple, list))
                    group[name] = (
                        type(value)(scaled(one, factor) for one in value)
                        if several
                        else scaled(value, factor)
                    )
        yield
    finally:
        for group, name, value in numbers:
            group[name] = value
        for value, before in tensors.values():
            value.detach().copy_(before)


class GatedGradients:
    """Puts gradients times Phi in the place of the gradients, and these back.

    Args:
        groups: The optimizer's parameter groups.
        phi: What they are multiplied by.
    """

    def __init__(self, groups: list[dict[str, Any]], phi: Scalar) -> None:
        self._groups, self._phi = groups, phi
        self._replaced: list[tuple[Tensor, Tensor]] = []

    def put(self) -> None:
        """Replace the gradients that there are."""
        if not isinstance(self._phi, Tensor) and self._phi == 1:
            return
        for group in self._groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._replaced.append((param, param.grad))
                    phi = self._phi
                    phi = phi.to(param.device) if isinstance(phi, Tensor) else phi
                    # A phi of double precision makes that of a 0-d gradient.
                    param.grad = (param.grad.detach() * phi).to(param.grad.dtype)

    def restore(self) -> None:
        """Put back what was replaced."""
        for param, grad in self._replaced:
            param.grad = grad
        self._replaced.clear()


class Replay:
    """A closure whose first evaluation has been made: calling it returns that, then evaluates.

    Args:
        closure: The closure.
        first: What it returned.
        gradients: How the gradients of a further evaluation are gated; None leaves them.
    """

    def __init__(
        self, closure: Callable[[], Any], first: Any, gradients: GatedGradients | None = None
    ) -> None:
        self._closure, self._first, self._gradients = closure, first, gradients
        self._is_new = True

    def __call__(self) -> Any:
        """Return the first evaluation, or make another one."""
        if self._is_new:
            self._is_new = False
            return self._first
        if self._gradients is None:
            return self._closure()
        self._gradients.restore()
        returned = self._closure()
        with torch.no_grad():
            self._gradients.put()
        return returned
