r"""The control kernel: gradient norm, controller, and every number that the step needs.

One launch: each program of the grid writes the sum of squares of one tile of gradients; the last
one to arrive adds these up in a fixed order and goes on alone (without a norm to compute there is
only one program). It observes the surprise, gates (:mod:`ars.csrc_triton.controller`), and forms
in float64, rounding once, what :mod:`ars.csrc_triton.adam` reads. All inputs that change between
steps lie in device memory: nothing here waits for the host, and a CUDA graph replays it with live
numbers.

Bytes: one read of the gradients if the norm is needed, else only the tables. The squares are
fp32 unless the gradients are fp64: an element beyond 1.8e19 makes the norm infinite.

Oracle: :func:`ars.reference.grad_norm` and :func:`ars.reference.clip_coefficient`.
"""

import triton
import triton.language as tl

from ars.csrc_triton.controller import observe
from ars.csrc_triton.helpers import (
    CORRECTION,
    DIAGNOSTIC,
    HYPER,
    SCALAR,
    TABLE,
    pointer,
    sum_in_order,
)

__all__ = ["control_kernel"]


@triton.jit
def _square_norm(table, grad_table, tiles, program, GRAD: tl.constexpr, TILE: tl.constexpr):
    """Sum of squares of one tile of gradients."""
    tensor = tl.load(tiles + 2 * program).to(tl.int64)
    first = tl.load(tiles + 2 * program + 1).to(tl.int64) * TILE
    numel = tl.load(table + tensor * TABLE.value.WIDTH + TABLE.value.NUMEL)
    address = tl.load(grad_table + tensor)
    offs = first + tl.arange(0, TILE)
    # Two loads, as in the step: one wide, and one for tails and misaligned views.
    if (address & 15) == 0 and first + TILE <= numel:
        g = tl.load(pointer(address, GRAD, True) + offs)
    else:
        g = tl.load(pointer(address, GRAD, False) + offs, mask=offs < numel, other=0.0)
    if GRAD != tl.float64:
        g = g.to(tl.float32)
    return tl.sum(g * g).to(tl.float64)


@triton.jit
def _write_scalars(
    hyper, scalars, diagnostics, norm, unscale, lr_factor, beta_factor, group_count,
    NORM: tl.constexpr, DECOUPLED: tl.constexpr, GROUP_BLOCK: tl.constexpr,
):  # fmt: skip
    """Form what the step reads of each group."""
    group = tl.arange(0, GROUP_BLOCK)
    mask = group < group_count
    source = hyper + group * HYPER.value.WIDTH
    target = scalars + group * SCALAR.value.WIDTH
    NUMBER: tl.constexpr = scalars.dtype.element_ty

    lr = tl.load(source + HYPER.value.LR, mask=mask, other=0.0) * lr_factor
    beta_factor *= tl.load(source + HYPER.value.BETA_FACTOR, mask=mask, other=1.0)
    beta1 = tl.load(source + HYPER.value.BETA1, mask=mask, other=0.0) * beta_factor
    beta2 = tl.load(source + HYPER.value.BETA2, mask=mask, other=0.0) * beta_factor
    decay = tl.load(source + HYPER.value.WEIGHT_DECAY, mask=mask, other=0.0)
    strength = tl.load(source + HYPER.value.STRENGTH, mask=mask, other=0.0)
    eps = tl.load(source + HYPER.value.EPS, mask=mask, other=0.0)
    clip = tl.load(source + HYPER.value.SIGN, mask=mask, other=1.0) * unscale
    if NORM:
        max_norm = tl.load(source + HYPER.value.MAX_NORM, mask=mask, other=float("inf"))
        clips = max_norm < float("inf")
        coefficient = tl.where(clips, max_norm, 0.0) / (norm + 1e-6)
        # The comparison is this way round to let a NaN through, as torch's clamp does.
        clip *= tl.where(clips, tl.where(coefficient > 1, 1.0, coefficient), 1.0)
    if DECOUPLED:
        decay = 1 - lr * decay
    tl.store(target + SCALAR.value.BETA1, beta1.to(NUMBER), mask=mask)
    tl.store(target + SCALAR.value.ONE_MINUS_BETA1, (1 - beta1).to(NUMBER), mask=mask)
    tl.store(target + SCALAR.value.BETA2, beta2.to(NUMBER), mask=mask)
    tl.store(target + SCALAR.value.ONE_MINUS_BETA2, (1 - beta2).to(NUMBER), mask=mask)
    tl.store(target + SCALAR.value.DECAY, decay.to(NUMBER), mask=mask)
    tl.store(target + SCALAR.value.EPS, eps.to(NUMBER), mask=mask)
    tl.store(target + SCALAR.value.STRENGTH, strength.to(NUMBER), mask=mask)
    tl.store(target + SCALAR.value.CLIP, clip.to(NUMBER), mask=mask)
    # The largest float32: infinity times an importance of 0 is NaN.
    metric = tl.minimum(lr * strength, 3.4028234663852886e38)
    tl.store(target + SCALAR.value.METRIC, metric.to(NUMBER), mask=mask)
    reported = group == 0
    here = tl.zeros((GROUP_BLOCK,), tl.int32)
    tl.store(diagnostics + DIAGNOSTIC.value.LR + here, lr, mask=reported)
    tl.store(diagnostics + DIAGNOSTIC.value.BETA1 + here, beta1, mask=reported)
    tl.store(diagnostics + DIAGNOSTIC.value.BETA2 + here, beta2, mask=reported)


