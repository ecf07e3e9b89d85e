"""What one optimizer step works on, as every implementation receives it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ars.controller import ARSController
from ars.penalty import Scalar, Term, check_strength
from ars.reference import Signals

__all__ = ["DIAGNOSTICS", "Batch", "Hyper", "Options", "is_decoupled", "rows"]

# The order of the entries of an optimizer's diagnostics buffer, shape (10,), float64.
DIAGNOSTICS = (
    "surprise", "rho", "psi", "phi", "chi", "lr", "beta1", "beta2", "grad_norm", "penalty",
)  # fmt: skip


@dataclasses.dataclass
class Batch:
    """The tensors of one step: entry i of every list belongs to parameter i.

    Args:
        params: Parameters that have a gradient, or a penalty that takes its place; complex ones as
            their real view.
        grads: Their gradients, or zeros.
        exp_avgs: First moments, float32, or float64 for float64 parameters, or bfloat16 for
            bfloat16 ones that are rounded stochastically.
        exp_avg_sqs: Second moments, likewise.
        max_exp_avg_sqs: Running maxima of the second moments, None where amsgrad is off.
        steps: Steps taken, one element, float32 unless the user made them.
        products: Products of the betas of all steps, (2,) float64; empty unless a gate makes the
            betas vary.
        products_steps: How many steps these are of, 0-d; likewise.
        groups: Index of the parameter's row in the list of :class:`Hyper`, see :func:`rows`.
        anchors: Where the penalty pulls, None where it does not.
        importances: How hard, None where it does not; float or uint8.
        scales: Of uint8 importances, float32, one for 64 elements; otherwise None.
        pulls: Gradients of the penalty that join the task's, float32 or float64, or None.
        remainders: What makes bfloat16 parameters float32 master weights, int16, or None.
        numbers: Index of the parameter in its optimizer.
        layout: Another object whenever the gradients are laid out in another way.
        unused: Whether some have no gradient, and zeros in its place.
        held: Parameters without a gradient that only the proximal step moves: a batch without
            gradients, or None.
    """

    params: list[Tensor] = dataclasses.field(default_factory=list)
    grads: list[Tensor] = dataclasses.field(default_factory=list)
    exp_avgs: list[Tensor] = dataclasses.field(default_factory=list)
    exp_avg_sqs: list[Tensor] = dataclasses.field(default_factory=list)
    max_exp_avg_sqs: list[Tensor | None] = dataclasses.field(default_factory=list)
    steps: list[Tensor] = dataclasses.field(default_factory=list)
    products: list[Tensor] = dataclasses.field(default_factory=list)
    products_steps: list[Tensor] = dataclasses.field(default_factory=list)
    groups: list[int] = dataclasses.field(default_factory=list)
    anchors: list[Tensor | None] = dataclasses.field(default_factory=list)
    importances: list[Tensor | None] = dataclasses.field(default_factory=list)
    scales: list[Tensor | None] = dataclasses.field(default_factory=list)
    pulls: list[Tensor | None] = dataclasses.field(default_factory=list)
    remainders: list[Tensor | None] = dataclasses.field(default_factory=list)
    numbers: list[int] = dataclasses.field(default_factory=list)
    layout: object = None
    unused: bool = False
    held: "Batch | None" = None

    def append(
        self,
        param: Tensor,
        group: int,
        number: int,
        state: dict[str, Any],
        *,
        amsgrad: bool,
        products: bool,
        master: bool,
        term: Term,
    ) -> None:
        """Add a parameter, but not its gradient; complex tensors enter as their real view.

        Args:
            param: The parameter.
            group: Index of its group.
            number: Its own index in the optimizer.
            state: Its optimizer state, complete.
            amsgrad: Whether the running maximum of the second moment is used.
            products: Whether a gate makes the betas vary.
            master: Whether bfloat16 parameters are master weights with their remainder.
            term: Its penalty.
        """
        view: Callable[[Any], Any] = torch.view_as_real if param.is_complex() else lambda t: t
        self.params.append(view(param))
        self.exp_avgs.append(view(state["exp_avg"]))
        self.exp_avg_sqs.append(view(state["exp_avg_sq"]))
        self.max_exp_avg_sqs.append(view(state["max_exp_avg_sq"]) if amsgrad else None)
        self.steps.append(state["step"])
        if products:
            self.products.append(state["beta_products"])
            self.products_steps.append(state["beta_products_step"])
        self.groups.append(group)
        self.anchors.append(term.anchor)
        self.importances.append(term.importance)
        self.scales.append(term.scale)
        self.pulls.append(term.pull)
        self.remainders.append(state.get("param_remainder") if master else None)
        self.numbers.append(number)


def rows(hypers: "list[Hyper]", *, unused: bool) -> "list[Hyper]":
    """Return the rows that a batch refers to: the groups', and those of what has no gradient.

    Args:
        hypers: Each group's hyperparameters.
        unused: Whether there are parameters without a gradient; they do not decay.
    """
    return [*hypers, *(h._replace(weight_decay=0.0) for h in hypers)] if unused else hypers


class Hyper(NamedTuple):
    """Hyperparameters of one group; lr and betas may be 0-d tensors on the device."""

    lr: Scalar
    beta1: Scalar
    beta2: Scalar
    eps: float
    weight_decay: float
    maximize: bool
    strength: Scalar  # of the penalty
    factor: Scalar = 1.0  # of the task's gradient, after clipping
    beta_factor: Scalar = 1.0  # of the betas, besides the gate of this step; for the kernels alone


class Options(NamedTuple):
    """What holds for all groups of one step."""

    decoupled: bool  # AdamW's weight decay rather than Adam's
    controller: ARSController | None
    surprise: Tensor | None  # None: the gradient norm
    max_norm: float | None
    proximal: bool
    penalty: Tensor | None  # 0-d, value of the part of the penalty that the pulls are of
    diagnostics: Tensor  # (10,) float64, written by the step; see DIAGNOSTICS
    grad_scale: Tensor | None = None  # 1 element, what the gradients are to be divided by
    found_inf: Tensor | None = None  # 1 element; unless 0, nothing moves
    stochastic: bool = False  # rounding of bfloat16 parameters and their moments
    seed: int = 0  # of that rounding

    @property
    def needs_norm(self) -> bool:
        """Whether the step needs the gradient norm: as its surprise, or to clip."""
        return self.max_norm is not None or (self.controller is not None and self.surprise is None)


def is_decoupled(groups: list[dict[str, Any]]) -> bool:
    """Return whether the weight decay is AdamW's rather than Adam's: one for all groups.

    Raises:
        ValueError: The groups differ.
    """
    kinds = {bool(group["decoupled_weight_decay"]) for group in groups}
    if len(kinds) > 1:
        raise ValueError(
            "some parameter groups have decoupled_weight_decay=True and some False: one step does "
            "one of them, so use an optimizer for each"
        )
    return kinds.pop()


def read_hyper(group: dict[str, Any], strength: Scalar) -> Hyper:
    """Read a parameter group's hyperparameters, which schedulers change between steps.

    Args:
        group: The group.
        strength: The penalty's, if the group has none of its own.

    Raises:
        TypeError: The group's strength is not a number.
        ValueError: The group's strength is out of its range.
    """
    beta1, beta2 = group["betas"]
    own = group["penalty_strength"]
    if own is not None:
        check_strength("penalty_strength", own)
    return Hyper(
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        maximize=group["maximize"],
        strength=strength if own is None else own,
    )


def gated(hyper: Hyper, signals: Signals, gate: tuple[str, ...]) -> Hyper:
    """Apply the controller's signals: ``lr (1 + chi)``, and Phi to what ``gate`` names.

    A tensor among them is brought to Phi's device, if Phi is one.
    """
    phi, factor = signals.phi, 1 + signals.chi
    lr = _beside(hyper.lr, phi)
    hyper = hyper._replace(lr=lr * (factor * phi if "lr" in gate else factor))
    if "betas" in gate:
        beta1, beta2 = _beside(hyper.beta1, phi), _beside(hyper.beta2, phi)
        hyper = hyper._replace(beta1=beta1 * phi, beta2=beta2 * phi)
    return hyper._replace(factor=phi) if "grad" in gate else hyper


def _beside(value: Scalar, phi: Scalar) -> Scalar:
    if isinstance(value, Tensor) and isinstance(phi, Tensor):
        return value.to(phi.device).reshape(())
    return value


def write_diagnostics(buffer: Tensor, values: dict[str, Scalar]) -> None:
    """Write all ten diagnostics to ``buffer``, without waiting for a device."""
    row = [values[name] for name in DIAGNOSTICS]
    if buffer.device.type == "cpu":
        numbers = [x.detach().item() if isinstance(x, Tensor) else x for x in row]
        buffer.copy_(torch.tensor(numbers, dtype=buffer.dtype, device="cpu"))
        return
    tensors = [torch.as_tensor(x, dtype=buffer.dtype, device=buffer.device) for x in row]
    buffer.copy_(torch.stack([x.detach().reshape(()) for x in tensors]))
