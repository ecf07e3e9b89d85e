r"""Progressive inheritance: elastic weight consolidation and a subspace penalty in one.

    Phi(W, dW) = 1/2 lambda sum_i Omega_i dW_i^2 + gamma || Q dW ||_F^2

With Q = I - P_S the second part is gamma Tr((I - P_S) dW dW^T (I - P_S)^T), the formula as it was
proposed; which side and which part of the subspace to penalise is the subspace penalty's choice.
"""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from ars.regularizers.checks import check_state
from ars.regularizers.ewc import EWC
from ars.regularizers.subspace import SubspacePenalty

__all__ = ["ProgressiveInheritance"]


class ProgressiveInheritance:
    r"""An :class:`EWC` and a :class:`SubspacePenalty` as one penalty of an optimizer.

    .. math:: \Phi = \tfrac12 \lambda \sum_i \Omega_i (\theta_i - \theta^*_i)^2
              + \gamma \sum_W \|Q\,(W - W^*)\|_F^2

    EWC holds every entry by itself, biases included; the subspace holds directions, which entries
    one by one cannot. :attr:`strength` and :attr:`mode` are those of the EWC; the subspace's gamma
    is ``subspace.strength``, and its gradient joins the task's in either mode.

    Args:
        ewc: The elementwise part.
        subspace: The other part; of the same model, which is not checked.

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

    def __init__(self, ewc: EWC, subspace: SubspacePenalty) -> None:
        for what, part, kind in (("ewc", ewc, EWC), ("subspace", subspace, SubspacePenalty)):
            if not isinstance(part, kind):
                raise TypeError(
                    f"{what} must be of class {kind.__name__}, got {type(part).__name__}"
                )
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
        """Parameters and buffers of the subspace penalty."""
        return self.subspace.gradients()

    def refresh(self) -> Tensor:
        """Fill the subspace's buffers; return its value alone, as the step adds that of the EWC."""
        return self.subspace.refresh()

    def parts(self) -> dict[str, Tensor]:
        """Value of each part, 0-d and differentiable: ``"ewc"`` and ``"subspace"``."""
        return {"ewc": self.ewc.value(), "subspace": self.subspace.value()}

    def value(self) -> Tensor:
        """Return the sum of the parts, 0-d and differentiable, on the EWC's first device."""
        ewc, subspace = self.parts().values()
        return ewc + subspace.to(ewc.device)

    def project_(self) -> None:
        """Remove the change that the subspace penalty penalises; see :class:`SubspacePenalty`."""
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