@triton.jit
def _power(beta, step):
    """Return ``beta ** step`` in float64, for beta in [0, 1) and step >= 0."""
    positive = beta > 0
    power = tl.exp(step * tl.log(tl.where(positive, beta, 1.0)))
    return tl.where(positive | (step == 0), power, 0.0)


@triton.jit
def _renew_products(table, hyper, tensor_count, BLOCK: tl.constexpr):
    """Put powers of the betas in the place of products that are not of the steps taken."""
    start = 0
    while start < tensor_count:
        tensor = start + tl.arange(0, BLOCK)
        mask = tensor < tensor_count
        row = table + tensor.to(tl.int64) * TABLE.value.WIDTH
        steps = tl.load(row + TABLE.value.STEP, mask=mask, other=0)
        taken = tl.load(steps.to(tl.pointer_type(tl.float32)), mask=mask, other=0.0)
        current = tl.load(row + TABLE.value.PRODUCTS_STEP, mask=mask, other=0)
        current = tl.load(current.to(tl.pointer_type(tl.float32)), mask=mask, other=0.0)
        stale = mask & (current != taken)
        if tl.max(stale.to(tl.int32)) > 0:  # hardly ever, and the powers take the most time
            source = tl.load(row + TABLE.value.GROUP, mask=mask, other=0) * HYPER.value.WIDTH
            products = tl.load(row + TABLE.value.PRODUCTS, mask=mask, other=0)
            products = products.to(tl.pointer_type(tl.float64))
            for i in tl.static_range(2):
                beta = tl.load(hyper + source + HYPER.value.BETA1 + i, mask=mask, other=0.0)
                tl.store(products + i, _power(beta, taken.to(tl.float64)), mask=stale)
        start += BLOCK
    tl.debug_barrier()  # before other threads read them


