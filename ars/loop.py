"""The step one tensor at a time, straight from the reference: any device, differentiable."""

import math

import torch

from ars import reference
from ars.batch import Batch, Hyper, Options, gated, write_diagnostics
from ars.penalty import Scalar

__all__ = ["hold_", "moves", "step_"]


def step_(batch: Batch, hypers: list[Hyper], options: Options) -> None:
    """Take one step with :func:`ars.reference.adam_step` for every tensor, in place.

    Scalars that live on the device stay there, so nothing waits for it; but ``found_inf`` is read.

    Args:
        batch: The tensors.
        hypers: Each group's hyperparameters.
        options: What holds for all groups.
    """
    if options.found_inf is not None and options.found_inf.item() != 0:
        return
    device = options.diagnostics.device
    unscale: Scalar = 1.0
    if options.grad_scale is not None:
        unscale = 1 / options.grad_scale.to(device, torch.float64).reshape(())
    norm: Scalar = math.nan
    if options.needs_norm:
        norm = reference.grad_norm(batch.grads) * unscale
    values: dict[str, Scalar] = {"surprise": math.nan, "rho": 0.0, "psi": 1.0, "phi": 1.0}
    values |= {"chi": 0.0, "grad_norm": norm, "penalty": 0.0}
    controller, given = options.controller, hypers
    if controller is not None:
        surprise = norm if options.surprise is None else options.surprise
        signals = controller.observe(surprise)
        values |= signals._asdict()
        hypers = [gated(hyper, signals, controller.config.gate) for hyper in hypers]
    clip = unscale
    if options.max_norm is not None:
        number = torch.as_tensor(norm, device=device)
        clip = reference.clip_coefficient(number, options.max_norm) * unscale

    penalty = [] if options.penalty is None else [options.penalty.detach().to(device).double()]
    for i, param in enumerate(batch.params):
        # 0-d tensors of another device are moved; on the same device this is free.
        hyper = hypers[batch.groups[i]]
        lr, beta1, beta2, strength = (
            _on(param, value) for value in (hyper.lr, hyper.beta1, hyper.beta2, hyper.strength)
        )
        hyper = hyper._replace(lr=lr, beta1=beta1, beta2=beta2, strength=strength)
        corrections = _advance_(batch, i, given[batch.groups[i]], hyper)
        value = _update(batch, i, hyper, corrections, options, _on(param, clip * hyper.factor))
        if value is not None:
            penalty.append(value.to(device).double())

    if penalty:
        values["penalty"] = torch.stack([value.reshape(()) for value in penalty]).sum()
    values |= {"lr": hypers[0].lr, "beta1": hypers[0].beta1, "beta2": hypers[0].beta2}
    write_diagnostics(options.diagnostics, values)


def _update(
    batch: Batch,
    i: int,
    hyper: Hyper,
    corrections: tuple[Scalar, Scalar],
    options: Options,
    clip: Scalar,
) -> torch.Tensor | None:
    """Update tensor i, and return its penalty before the step."""
    param, remainder = batch.params[i], batch.remainders[i]
    anchor, importance, scale = batch.anchors[i], batch.importances[i], batch.scales[i]
    if importance is not None and scale is not None:
        importance = reference.decode_importance(importance, scale)
    theta = _kept(param) if remainder is None else reference.join_master(param, remainder)
    moments = [batch.exp_avgs[i], batch.exp_avg_sqs[i], batch.max_exp_avg_sqs[i]]
    stochastic = options.stochastic and param.dtype == torch.bfloat16
    if stochastic:
        theta = theta.float()
        moments = [moment if moment is None else moment.float() for moment in moments]
    exp_avg, exp_avg_sq, largest = moments
    assert exp_avg is not None
    assert exp_avg_sq is not None
    value = None
    if anchor is not None and importance is not None:
        value = reference.ewc_value(
            theta.detach().to(exp_avg.dtype), anchor, importance, hyper.strength
        )
    result = reference.adam_step(
        theta,
        batch.grads[i],
        _kept(exp_avg),
        _kept(exp_avg_sq),
        None if largest is None else _kept(largest),
        lr=hyper.lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        correction1=corrections[0],
        correction2=corrections[1],
        eps=hyper.eps,
        weight_decay=hyper.weight_decay,
        decoupled=options.decoupled,
        maximize=hyper.maximize,
        clip=clip,
        anchor=anchor,
        importance=importance,
        strength=hyper.strength,
        proximal=options.proximal,
        pull=batch.pulls[i],
    )
    if stochastic:
        result = _rounded(result, param, options.seed, batch.steps[i], batch.numbers[i])
    if remainder is None:
        param.copy_(result.param)
    else:
        rounded, rest = reference.split_master(result.param)
        param.copy_(rounded)
        remainder.copy_(rest)
    batch.exp_avgs[i].copy_(result.exp_avg)
    batch.exp_avg_sqs[i].copy_(result.exp_avg_sq)
    stored = batch.max_exp_avg_sqs[i]
    if stored is not None and result.max_exp_avg_sq is not None:
        stored.copy_(result.max_exp_avg_sq)
    return value


