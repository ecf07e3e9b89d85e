"""The step one tensor at a time, straight from the reference: any device, differentiable."""

from typing import Any

import torch
from torch import Tensor

from ars import reference
from ars.csrc_triton.layout import Operands
from ars.reference import Scalar
from ars.step.batch import Batch, Hyper, Options, apply_gate, begin, to_device

__all__ = ["may_move", "step_", "take_proximal_step_"]


def step_(batch: Batch, hypers: list[Hyper], options: Options) -> None:
    """Take one step with :func:`ars.reference.adam_step` for every tensor, in place.

    Scalars that live on the device stay there, so nothing waits for it; but ``found_inf`` is read.

    Args:
        batch: The tensors.
        hypers: The rows of hyperparameters.
        options: What holds for all groups.
    """
    start = begin(batch, hypers, options)
    if start is None:
        return
    device = options.diagnostics.device
    values = [] if options.penalty is None else [options.penalty.detach().to(device).double()]
    for i, tensors in enumerate(batch.tensors):
        group, place = batch.groups[i], tensors.param.device
        hyper = _on_device(start.hypers[group], place)
        corrections = _advance_(tensors, hypers[group], hyper)
        factor = to_device(start.factor * hyper.factor, place)
        value = _update(batch, i, hyper, corrections, factor, options)
        if value is not None:
            values.append(value.to(device).double())
    penalty: Scalar = torch.stack([v.reshape(()) for v in values]).sum() if values else 0.0
    start.report(options.diagnostics, penalty)


def _update(
    batch: Batch,
    i: int,
    hyper: Hyper,
    corrections: tuple[Scalar, Scalar],
    factor: Scalar,
    options: Options,
) -> Tensor | None:
    """Update tensor i, and return its penalty before the step."""
    tensors = batch.tensors[i]
    param, anchor, importance = tensors.param, tensors.anchor, _importance(tensors)
    theta = _weight(tensors)
    moments = [tensors.exp_avg, tensors.exp_avg_sq, tensors.max_exp_avg_sq]
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
        _copy_for_autograd(exp_avg),
        _copy_for_autograd(exp_avg_sq),
        None if largest is None else _copy_for_autograd(largest),
        lr=hyper.lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        correction1=corrections[0],
        correction2=corrections[1],
        eps=hyper.eps,
        weight_decay=hyper.weight_decay,
        decoupled=options.decoupled,
        maximize=hyper.maximize,
        clip=factor,
        anchor=anchor,
        importance=importance,
        strength=hyper.strength,
        proximal=options.proximal,
        pull=tensors.pull,
    )
    if stochastic:
        result = _rounded(result, param, options.seed, tensors.step, batch.numbers[i])
    _write_weight(tensors, result.param)
    tensors.exp_avg.copy_(result.exp_avg)
    tensors.exp_avg_sq.copy_(result.exp_avg_sq)
    if tensors.max_exp_avg_sq is not None and result.max_exp_avg_sq is not None:
        tensors.max_exp_avg_sq.copy_(result.max_exp_avg_sq)
    return value


def take_proximal_step_(
    batch: Batch, hypers: list[Hyper], options: Options, *, count: Tensor
) -> Tensor:
    """Pull parameters without a gradient to their anchors, by the proximal step (9) alone.

    Its metric is that of their last step, and eps where there was none. To be called after the step
    of the others, whose gate it takes from the diagnostics; on a GPU it waits for nothing.

    Args:
        batch: The parameters.
        hypers: Each group's hyperparameters, without the gate.
        options: What holds for all groups.
        count: A step counter that has advanced, for the bits that round: the parameters' own stand.

    Returns:
        Their penalty before, 0-d float64.
    """
    report = options.diagnostics
    if options.controller is not None:
        signals = reference.Signals.read(report)
        gate = options.controller.config.gate
        # Not the betas: the moments stand, and what is left of them is of the steps before.
        hypers = [
            apply_gate(hyper, signals, gate)._replace(beta1=hyper.beta1, beta2=hyper.beta2)
            for hyper in hypers
        ]
    moves, total = may_move(options), torch.zeros_like(report[0])
    for tensors, group, number in zip(batch.tensors, batch.groups, batch.numbers, strict=True):
        bits = options.seed, count, number
        value = _pull(tensors, hypers[group], moves, bits if options.stochastic else None)
        total = total + value.detach().to(total)
    return total


def may_move(options: Options) -> Tensor:
    """Whether anything may move, 0-d, where the diagnostics are."""
    device = options.diagnostics.device
    if options.found_inf is None:
        return torch.ones((), dtype=torch.bool, device=device)
    return options.found_inf.detach().to(device, non_blocking=True).reshape(()) == 0


