r"""Elastic weight consolidation: a quadratic pull towards an anchor, weighted by the Fisher.

    E(theta) = 1/2 lambda sum_i Omega_i (theta_i - theta*_i)^2

The value is :func:`ars.reference.ewc_value`; its two steps are defined beside it.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ars.reference import ewc_value
from ars.regularizers.checks import (
    check_names,
    check_state,
    check_tensor,
    checked_choice,
    checked_module,
    checked_strength,
    copy_like,
)
from ars.regularizers.fisher import DiagonalFisher

__all__ = ["EWC"]

Mode: TypeAlias = Literal["coupled", "proximal"]
_MODES: tuple[Mode, ...] = get_args(Mode)


class EWC:
    r"""Elastic weight consolidation (EWC) penalty.

    .. math:: E(\theta) = \tfrac12 \lambda \sum_i \Omega_i (\theta_i - \theta^*_i)^2

    :math:`\theta^*` (:attr:`anchor`) is the model as it is now, :math:`\lambda` is
    :attr:`strength`. The factor 1/2 is the paper's; Avalanche and mammoth leave it out, so their
    lambda is ours / 2.

    An optimizer that takes a penalty reads :meth:`terms`, :attr:`strength` and :attr:`mode`:

    * ``"coupled"``: :math:`\lambda \Omega (\theta - \theta^*)` joins the gradient, after clipping;
    * ``"proximal"``: after the step on the task loss alone,
      :math:`\theta \leftarrow \theta^* + (\theta - \theta^*) / (1 + \lambda\Omega D)` with Adam's
      metric :math:`D = \eta / (\sqrt{\hat v} + \epsilon)`; stable for every strength.

    With any other optimizer add :meth:`value` to the loss.

    Anchor and importance are copies, in float32 (float64 for a float64 parameter), with the
    parameter's strides and device: 8 bytes a parameter in float32. Move the model before building
    the penalty. Parameters that ``fisher`` does not name are left alone.

    Args:
        model: Its current parameters become the anchor.
        fisher: A fitted :class:`~ars.regularizers.DiagonalFisher`, or a mapping from parameter
            name to importance: the parameter's shape, finite, >= 0.
        strength: lambda, finite, >= 0; a number or a 0-d tensor. A plain attribute, which may be
            changed at any time.
        mode: ``"coupled"`` or ``"proximal"``.

    Raises:
        TypeError: ``model`` is not a module, ``fisher`` neither of the two, an importance not a
            floating-point tensor, or ``strength`` not a number.
        ValueError: ``fisher`` is not fitted, is empty, names a parameter that the model does not
            have, or holds a wrong shape or a value that is negative or not finite; ``strength`` is
            negative or not finite; ``mode`` is unknown.

    Example:
        >>> import torch
        >>> from ars.regularizers import EWC
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> penalty = EWC(model, {"weight": torch.tensor([[2.0, 0.0]])}, strength=10.0)
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(1.0)
        >>> round(penalty.value().item(), 4)  # 1/2 * 10 * (2 * 1^2 + 0 * 1^2)
        10.0

    References:
        Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks",
        arXiv:1612.00796.
    """

    def __init__(
        self,
        model: nn.Module,
        fisher: DiagonalFisher | Mapping[str, Tensor],
        strength: float | Tensor = 1.0,
        mode: Mode = "coupled",
    ) -> None:
        parameters = dict(checked_module(model).named_parameters())
        importance = _importance_of(fisher)
        check_names(importance, model, "fisher")
        self._parameters = {name: p for name, p in parameters.items() if name in importance}
        for name, p in self._parameters.items():
            check_tensor(f"the importance of {name!r}", importance[name], p, minimum=0.0)
        self.strength = strength
        self.mode: Mode = checked_choice("mode", mode, _MODES)
        self.anchor = {name: copy_like(p, p) for name, p in self._parameters.items()}
        self.importance = {
            name: copy_like(p, importance[name]) for name, p in self._parameters.items()
        }

    @property
    def strength(self) -> Any:
        """Lambda, finite and >= 0; a 0-d tensor is read at every step, where it is."""
        return self._strength

    @strength.setter
    def strength(self, value: float | Tensor) -> None:
        self._strength = checked_strength(value)

    def terms(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Parameter, anchor and importance of every penalised tensor, in the model's order."""
        return [
            (p, self.anchor[name], self.importance[name]) for name, p in self._parameters.items()
        ]

    def value(self) -> Tensor:
        """Return the penalty E, 0-d and differentiable, on the first parameter's device."""
        values = [ewc_value(p, anchor, omega, self.strength) for p, anchor, omega in self.terms()]
        return torch.stack([v.to(values[0].device) for v in values]).sum()

    def state_dict(self) -> dict[str, Any]:
        """Strength, mode, and references to the anchor and importance tensors by parameter name."""
        return {
            "strength": float(self.strength),
            "mode": self.mode,
            "anchor": dict(self.anchor),
            "importance": dict(self.importance),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy a state into this penalty's own tensors, whose addresses do not change.

        Args:
            state: What :meth:`state_dict` returned, on any device.

        Raises:
            TypeError: An entry has the wrong type. Nothing has changed then.
            ValueError: The state is of another model or holds an invalid value. Nothing has changed
                then; the message names the first difference.
        """
        parts = {"anchor", "importance"}
        check_state("an EWC", state, {"strength", "mode"} | parts, parts, self._parameters)
        strength = checked_strength(state["strength"])
        mode = checked_choice("mode", state["mode"], _MODES)
        for part, minimum in (("anchor", -math.inf), ("importance", 0.0)):
            for name, p in self._parameters.items():
                check_tensor(f"the state's {part} of {name!r}", state[part][name], p, minimum)
        self.strength, self.mode = strength, mode
        for name in self._parameters:
            self.anchor[name].copy_(state["anchor"][name])
            self.importance[name].copy_(state["importance"][name])


def _importance_of(fisher: DiagonalFisher | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if isinstance(fisher, DiagonalFisher):
        if fisher.n_samples == 0:
            raise ValueError("the DiagonalFisher is not fitted; call fit(batches) first")
        return fisher.importance
    if not isinstance(fisher, Mapping):
        raise TypeError(
            "fisher must be a DiagonalFisher or a mapping from parameter name to tensor, "
            f"got {type(fisher).__name__}"
        )
    if not fisher:
        raise ValueError("fisher is empty: there is nothing to penalise")
    return fisher
