r"""Distillation from the predecessor: keep what the old model says, not how its weights are.

    R = lambda T^2 mean_n KL( softmax(z*_n / T) || softmax(z_n / T) )

z* are the predecessor's logits, z the model's. Gradients of the divergence shrink as 1/T^2; the
factor T^2 makes the strength mean the same at every temperature.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ars.regularizers.checks import IGNORE_INDEX, checked_module, evaluation_mode
from ars.regularizers.penalties.penalty_base import PenaltyBase

__all__ = ["Distillation", "distillation_loss"]


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0, *, mask: Tensor | None = None
) -> Tensor:
    r"""Divergence of softened predictions, :math:`T^2\, \mathrm{KL}(p^*_T \,\|\, p_T)`.

    Args:
        logits: z, shape (..., C); computed in float32 at least.
        teacher_logits: z*, of the same shape; no gradient goes there.
        temperature: T, from 0.001 to 10000.
        mask: bool, shape (...): which positions count; by default all. Without any the result is 0.

    Returns:
        The mean over the positions that count, 0-d, >= 0, differentiable in ``logits``.

    Raises:
        TypeError: ``mask`` is not bool.
        ValueError: Shapes that differ, no logits, or ``temperature`` out of range.

    Example:
        >>> import torch
        >>> from ars.regularizers import distillation_loss
        >>> z = torch.tensor([[0.0, 0.0]])
        >>> distillation_loss(z, z).item()
        0.0
        >>> round(distillation_loss(z, torch.tensor([[2.0, 0.0]]), 1.0).item(), 4)
        0.3278

    References:
        Hinton et al., "Distilling the knowledge in a neural network", arXiv:1503.02531.
        Li and Hoiem, "Learning without forgetting", arXiv:1606.09282.
    """
    if logits.shape != teacher_logits.shape or logits.ndim < 1:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}, the teacher's "
            f"{tuple(teacher_logits.shape)}; cut new classes or tokens off the model's"
        )
    if not logits.numel():
        raise ValueError(f"logits of shape {tuple(logits.shape)} are empty: nothing to average")
    _check_temperature(temperature)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}; compare, as in targets != -100")
        if mask.shape != logits.shape[:-1]:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, the positions {tuple(logits.shape[:-1])}"
            )
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_p = functional.log_softmax(logits.to(wide) / temperature, -1)
    log_q = functional.log_softmax(teacher_logits.detach().to(wide) / temperature, -1)
    divergence = functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    if mask is None:
        return temperature**2 * divergence.mean()
    # Not a selection by the mask: the host would wait for its size.
    kept = torch.where(mask, divergence, 0.0)
    return temperature**2 * kept.sum() / mask.sum().clamp(min=1)


class Distillation(PenaltyBase):
    r"""Penalty on predictions that differ from a predecessor's.

    .. math:: R = \lambda T^2 \operatorname{mean}_n
              \mathrm{KL}\big(\mathrm{softmax}(z^*_n / T) \,\|\, \mathrm{softmax}(z_n / T)\big)

    It needs the inputs and the logits of a step, so it is added to the loss of one's own forward
    pass; an optimizer cannot apply it. Each call runs the predecessor, without gradients and in
    evaluation mode.

    Args:
        teacher: The predecessor, not the model that is trained: a ``copy.deepcopy`` of it from
            before. Maps inputs to logits.
        strength: lambda, in [0, 1e38]; a number or a 0-d tensor.
        temperature: T, from 0.001 to 10000.

    Raises:
        TypeError: ``teacher`` is not a module, or ``strength`` not a number.
        ValueError: ``strength`` or ``temperature`` out of range.

    Example:
        >>> import copy, torch
        >>> from ars.regularizers import Distillation
        >>> model = torch.nn.Linear(3, 2)
        >>> distillation = Distillation(copy.deepcopy(model), strength=0.5)
        >>> inputs = torch.randn(4, 3)
        >>> distillation.value(inputs, model(inputs)).item()
        0.0
    """

    def __init__(
        self, teacher: nn.Module, strength: float | Tensor = 1.0, temperature: float = 2.0
    ) -> None:
        self.teacher = checked_module(teacher, "teacher")
        self.strength = strength
        self.temperature = _check_temperature(temperature)

    def value(self, inputs: Tensor, logits: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the penalty R on a batch, 0-d, differentiable in ``logits``.

        Args:
            inputs: What the model was given.
            logits: What it returned, (..., C') with C' >= C classes of the predecessor; new ones,
                which come last, are left out.
            targets: int64, (...): positions with -100 do not count.

        Returns:
            The penalty.

        Raises:
            ValueError: The predecessor has more classes than ``logits``, or other positions; or
                ``targets`` are not of the positions.
        """
        with evaluation_mode(self.teacher), torch.no_grad():
            expected = self.teacher(inputs)
        mask = None if targets is None else targets != IGNORE_INDEX
        known = logits[..., : expected.shape[-1]]
        return self.strength * distillation_loss(known, expected, self.temperature, mask=mask)


def _check_temperature(temperature: float) -> float:
    # Far below them logits / T overflow and T^2 vanishes; beyond them float32 rounds most of
    # the value away (6 % at 10000).
    if not 0.001 <= temperature <= 10000:
        raise ValueError(f"temperature must be from 0.001 to 10000, got {temperature!r}")
    return temperature
