r"""Task loss and penalties in one loss, its parts kept, and warnings where they say something.

L = L_task + sum_k R_k + 1/2 l2 sum_i theta_i^2
"""

import warnings
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ars.penalty import check_strength, what_to_pass
from ars.regularizers.checks import checked_module, trainable
from ars.regularizers.penalties.distillation import Distillation
from ars.regularizers.penalties.ewc import EWC
from ars.regularizers.penalties.kronecker_penalty import KroneckerPenalty
from ars.regularizers.penalties.penalty_base import check_state
from ars.regularizers.penalties.subspace import SubspacePenalty

__all__ = ["CombinedLoss", "PenaltyMonitor", "ProgressiveInheritance"]

# Observations in a row with a penalty of exactly 0 before it is called identically 0: at the anchor
# it is 0 rightly, and with a learning rate that warms up from 0 the second one is as well.
_PATIENCE = 3


class Valued(Protocol):
    """What a penalty must have to be added to a loss."""

    def value(self) -> Tensor:
        """Return the penalty, 0-d and differentiable."""
        ...


class ProgressiveInheritance:
    r"""An :class:`EWC` and a penalty of matrices as one penalty of an optimizer.

    .. math:: \Phi = \tfrac12 \lambda \sum_i \Omega_i (\theta_i - \theta^*_i)^2
              + \gamma \sum_W \|Q\,(W - W^*)\|_F^2

    EWC holds every entry by itself, biases included; a :class:`SubspacePenalty` holds directions,
    which entries one by one cannot. With a :class:`KroneckerPenalty`, its own value takes the place
    of the second sum: give the EWC what its factors leave out, such as norms and embeddings.
    :attr:`strength` and :attr:`mode` are those of the EWC; the other's strength is
    ``subspace.strength``, and its gradient joins the task's in either mode.

    Args:
        ewc: The elementwise part.
        subspace: The other part, a :class:`SubspacePenalty` or a :class:`KroneckerPenalty`; of the
            same model, which is not checked.

    Raises:
        TypeError: One of them is something else.

    Example:
        >>> import torch
        >>> from ars.regularizers import EWC, ProgressiveInheritance, SubspacePenalty
        >>> model = torch.nn.Linear(2, 1)
        >>> ewc = EWC(model, {"bias": torch.ones(1)}, strength=2.0)
        >>> first_input = torch.tensor([[1.0], [0.0]])
        >>> subspace = SubspacePenalty(model, {"weight": first_input}, strength=3.0)
        >>> penalty = ProgressiveInheritance(ewc, subspace)
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(1.0), model.bias.add_(1.0)
        >>> round(penalty.value().item(), 4)  # 1/2 * 2 * 1^2 + 3 * 1^2
        4.0
    """

    def __init__(self, ewc: EWC, subspace: SubspacePenalty | KroneckerPenalty) -> None:
        of_matrices = (SubspacePenalty, KroneckerPenalty)
        for what, part, kinds in (("ewc", ewc, (EWC,)), ("subspace", subspace, of_matrices)):
            if not isinstance(part, kinds):
                names = " or ".join(kind.__name__ for kind in kinds)
                raise TypeError(f"{what} must be of class {names}, got {type(part).__name__}")
        self.ewc = ewc
        self.subspace = subspace

    @property
    def strength(self) -> float | Tensor:
        """Lambda of the EWC."""
        return self.ewc.strength

    @strength.setter
    def strength(self, value: float | Tensor) -> None:
        self.ewc.strength = value

    @property
    def version(self) -> tuple[int, int]:
        """Another one whenever a part has got or lost a tensor."""
        return self.ewc.version, self.subspace.version

    @property
    def mode(self) -> Literal["coupled", "proximal"]:
        """How the EWC enters the step."""
        return self.ewc.mode

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Name and parameter of every penalised tensor of both parts."""
        return [*self.ewc.named_parameters(), *self.subspace.named_parameters()]

    def terms(self) -> list[tuple[Tensor, ...]]:
        """The terms of the EWC."""
        return self.ewc.terms()

    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Parameters and buffers of the other part."""
        return self.subspace.gradients()

    def refresh(self) -> Tensor:
        """Fill the other part's buffers; return its value alone: the step adds that of the EWC."""
        return self.subspace.refresh()

    def parts(self) -> dict[str, Tensor]:
        """Value of each part, 0-d and differentiable: ``"ewc"`` and the other's.

        That is ``"subspace"``, or ``"KroneckerPenalty"``.
        """
        other = self.subspace
        name = "subspace" if isinstance(other, SubspacePenalty) else type(other).__name__
        return {"ewc": self.ewc.value(), name: other.value()}

    def value(self) -> Tensor:
        """Return the sum of the parts, 0-d and differentiable, on the EWC's first device."""
        ewc, other = self.parts().values()
        return ewc + other.to(ewc.device)

    def project_(self) -> None:
        """Remove the change that the subspace penalty penalises; see :class:`SubspacePenalty`.

        Raises:
            TypeError: The other part is a :class:`KroneckerPenalty`, which has no subspace.
        """
        if not isinstance(self.subspace, SubspacePenalty):
            raise TypeError("a KroneckerPenalty has no subspace to project on")
        self.subspace.project_()

    def state_dict(self) -> dict[str, Any]:
        """The states of both, under ``"ewc"`` and ``"subspace"``."""
        return {"ewc": self.ewc.state_dict(), "subspace": self.subspace.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load both, or neither.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            TypeError: An entry has the wrong type. Nothing has changed then.
            ValueError: A part does not fit. Nothing has changed then.
        """
        check_state("a ProgressiveInheritance", state, {"ewc", "subspace"}, set(), {})
        self.subspace.check_state_dict(state["subspace"])
        self.ewc.load_state_dict(state["ewc"])
        self.subspace.load_state_dict(state["subspace"])


class PenaltyMonitor:
    """Warns, once each, when the parts of a loss are out of proportion.

    For a penalty within an optimizer give it the loss and the ``penalty`` of its diagnostics now
    and then; :class:`CombinedLoss` has one of its own. Reading a tensor waits for the device.

    Example:
        >>> import warnings
        >>> from ars.regularizers import PenaltyMonitor
        >>> monitor = PenaltyMonitor()
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     for _ in range(3):
        ...         monitor.observe(task=1.0, penalty=5.0)
        >>> len(caught)
        1
    """

    def __init__(self) -> None:
        self._given: set[str] = set()
        self._zeros = 0

    def observe(
        self, task: float | Tensor, penalty: float | Tensor, subspace: float | Tensor = 0.0
    ) -> None:
        """Compare the parts, and warn of what has not been warned of yet.

        Args:
            task: The task's loss; the proportions are looked at where it is > 0.
            penalty: All penalties together.
            subspace: The part of them that is a subspace penalty's.
        """
        parts = [torch.as_tensor(part).detach() for part in (task, penalty, subspace)]
        device = next((part.device for part in parts if part.device.type != "cpu"), "cpu")
        task, penalty, subspace = torch.stack([p.to(device, torch.float64) for p in parts]).tolist()
        if penalty > task > 0:
            self._warn(
                "exceeds",
                f"the penalty, {penalty:.3g}, exceeds the task loss, {task:.3g}: the model will "
                "hardly learn the new task. Lower its strength, or let AdaptiveStrength(ratio=...) "
                "choose it",
            )
        if subspace > task / 2 > 0:
            self._warn(
                "subspace",
                f"the subspace penalty, {subspace:.3g}, exceeds half of the task loss, {task:.3g}. "
                "Lower its strength, or protect less: a lower energy or rank",
            )
        self._zeros = self._zeros + 1 if penalty == 0 else 0
        if self._zeros >= _PATIENCE:
            self._warn(
                "zero",
                f"the penalty was exactly 0 {_PATIENCE} times: it protects nothing. Is its "
                "strength 0, its importance 0, or was it built for another copy of the model than "
                "the one that is trained?",
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what has been warned of and how often in a row the penalty was 0."""
        return {"given": sorted(self._given), "zeros": self._zeros}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Args:
            state_dict: What was returned.

        Raises:
            KeyError: Something is missing.
            TypeError: It is of another type.
        """
        given, zeros = state_dict["given"], state_dict["zeros"]
        if not isinstance(given, list) or not isinstance(zeros, int):
            raise TypeError(f"given is {given!r} and zeros {zeros!r}, not a list and a number")
        self._given, self._zeros = set(given), zeros

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._given:
            self._given.add(kind)
            warnings.warn(message, stacklevel=4)


class CombinedLoss:
    r"""Task loss, penalties and L2 in one differentiable loss, for an optimizer of one's own.

    .. math:: L = L_{\text{task}} + \sum_k R_k + \tfrac12 \ell_2 \sum_i \theta_i^2

    With :class:`ars.ARSAdamW` give the penalty to the optimizer instead: there it costs no pass of
    its own and is not clipped with the gradient.

    :attr:`parts` holds the last call's parts as detached 0-d tensors: ``"task"``, ``"ewc"``,
    ``"subspace"``, ``"l2"`` and ``"total"``, and any other penalty under the name of its class. A
    :class:`PenaltyMonitor` looks at them at the first call and then every ``check_every`` calls,
    which is the only time that anything waits for the device.

    Args:
        *penalties: Objects with a differentiable ``value()``.
        l2: Factor of the sum of squares, >= 0.
        model: Whose trainable parameters are squared, for ``l2``.
        check_every: Calls between two looks, >= 1.

    Raises:
        TypeError: A penalty has no ``value``, or one that needs the step's data.
        ValueError: Nothing to add, ``l2`` negative or without a model, or ``check_every`` < 1.

    Example:
        >>> import torch
        >>> from ars.regularizers import EWC, CombinedLoss
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> loss_of = CombinedLoss(EWC(model, {"weight": torch.ones(1, 2)}), l2=0.5, model=model)
        >>> loss = loss_of(model(torch.ones(1, 2)).sum())
        >>> {name: part.item() for name, part in loss_of.parts.items()}
        {'task': 2.0, 'ewc': 0.0, 'l2': 0.5, 'total': 2.5}
    """

    def __init__(
        self,
        *penalties: Valued,
        l2: float = 0.0,
        model: nn.Module | None = None,
        check_every: int = 100,
    ) -> None:
        for penalty in penalties:
            if isinstance(penalty, Distillation):
                raise TypeError(
                    "a Distillation needs the inputs and logits of the step; add its "
                    "value(inputs, logits) to the task's loss"
                )
            if isinstance(penalty, type) or not callable(getattr(penalty, "value", None)):
                several = isinstance(penalty, (list, tuple, set))
                remedy = "pass them one by one, by a *" if several else what_to_pass(penalty)
                raise TypeError(f"penalty {type(penalty).__name__} has no method value(): {remedy}")
        check_strength("l2", l2)
        if l2 and model is None:
            raise ValueError(f"l2={l2} needs to know the parameters; pass model")
        if not penalties and not l2:
            raise ValueError("there is nothing to add to the task's loss; give a penalty or l2")
        if not isinstance(check_every, int) or check_every < 1:
            raise ValueError(f"check_every must be an integer >= 1, got {check_every!r}")
        self.penalties, self.l2, self.check_every = penalties, l2, check_every
        self.parts: dict[str, Tensor] = {}
        self._parameters = [] if model is None else list(trainable(checked_module(model)).values())
        self._monitor = PenaltyMonitor()
        self._calls = 0

    def __call__(self, task: Tensor) -> Tensor:
        """Return the whole loss, 0-d and differentiable.

        Args:
            task: The task's loss, 0-d.

        Returns:
            The loss, on the device of ``task``.

        Raises:
            ValueError: ``task`` is not 0-d.
        """
        if not isinstance(task, Tensor) or task.ndim:
            if not isinstance(task, Tensor):
                raise ValueError(
                    f"task must be a 0-d tensor, got {type(task).__name__}; pass the loss itself, "
                    "not its .item()"
                )
            raise ValueError(
                f"task must be a 0-d tensor, got {tuple(task.shape)}; reduce it by .mean()"
            )
        parts: dict[str, Tensor] = {}
        for penalty in self.penalties:
            for name, value in _values(penalty).items():
                parts[name] = parts[name] + value if name in parts else value.to(task.device)
        penalties = sum(parts.values(), torch.zeros_like(task, requires_grad=False))
        if self.l2:
            squares = [p.square().sum().to(task.device) for p in self._parameters]
            parts["l2"] = 0.5 * self.l2 * torch.stack(squares).sum()
        total = sum(parts.values(), task)
        parts = {"task": task, **parts, "total": total}
        self.parts = {name: part.detach() for name, part in parts.items()}
        if self.penalties and self._calls % self.check_every == 0:
            self._monitor.observe(task, penalties, parts.get("subspace", 0.0))
        self._calls += 1
        return total


def _values(penalty: Valued) -> Mapping[str, Tensor]:
    if isinstance(penalty, ProgressiveInheritance):
        return penalty.parts()
    names = {EWC: "ewc", SubspacePenalty: "subspace"}
    return {names.get(type(penalty), type(penalty).__name__): penalty.value()}
