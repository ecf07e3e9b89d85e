"""How far the fused step may be from the reference's, and the comparison."""

import torch
from fused_problem import Problem
from torch import Tensor

from ars import reference
from ars.csrc_triton.layout import Diagnostic
from ars.csrc_triton.step import FusedAdam

# Allowed distance from the reference, in units in the last place of the stored dtype, at the
# magnitude of the largest operand (a small difference of large numbers is not more exact).
# Moments are the same operations in the same order; one unit is for a scalar that two ways of
# computing phi in float64 round to neighbouring float32 numbers. The parameter also goes through
# the product with 1/sqrt(c2), which the reference divides by, and up to two divisions more. Half
# precision rounds that once, and the interpreter truncates bfloat16 instead of rounding it. In
# float64 nothing hides that beta^t is exp(t log beta) here. What is rounded stochastically is the
# same 16 bits away from the next number, in either: all but few of them round alike.
MOMENT_ULPS = {torch.float32: 1, torch.float64: 8, torch.bfloat16: 1}
PARAM_ULPS = {torch.float32: 4, torch.float64: 8, torch.float16: 1, torch.bfloat16: 1}
ROUNDED_ALIKE = 0.999
# Relative. The norm's and the penalty's terms are formed and summed in float32 within a tile; the
# controller is float64, with sums in another order.
NORM_TOLERANCE = 1e-6
PENALTY_TOLERANCE = 1e-6
SIGNAL_TOLERANCE = 1e-9


def ulps(actual: Tensor, expected: Tensor, *operands: Tensor | None) -> float:
    """Largest distance in units in the last place, at the magnitude of the largest operand."""
    if not expected.numel():
        return 0.0
    info = torch.finfo(expected.dtype)
    magnitude = expected.double().abs()
    for operand in operands:
        if operand is not None:
            magnitude = torch.maximum(magnitude, operand.double().abs())
    exponent = torch.frexp(magnitude.clamp(min=info.tiny))[1] - 1
    spacing = info.eps * torch.exp2(exponent.double())
    return float(((actual.double() - expected.double()).abs() / spacing).amax())


def assert_step(
    problem: Problem,
    fused: FusedAdam,
    *,
    loss: Tensor | None = None,
    clip: bool = False,
    grads: list[Tensor] | None = None,
    scale: float | None = None,
) -> None:
    """Take one fused step and compare everything it wrote with the reference's."""
    grads = problem.gradients() if grads is None else grads
    before, expected = problem.clone(), problem.clone()
    if scale is None:
        fused.step(grads, loss=loss, clip=clip)
    else:
        grads = [scale * grad for grad in grads]
        given = [grad.clone() for grad in grads]
        device = problem.hyper.device
        numbers = {"grad_scale": scale, "found_inf": 0.0}
        options = {name: torch.full((1,), value, device=device) for name, value in numbers.items()}
        fused.step(grads, loss=loss, clip=clip, **options)
        assert all(map(torch.equal, grads, given))
    reported = fused.diagnostics.clone()
    norm = reported[Diagnostic.GRAD_NORM]
    if clip or (problem.controller is not None and loss is None):
        expected_norm = reference.grad_norm(grads) / (scale or 1.0)
        torch.testing.assert_close(norm, expected_norm, rtol=NORM_TOLERANCE, atol=0)
    else:
        assert norm.isnan()
    diagnostics = expected.reference_step_(
        grads, loss=loss, clip=clip, reported=reported, scale=scale or 1.0
    )
    grads = [grad / (scale or 1.0) for grad in grads]

    for i in range(len(problem.params)):
        allowed = MOMENT_ULPS[problem.exp_avgs[i].dtype]
        # The numbers that the step computes with: master weights where there are some.
        old, new, found = before.weight(i), expected.weight(i), problem.weight(i)
        anchor, pull = before.entry("anchors", i), before.entry("pulls", i)
        operands = [t.double() for t in (grads[i], old, anchor, pull) if t is not None]
        squares = [t * t for t in operands]
        pairs = [(problem.params[i], expected.params[i])]
        for name, terms in (("exp_avgs", operands), ("exp_avg_sqs", squares)):
            pairs.append((getattr(problem, name)[i], getattr(expected, name)[i]))
            assert ulps(*pairs[-1], *terms) <= allowed
        largest, wanted = problem.entry("max_exp_avg_sqs", i), expected.entry("max_exp_avg_sqs", i)
        if largest is not None and wanted is not None:
            pairs.append((largest, wanted))
            assert ulps(largest, wanted, *squares) <= allowed
        update = new.double() - old.double()
        assert ulps(found, new, old, anchor, update) <= PARAM_ULPS[new.dtype]
        if problem.exp_avgs[i].dtype == torch.bfloat16:
            for actual, rounded in pairs:
                differ = int((actual != rounded).sum())
                assert differ <= (1 - ROUNDED_ALIKE) * actual.numel()
        assert torch.equal(problem.steps[i], expected.steps[i])
        if problem.products is not None and expected.products is not None:
            torch.testing.assert_close(
                problem.products[i], expected.products[i], rtol=SIGNAL_TOLERANCE, atol=0
            )
    if problem.controller is not None and expected.controller is not None:
        assert torch.equal(problem.controller.counts, expected.controller.counts)
        assert torch.equal(problem.controller.window, expected.controller.window)
        torch.testing.assert_close(
            problem.controller.gate_state,
            expected.controller.gate_state,
            rtol=SIGNAL_TOLERANCE,
            atol=0,
        )
    assert_diagnostics(fused.diagnostics, diagnostics)


def assert_diagnostics(actual: Tensor, expected: Tensor) -> None:
    for entry in Diagnostic:
        tolerance = PENALTY_TOLERANCE if entry == Diagnostic.PENALTY else SIGNAL_TOLERANCE
        torch.testing.assert_close(
            actual[entry].cpu(), expected[entry], rtol=tolerance, atol=1e-12, equal_nan=True
        )
