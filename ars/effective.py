"""The effective values of any optimizer's step: what the controller gates, and then puts back."""

import contextlib
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer

from ars.config import ARSConfig
from ars.reference import Signals
from ars.reference.scalars import Scalar

__all__ = [
    "GatedGradients", "Replay", "check_gateable", "check_groups", "evaluates_first",
    "gated_groups",
]  # fmt: skip


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
    check_groups(base, base.param_groups, config)
    if config.gate == ("betas",) and not any(map(_has_decays, base.param_groups)):
        raise ValueError(
            f"gate=('betas',) has nothing to act on: {name} has neither betas nor a momentum "
            "other than 0; use ARSConfig(gate=('lr',))"
        )


def check_groups(base: Any, groups: list[dict[str, Any]], config: ARSConfig) -> None:
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
def gated_groups(
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


class GatedGradients:
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
                    phi = self._phi
                    phi = phi.to(param.device) if isinstance(phi, Tensor) else phi
                    grad = param.grad
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


class Replay:
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
        self._gradients = GatedGradients(groups, 1.0)
        self._is_new = False

    def evaluate(self) -> Any:
        """Make the first evaluation, and return what the closure returns."""
        found = [param.grad for param in self._params] if self._careful else []
        found = [grad if grad is None else grad.clone() for grad in found]
        with torch.enable_grad():
            self._first = self._closure()
        self._found, self._is_new = found, True
        return self._first

    def begin(self, gradients: GatedGradients) -> None:
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
        returned = self._first if first and self._is_as_left() else self._closure()
        with torch.no_grad():
            self._gradients.put()
        return returned

    def _is_as_left(self) -> bool:
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


def evaluates_first(base: torch.optim.Optimizer) -> bool:
    """Whether a base is known to call its closure before it does anything else.

    torch's own optimizers and this package's do, without hooks.

    Args:
        base: The optimizer.
    """
    hooks = base._optimizer_step_pre_hooks or optimizer._global_optimizer_pre_hooks
    return type(base).__module__.startswith(("torch.optim.", "ars.")) and not hooks
