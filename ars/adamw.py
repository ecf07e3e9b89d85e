"""AdamW with the controller, the clipping and the penalty inside the step."""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ars.adam import ARSAdam
from ars.config import CONDITIONED, ARSConfig
from ars.penalty import Penalty
from ars.surprise import Group

__all__ = ["ARSAdamW"]


class ARSAdamW(ARSAdam):
    r"""AdamW with an on-device stability controller and an inheritance penalty in the same pass.

    .. math::
        \Phi, \chi &= \text{controller}(S), \quad
        \eta^{\text{eff}} = \eta (1 + \chi) \Phi, \quad \beta_i^{\text{eff}} = \beta_i \\
        g &\leftarrow \text{clip}(g) + \lambda \Omega (\theta - \theta^*) \\
        m &\leftarrow \beta_1^{\text{eff}} m + (1 - \beta_1^{\text{eff}}) g, \quad
        v \leftarrow \beta_2^{\text{eff}} v + (1 - \beta_2^{\text{eff}}) g^2, \quad
        B_i \leftarrow B_i \beta_i^{\text{eff}} \\
        \theta &\leftarrow (1 - \eta^{\text{eff}} w) \theta
            - \eta^{\text{eff}} \frac{m / (1 - B_1)}{\sqrt{v / (1 - B_2)} + \epsilon}

    Phi multiplies what ``ars.gate`` names; by default the learning rate, as here. In
    :meth:`ars.ARSConfig.paper` it is the betas, :math:`\beta_i^{\text{eff}} = \beta_i \Phi`.

    With ``ars=None, penalty=None, max_grad_norm=None`` it is :class:`torch.optim.AdamW`. Moments
    are float32 (float64 for float64 parameters), also under half-precision parameters.

    Args:
        params: Parameters, named parameters or parameter groups, which may also have their own
            ``penalty_strength`` (None: the penalty's).
        lr: Learning rate, >= 0; a 1-element tensor stays on its device.
        betas: Decays of the moments, in [0, 1).
        eps: Added to the root, >= 0.
        weight_decay: Decoupled weight decay w, >= 0.
        amsgrad: Use the running maximum of the second moment.
        ars: The controller's settings; None for plain AdamW.
        process_group: The processes whose controllers observe the mean of their surprises, so that
            all gate alike: a ``torch.distributed`` group. None: the default group, once there is
            one. False: each by itself. With several processes, all of them must take the step.
        penalty: A penalty such as :class:`ars.regularizers.EWC`; see :class:`ars.penalty.Penalty`.
        max_grad_norm: Clip the norm of the task's gradient, over all groups, to this value.
        maximize: Ascend the objective.
        foreach: True: torch's foreach kernels (CPU). False with ``fused`` not True: a plain loop,
            as with ``fused=False``.
        capturable: The step may be captured in a CUDA graph; see :meth:`write_hyperparameters`.
        differentiable: Autograd may run through the step, a plain loop then.
        fused: True: fused kernels, Triton's on one GPU and torch's on a CPU. None: these where they
            can be had, otherwise (several GPUs, no Triton, a DTensor) the loop.
        stochastic_rounding: bfloat16 parameters have bfloat16 moments, and all three are rounded
            up or down at random, so that small updates are not lost on average. On a CPU this and
            ``master_weights`` take the loop; a DTensor can have neither.
        master_weights: bfloat16 parameters keep the 16 bits that they lack to float32 master
            weights in ``state[p]["param_remainder"]``.
        seed: Key of the random rounding, 0 <= seed < 2^63; the same on all replicas.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range, or the penalty belongs to another model.
        RuntimeError: ``foreach``, ``fused`` or a rounding was asked for where it cannot be had.

    Example:
        >>> import torch
        >>> from ars import ARSAdamW
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> torch.nn.init.ones_(model.weight).sum().item()
        2.0
        >>> opt = ARSAdamW(model.parameters(), lr=0.1, weight_decay=0.0)
        >>> loss = model(torch.ones(4, 2)).square().mean()
        >>> loss.backward()
        >>> opt.step(loss=loss)
        >>> model.weight.detach()
        tensor([[0.9000, 0.9000]])
        >>> float(opt.diagnostics["surprise"]), float(opt.diagnostics["phi"])
        (4.0, 1.0)

    References:
        Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv:1711.05101.
        Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks",
        arXiv:1612.00796.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
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
        stochastic_rounding: bool = False,
        master_weights: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            ars=ars,
            process_group=process_group,
            penalty=penalty,
            max_grad_norm=max_grad_norm,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            stochastic_rounding=stochastic_rounding,
            master_weights=master_weights,
            seed=seed,
            decoupled_weight_decay=True,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore; a state of Adam's stays decoupled here, as in torch."""
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
