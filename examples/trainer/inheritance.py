"""What an arm keeps of the parent: penalties in the optimizer's step, or on the predictions."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ars.models import GPT, Growth
from ars.regularizers import EWC, Distillation, ProgressiveInheritance, SubspacePenalty
from trainer.arms import Arm
from trainer.settings import SeriesConfig

__all__ = ["Inheritance", "inherit_penalties", "restore_penalties"]

Penalty = EWC | SubspacePenalty | ProgressiveInheritance


class Inheritance:
    """The penalties of a grown model.

    Args:
        penalty: in the optimizer's step, or ``None``.
        distillation: on the predictions, or ``None``.
    """

    def __init__(
        self, penalty: Penalty | None = None, distillation: Distillation | None = None
    ) -> None:
        self.penalty, self.distillation = penalty, distillation

    def subspace_value(self) -> Tensor | float:
        """Value of the subspace part, 0-d; 0 without one."""
        if isinstance(self.penalty, ProgressiveInheritance):
            return self.penalty.parts()["subspace"].detach()
        if isinstance(self.penalty, SubspacePenalty):
            return self.penalty.value().detach()
        return 0.0

    def to_dict(self) -> dict[str, Any]:
        """All of it as tensors, numbers and strings (the tensors are not copied)."""
        return {
            "penalty": None if self.penalty is None else self.penalty.state_dict(),
            "teacher": None
            if self.distillation is None
            else self.distillation.teacher.state_dict(),
        }


def _subspace(model: GPT, old_columns: Mapping[str, int], strength: float) -> SubspacePenalty:
    # The proposal's (I - P) dW, with P the coordinates that the parent had: what restrains the new
    # capacity. Inside any subspace of the old weights it would say what the EWC says.
    return SubspacePenalty.from_coordinates(
        model, old_columns, strength, side="input", protect="outside"
    )


def _combined(ewc: EWC | None, subspace: SubspacePenalty | None) -> Penalty | None:
    if ewc is not None and subspace is not None:
        return ProgressiveInheritance(ewc, subspace)
    return ewc if subspace is None else subspace


def _distillation(teacher: GPT, arm: Arm, config: SeriesConfig) -> Distillation:
    teacher.requires_grad_(requires_grad=False)
    strength = arm.strength("distill", config.distill_strength)
    return Distillation(teacher, strength, config.distill_temperature)


def inherit_penalties(
    growth: Growth, arm: Arm, config: SeriesConfig, importance: Mapping[str, Tensor]
) -> Inheritance:
    """The penalties of an arm towards what has just been grown.

    Args:
        growth: of the model; its parent becomes the teacher of a distillation.
        arm: how the model is trained.
        config: the strengths.
        importance: of the parent's parameters; empty for none.
    """
    ewc = subspace = None
    if importance:
        strength = arm.strength("ewc", config.ewc_strength)
        ewc = EWC(growth.model, growth.importance(importance), strength=strength)
    if arm.has("subspace"):
        old = {n: w.shape[1] for n, w in growth.parent.named_parameters()}
        new = {n: w.shape[1] for n, w in growth.model.named_parameters()}
        columns = {name: k for name, k in old.items() if k < new[name]}
        gamma = arm.strength("subspace", config.subspace_strength)
        subspace = _subspace(growth.model, columns, gamma)
    teacher = _distillation(growth.parent, arm, config) if arm.has("distill") else None
    return Inheritance(_combined(ewc, subspace), teacher)


def restore_penalties(
    model: GPT, teacher: GPT | None, arm: Arm, config: SeriesConfig, content: Mapping[str, Any]
) -> Inheritance:
    """Build the penalties that `Inheritance.to_dict` described.

    Args:
        model: that they restrain.
        teacher: a model of the parent's size, for a distillation.
        arm: how the model is trained.
        config: the strengths.
        content: what `Inheritance.to_dict` returned.
    """
    distillation = None
    if content["teacher"] is not None and teacher is not None:
        teacher.load_state_dict(content["teacher"])
        distillation = _distillation(teacher, arm, config)
    state = content["penalty"]
    if state is None:
        return Inheritance(None, distillation)
    both = arm.has("subspace") and "ewc" in state
    ewc = subspace = None
    if both or not arm.has("subspace"):
        importance = (state["ewc"] if both else state)["importance"]
        ewc = EWC(model, importance, strength=arm.strength("ewc", config.ewc_strength))
    if arm.has("subspace"):
        bases = (state["subspace"] if both else state)["bases"]
        columns = {name: len(basis) for name, basis in bases.items()}
        gamma = arm.strength("subspace", config.subspace_strength)
        subspace = _subspace(model, columns, gamma)
    penalty = _combined(ewc, subspace)
    assert penalty is not None
    penalty.load_state_dict(state)
    return Inheritance(penalty, distillation)