def hold_(
    held: Batch, hypers: list[Hyper], options: Options, *, count: torch.Tensor
) -> torch.Tensor:
    """Pull parameters without a gradient to their anchors, by the proximal step (9) alone.

    Its metric is that of their last step, and eps where there was none. To be called after the step
    of the others, whose gate it takes from the diagnostics; on a GPU it waits for nothing.

    Args:
        held: The parameters.
        hypers: Each group's hyperparameters, without the gate.
        options: What holds for all groups.
        count: A step counter that has advanced, for the bits that round: the parameters' own stand.

    Returns:
        Their penalty before, 0-d float64.
    """
    report = options.diagnostics
    if options.controller is not None:
        observed = report[: len(reference.Signals._fields)].clone()
        on_cpu = report.device.type == "cpu"
        signals = reference.Signals(*(observed.tolist() if on_cpu else observed.unbind()))
        gate = options.controller.config.gate
        # Not the betas: the moments stand, and what is left of them is of the steps before.
        hypers = [
            gated(hyper, signals, gate)._replace(beta1=hyper.beta1, beta2=hyper.beta2)
            for hyper in hypers
        ]
    there, total = moves(options), torch.zeros_like(report[0])
    for i, group in enumerate(held.groups):
        value = _hold(held, i, hypers[group], options, there, count)
        total = total + value.detach().to(total)
    return total


def moves(options: Options) -> torch.Tensor:
    """Whether anything may move, 0-d, where the diagnostics are."""
    device = options.diagnostics.device
    if options.found_inf is None:
        return torch.ones((), dtype=torch.bool, device=device)
    return options.found_inf.detach().to(device, non_blocking=True).reshape(()) == 0


def _hold(
    held: Batch,
    i: int,
    hyper: Hyper,
    options: Options,
    moves: torch.Tensor,
    count: torch.Tensor,
) -> torch.Tensor:
    """Move tensor i, and return its penalty before."""
    param, remainder = held.params[i], held.remainders[i]
    anchor, importance, scale = held.anchors[i], held.importances[i], held.scales[i]
    assert anchor is not None
    assert importance is not None
    if scale is not None:
        importance = reference.decode_importance(importance, scale)
    dtype = torch.promote_types(param.dtype, torch.float32)
    theta = _kept(param) if remainder is None else reference.join_master(param, remainder)
    theta, anchor, importance = theta.to(dtype), anchor.to(dtype), importance.to(dtype)
    lr, beta2, strength = (_on(param, x) for x in (hyper.lr, hyper.beta2, hyper.strength))
    second, largest = held.exp_avg_sqs[i].to(dtype), held.max_exp_avg_sqs[i]
    if largest is not None:
        second = torch.maximum(second, largest.to(dtype))
    steps = held.steps[i].detach().to(param.device, torch.float64).reshape(())
    product = beta2**steps
    if held.products:
        current = held.products_steps[i].to(steps).reshape(())
        product = reference.next_product(held.products[i][1], current, steps, beta2, 1.0)
    correction = 1 - product
    correction = torch.where(correction > 0, correction, 1.0)  # before the first step
    # With eps = 0 and no gradient yet, 0 / 0 would be NaN.
    denominator = reference.adam_denominator(second, correction, hyper.eps)
    denominator = denominator.clamp(min=torch.finfo(dtype).tiny)
    value = reference.ewc_value(theta, anchor, importance, strength)
    pulled = reference.ewc_proximal(theta, anchor, importance, lr * strength, denominator)
    pulled = torch.where(moves.to(param.device), pulled.to(dtype), theta)
    if remainder is not None:
        pulled, rest = reference.split_master(pulled)
        remainder.copy_(rest)
    elif options.stochastic and param.dtype == torch.bfloat16:
        step, number = count.to(param.device), held.numbers[i]
        bits, _, _ = reference.rounding_bits(param, seed=options.seed, step=step, number=number)
        pulled = reference.stochastic_round(pulled, param.dtype, bits)
    param.copy_(pulled)
    return value


def _rounded(
    result: reference.AdamResult, param: torch.Tensor, seed: int, step: torch.Tensor, number: int
) -> reference.AdamResult:
    """Round what a step produced to bfloat16, stochastically; the maximum with the bits of v."""
    bits, bits1, bits2 = reference.rounding_bits(
        param, seed=seed, step=step.to(param.device), number=number
    )
    dtype, largest = param.dtype, result.max_exp_avg_sq
    return reference.AdamResult(
        reference.stochastic_round(result.param, dtype, bits),
        reference.stochastic_round(result.exp_avg, dtype, bits1),
        reference.stochastic_round(result.exp_avg_sq, dtype, bits2),
        None if largest is None else reference.stochastic_round(largest, dtype, bits2),
    )


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    """Copy what autograd may need after the step has overwritten it (differentiable=True)."""
    return tensor.clone() if torch.is_grad_enabled() else tensor


def _on(param: torch.Tensor, value: Scalar) -> Scalar:
    """Move a 1-element tensor to the parameter's device, as a scalar; leave numbers alone."""
    return value.to(param.device).reshape(()) if isinstance(value, torch.Tensor) else value


def _advance_(batch: Batch, i: int, given: Hyper, hyper: Hyper) -> tuple[Scalar, Scalar]:
    """Count a step of tensor i, and return its bias corrections.

    Args:
        batch: The batch.
        i: The tensor.
        given: Its group's hyperparameters, without the gate.
        hyper: With it.
    """
    step = batch.steps[i]
    if not batch.products:
        step += 1
        count = step.double().reshape(())
        return 1 - hyper.beta1**count, 1 - hyper.beta2**count
    product, current = batch.products[i], batch.products_steps[i]
    taken = step.detach().to(current, non_blocking=True).reshape(())
    pairs = ((given.beta1, hyper.beta1), (given.beta2, hyper.beta2))
    for entry, pair in zip(product.unbind(), pairs, strict=True):
        base, beta = (_detached(_on(product, value)) for value in pair)
        entry.copy_(reference.next_product(entry, current, taken, base, beta))
    current.copy_(taken + 1)
    step += 1
    return 1 - product[0], 1 - product[1]


def _detached(value: Scalar) -> Scalar:
    return value.detach() if isinstance(value, torch.Tensor) else value
