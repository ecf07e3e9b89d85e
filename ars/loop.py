"""The step one tensor at a time, straight from the reference: any device, differentiable."""

import math

import torch

from ars import reference
from ars.batch import Batch, Hyper, Options, Scalar, gated, write_diagnostics

__all__ = ["step_"]


def step_(batch: Batch, hypers: list[Hyper], options: Options) -> None:
    """Take one step with :func:`ars.reference.adam_step` for every tensor, in place.

    Scalars that live on the device stay there, so nothing waits for it.

    Args:
        batch: The tensors.
        hypers: Each group's hyperparameters.
        options: What holds for all groups.
    """
    norm: Scalar = reference.grad_norm(batch.grads) if options.needs_norm else math.nan
    values: dict[str, Scalar] = {"surprise": math.nan, "rho": 0.0, "psi": 1.0, "phi": 1.0}
    values |= {"chi": 0.0, "grad_norm": norm, "penalty": 0.0}
    controller = options.controller
    if controller is not None:
        surprise = options.surprise if options.surprise is not None else torch.as_tensor(norm)
        signals = controller.observe(surprise)
        values |= signals._asdict()
        hypers = [gated(hyper, signals.phi, signals.chi) for hyper in hypers]
    clip: Scalar = 1.0
    if options.max_norm is not None:
        clip = reference.clip_coefficient(torch.as_tensor(norm), options.max_norm)

    penalty: list[torch.Tensor] = []
    for i, param in enumerate(batch.params):
        # 0-d tensors of another device are moved; on the same device this is free.
        hyper = hypers[batch.groups[i]]
        lr, beta1, beta2 = (_on(param, value) for value in (hyper.lr, hyper.beta1, hyper.beta2))
        hyper = hyper._replace(lr=lr, beta1=beta1, beta2=beta2)
        batch.steps[i] += 1
        correction1, correction2 = _corrections(batch, i, hyper)
        anchor, importance = batch.anchors[i], batch.importances[i]
        if anchor is not None and importance is not None:
            value = reference.ewc_value(param.detach(), anchor, importance, options.strength)
            penalty.append(value.double().to(options.diagnostics.device))
        largest = batch.max_exp_avg_sqs[i]
        result = reference.adam_step(
            _kept(param),
            batch.grads[i],
            _kept(batch.exp_avgs[i]),
            _kept(batch.exp_avg_sqs[i]),
            None if largest is None else _kept(largest),
            lr=hyper.lr,
            beta1=hyper.beta1,
            beta2=hyper.beta2,
            correction1=correction1,
            correction2=correction2,
            eps=hyper.eps,
            weight_decay=hyper.weight_decay,
            decoupled=options.decoupled,
            maximize=hyper.maximize,
            clip=_on(param, clip),
            anchor=anchor,
            importance=importance,
            strength=options.strength,
            proximal=options.proximal,
        )
        param.copy_(result.param)
        batch.exp_avgs[i].copy_(result.exp_avg)
        batch.exp_avg_sqs[i].copy_(result.exp_avg_sq)
        if largest is not None and result.max_exp_avg_sq is not None:
            largest.copy_(result.max_exp_avg_sq)

    if penalty:
        values["penalty"] = torch.stack(penalty).sum()
    values |= {"lr": hypers[0].lr, "beta1": hypers[0].beta1, "beta2": hypers[0].beta2}
    write_diagnostics(options.diagnostics, values)


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    """Copy what autograd may need after the step has overwritten it (differentiable=True)."""
    return tensor.clone() if torch.is_grad_enabled() else tensor


def _on(param: torch.Tensor, value: Scalar) -> Scalar:
    """Move a 1-element tensor to the parameter's device, as a scalar; leave numbers alone."""
    return value.to(param.device).reshape(()) if isinstance(value, torch.Tensor) else value


def _corrections(batch: Batch, i: int, hyper: Hyper) -> tuple[Scalar, Scalar]:
    """Return the bias corrections of tensor i: from the products of its betas, or the powers."""
    if batch.products:
        betas = torch.stack(
            [torch.as_tensor(b, dtype=torch.float64) for b in (hyper.beta1, hyper.beta2)]
        )
        batch.products[i].mul_(betas.detach())
        return 1 - batch.products[i][0], 1 - batch.products[i][1]
    step = batch.steps[i].double()
    return 1 - hyper.beta1**step, 1 - hyper.beta2**step