def _pull(
    tensors: Operands, hyper: Hyper, moves: Tensor, rounding: tuple[int, Tensor, int] | None
) -> Tensor:
    """Move one tensor by the proximal step, and return its penalty before.

    Args:
        tensors: What belongs to it.
        hyper: Its hyperparameters.
        moves: Whether it may move, 0-d.
        rounding: Seed, step and number of the stochastic rounding, if that is how.
    """
    param, anchor, importance = tensors.param, tensors.anchor, _importance(tensors)
    assert anchor is not None
    assert importance is not None
    dtype = torch.promote_types(param.dtype, torch.float32)
    theta = _weight(tensors).to(dtype)
    anchor, importance = anchor.to(dtype), importance.to(dtype)
    hyper = _on_device(hyper, param.device)
    second, largest = tensors.exp_avg_sq.to(dtype), tensors.max_exp_avg_sq
    if largest is not None:
        second = torch.maximum(second, largest.to(dtype))
    steps = tensors.step.detach().to(param.device, torch.float64).reshape(())
    product: Any = hyper.beta2**steps
    if tensors.products is not None and tensors.products_step is not None:
        of = tensors.products_step.to(steps).reshape(())
        product = reference.next_product(tensors.products[1], of, steps, hyper.beta2, 1.0)
    correction = torch.where(product < 1, 1 - product, 1.0)  # before the first step
    # With eps = 0 and no gradient yet, 0 / 0 would be NaN.
    denominator = reference.adam_denominator(second, correction, hyper.eps)
    denominator = denominator.clamp(min=torch.finfo(dtype).tiny)
    value = reference.ewc_value(theta, anchor, importance, hyper.strength)
    metric = hyper.lr * hyper.strength
    pulled = reference.ewc_proximal(theta, anchor, importance, metric, denominator)
    pulled = torch.where(moves.to(param.device), pulled.to(dtype), theta)
    if rounding is not None and param.dtype == torch.bfloat16 and tensors.remainder is None:
        seed, step, number = rounding
        bits, _, _ = reference.rounding_bits(
            param, seed=seed, step=step.to(param.device), number=number
        )
        pulled = reference.stochastic_round(pulled, param.dtype, bits)
    _write_weight(tensors, pulled)
    return value


def _weight(tensors: Operands) -> Tensor:
    """Return a parameter as the step computes with it: its master weight, if there is one."""
    if tensors.remainder is None:
        return _copy_for_autograd(tensors.param)
    return reference.join_master(tensors.param, tensors.remainder)


def _write_weight(tensors: Operands, weight: Tensor) -> None:
    """Write what :func:`_weight` read."""
    if tensors.remainder is not None:
        weight, rest = reference.split_master(weight)
        tensors.remainder.copy_(rest)
    tensors.param.copy_(weight)


def _importance(tensors: Operands) -> Tensor | None:
    """Return how hard the penalty pulls at a tensor, if it does."""
    if tensors.importance is None or tensors.scale is None:
        return tensors.importance
    return reference.decode_importance(tensors.importance, tensors.scale)


def _rounded(
    result: reference.AdamResult, param: Tensor, seed: int, step: Tensor, number: int
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


def _copy_for_autograd(tensor: Tensor) -> Tensor:
    """Copy what autograd may need after the step has overwritten it (differentiable=True)."""
    return tensor.clone() if torch.is_grad_enabled() else tensor


def _on_device(hyper: Hyper, device: torch.device) -> Hyper:
    """Move what of the hyperparameters is a tensor to a device; on the same one this is free."""
    lr, beta1, beta2, strength = (
        to_device(value, device) for value in (hyper.lr, hyper.beta1, hyper.beta2, hyper.strength)
    )
    return hyper._replace(lr=lr, beta1=beta1, beta2=beta2, strength=strength)


def _advance_(tensors: Operands, given: Hyper, hyper: Hyper) -> tuple[Scalar, Scalar]:
    """Count a step of a tensor, and return its bias corrections.

    Args:
        tensors: What belongs to it.
        given: Its group's hyperparameters, without the gate.
        hyper: With it.
    """
    step, products, of = tensors.step, tensors.products, tensors.products_step
    if products is None or of is None:
        step += 1
        taken = step.double().reshape(())
        return 1 - hyper.beta1**taken, 1 - hyper.beta2**taken
    taken = step.detach().to(of, non_blocking=True).reshape(())
    pairs = ((given.beta1, hyper.beta1), (given.beta2, hyper.beta2))
    for product, pair in zip(products.unbind(), pairs, strict=True):
        base, beta = (
            x.detach() if isinstance(x, Tensor) else x
            for x in (to_device(value, products.device) for value in pair)
        )
        product.copy_(reference.next_product(product, of, taken, base, beta))
    of.copy_(taken + 1)
    step += 1
    return 1 - products[0], 1 - products[1]