@triton.jit
def _write_corrections(
    table, hyper, corrections, lr_factor, beta_factor, tensor_count,
    GATE_BETAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Advance every tensor's step, and the products of betas that vary; form its corrections."""
    NUMBER: tl.constexpr = corrections.dtype.element_ty
    if GATE_BETAS:
        _renew_products(table, hyper, tensor_count, BLOCK)
    start = 0
    while start < tensor_count:
        tensor = start + tl.arange(0, BLOCK)
        mask = tensor < tensor_count
        row = table + tensor.to(tl.int64) * TABLE.value.WIDTH
        source = hyper + tl.load(row + TABLE.value.GROUP, mask=mask, other=0) * HYPER.value.WIDTH
        lr = tl.load(source + HYPER.value.LR, mask=mask, other=0.0) * lr_factor
        beta1 = tl.load(source + HYPER.value.BETA1, mask=mask, other=0.0)
        beta2 = tl.load(source + HYPER.value.BETA2, mask=mask, other=0.0)
        steps = tl.load(row + TABLE.value.STEP, mask=mask, other=0)
        steps = steps.to(tl.pointer_type(tl.float32))
        step = tl.load(steps, mask=mask, other=0.0) + 1
        if GATE_BETAS:
            factor = tl.load(source + HYPER.value.BETA_FACTOR, mask=mask, other=1.0) * beta_factor
            products = tl.load(row + TABLE.value.PRODUCTS, mask=mask, other=0)
            products = products.to(tl.pointer_type(tl.float64))
            product1 = tl.load(products, mask=mask, other=0.0) * (beta1 * factor)  # eq. 6
            product2 = tl.load(products + 1, mask=mask, other=0.0) * (beta2 * factor)
        else:
            product1 = _power(beta1, step.to(tl.float64))
            product2 = _power(beta2, step.to(tl.float64))
        tl.debug_barrier()  # a small block is replicated: every thread has read what is replaced
        tl.store(steps, step, mask=mask)
        if GATE_BETAS:
            tl.store(products, product1, mask=mask)
            tl.store(products + 1, product2, mask=mask)
            products_step = tl.load(row + TABLE.value.PRODUCTS_STEP, mask=mask, other=0)
            tl.store(products_step.to(tl.pointer_type(tl.float32)), step, mask=mask)
        target = corrections + tensor * CORRECTION.value.WIDTH
        step_size = lr / (1 - product1)
        tl.store(target + CORRECTION.value.STEP_SIZE, step_size.to(NUMBER), mask=mask)
        inverse_root = 1 / tl.sqrt(1 - product2)
        tl.store(target + CORRECTION.value.INVERSE_ROOT, inverse_root.to(NUMBER), mask=mask)
        start += BLOCK


@triton.jit
def _control(
    table, hyper, scalars, corrections, window, counts, gate_state, config, seed, loss, grad_scale,
    diagnostics, norm, tensor_count, group_count,
    NORM: tl.constexpr, GATED: tl.constexpr, STANDARDIZE: tl.constexpr, DETREND: tl.constexpr,
    GATE_BETAS: tl.constexpr, GATE_LR: tl.constexpr, GATE_GRAD: tl.constexpr,
    DECOUPLED: tl.constexpr, WINDOW: tl.constexpr, WINDOW_BLOCK: tl.constexpr,
    GROUP_BLOCK: tl.constexpr, TENSOR_BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn the norm of the gradients as they are into what the step needs, and take the step."""
    unscale = 1.0
    if grad_scale is not None:
        unscale = 1 / tl.load(grad_scale).to(tl.float64)
        norm *= unscale
    lr_factor = tl.full((), 1.0, tl.float64)
    beta_factor = tl.full((), 1.0, tl.float64)
    if GATED:
        if loss is None:
            observed = norm
        else:
            observed = tl.load(loss)
            if loss.dtype.element_ty == tl.bfloat16:
                observed = observed.to(tl.float32)  # the interpreter's only way out of bf16
            observed = observed.to(tl.float64)
        phi, chi = observe(
            observed, window, counts, gate_state, config, seed, diagnostics,
            STANDARDIZE, DETREND, WINDOW, WINDOW_BLOCK,
        )  # fmt: skip
        lr_factor += chi
        if GATE_LR:
            lr_factor *= phi
        if GATE_BETAS:
            beta_factor *= phi
        if GATE_GRAD:
            unscale *= phi
    _write_scalars(
        hyper, scalars, diagnostics, norm, unscale, lr_factor, beta_factor, group_count,
        NORM, DECOUPLED, GROUP_BLOCK,
    )  # fmt: skip
    tl.store(diagnostics + DIAGNOSTIC.value.GRAD_NORM, norm)
    _write_corrections(
        table, hyper, corrections, lr_factor, beta_factor, tensor_count, GATE_BETAS, TENSOR_BLOCK
    )


@triton.jit
def _control_unless_inf(
    table, hyper, scalars, corrections, window, counts, gate_state, config, seed, loss, grad_scale,
    found_inf, diagnostics, norm, tensor_count, group_count,
    NORM: tl.constexpr, GATED: tl.constexpr, STANDARDIZE: tl.constexpr, DETREND: tl.constexpr,
    GATE_BETAS: tl.constexpr, GATE_LR: tl.constexpr, GATE_GRAD: tl.constexpr,
    DECOUPLED: tl.constexpr, WINDOW: tl.constexpr, WINDOW_BLOCK: tl.constexpr,
    GROUP_BLOCK: tl.constexpr, TENSOR_BLOCK: tl.constexpr,
):  # fmt: skip
    """What the last program does alone."""
    moves = True
    if found_inf is not None:
        moves = tl.load(found_inf) == 0
    if moves:
        tl.store(scalars + SCALAR.value.SKIP, 0.0)
        _control(
            table, hyper, scalars, corrections, window, counts, gate_state, config, seed, loss,
            grad_scale, diagnostics, norm, tensor_count, group_count,
            NORM, GATED, STANDARDIZE, DETREND, GATE_BETAS, GATE_LR, GATE_GRAD, DECOUPLED,
            WINDOW, WINDOW_BLOCK, GROUP_BLOCK, TENSOR_BLOCK,
        )  # fmt: skip
    else:
        tl.store(scalars + SCALAR.value.SKIP, 1.0)


@triton.jit(
    do_not_specialize=["first_partial", "partial_count", "tensor_count", "group_count"],
    # A loss may be any entry of a larger tensor: its alignment must not cost a compilation.
    do_not_specialize_on_alignment=["loss", "grad_scale", "found_inf"],
)
def control_kernel(
    table, grad_table, tiles,  # see tiles.py
    hyper, scalars, corrections,  # (G, 9) float64; (G, 10) and (T, 2), see layout.py
    window, counts, gate_state, config,  # (W,) float64, (2,) int64, (5,), (10,) float64; or None
    seed,  # (1,) int64
    loss,  # 0-d, floating; None: the surprise is the gradient norm
    grad_scale, found_inf,  # (1,) float32, or None: 1, and 0
    partials, ticket, diagnostics,  # (partial_count,) float64, (1,) int32 at 0, (10,) float64
    first_partial, partial_count, tensor_count, group_count,
    GRAD: tl.constexpr,
    NORM: tl.constexpr,  # the gradient norm is needed
    LAST: tl.constexpr,  # of the step's launches of this kernel
    GATED: tl.constexpr, STANDARDIZE: tl.constexpr, DETREND: tl.constexpr,
    GATE_BETAS: tl.constexpr, GATE_LR: tl.constexpr, GATE_GRAD: tl.constexpr,
    DECOUPLED: tl.constexpr, WINDOW: tl.constexpr, WINDOW_BLOCK: tl.constexpr,
    GROUP_BLOCK: tl.constexpr, TENSOR_BLOCK: tl.constexpr, TILE: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per tile of gradients; the last one to arrive controls."""
    if NORM:
        program = tl.program_id(0).to(tl.int64)
        partial = _square_norm(table, grad_table, tiles, program, GRAD, TILE)
        tl.store(partials + first_partial + program, partial)
        if LAST:
            arrived = tl.atomic_add(ticket, 1, sem="acq_rel")
            if arrived == tl.num_programs(0) - 1:
                tl.store(ticket, 0)  # for the next launch
                norm = tl.sqrt(sum_in_order(partials, partial_count, SUM_BLOCK))
                _control_unless_inf(
                    table, hyper, scalars, corrections, window, counts, gate_state, config,
                    seed, loss, grad_scale, found_inf, diagnostics, norm, tensor_count, group_count,
                    NORM, GATED, STANDARDIZE, DETREND, GATE_BETAS, GATE_LR, GATE_GRAD, DECOUPLED,
                    WINDOW, WINDOW_BLOCK, GROUP_BLOCK, TENSOR_BLOCK,
                )  # fmt: skip
    else:
        _control_unless_inf(
            table, hyper, scalars, corrections, window, counts, gate_state, config, seed, loss,
            grad_scale, found_inf, diagnostics, float("nan"), tensor_count, group_count,
            NORM, GATED, STANDARDIZE, DETREND, GATE_BETAS, GATE_LR, GATE_GRAD, DECOUPLED,
            WINDOW, WINDOW_BLOCK, GROUP_BLOCK, TENSOR_BLOCK,
        )  # fmt: skip
