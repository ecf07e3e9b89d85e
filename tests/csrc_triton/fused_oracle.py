"""A problem the fused step can be given, the same step by the reference, and the comparison."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from controller_cases import make_controller, observe
from torch import Tensor

from ars import reference
from ars.csrc_triton.layout import Diagnostic, Hyper
from ars.csrc_triton.step import Controller, FusedAdam

# Allowed distance from the reference, in units in the last place of the stored dtype, at the
# magnitude of the largest operand (a small difference of large numbers is not more exact).
# Moments are the same operations in the same order; one unit is for a scalar that two ways of
# computing phi in float64 round to neighbouring float32 numbers. The parameter also goes through
# the product with 1/sqrt(c2), which the reference divides by, and up to two divisions more. Half
# precision rounds that once, and the interpreter truncates bfloat16 instead of rounding it. In
# float64 nothing hides that beta^t is exp(t log beta) here.
MOMENT_ULPS = {torch.float32: 1, torch.float64: 8}
PARAM_ULPS = {torch.float32: 4, torch.float64: 8, torch.float16: 1, torch.bfloat16: 1}
# Relative. The norm's and the penalty's terms are formed and summed in float32 within a tile; the
# controller is float64, with sums in another order.
NORM_TOLERANCE = 1e-6
PENALTY_TOLERANCE = 1e-6
SIGNAL_TOLERANCE = 1e-9

# Every term of the update must weigh enough to be seen in the result.
HYPER = {"lr": 0.3, "beta1": 0.7, "beta2": 0.6, "eps": 0.05, "weight_decay": 0.2, "strength": 1.5}
RAGGED: tuple[tuple[int, ...], ...] = ((), (7,), (33, 65), (0,))


@dataclass
class Problem:
    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: Sequence[Tensor | None] | None
    steps: list[Tensor]
    products: list[Tensor] | None
    groups: list[int]
    hyper: Tensor
    decoupled: bool = True
    controller: Controller | None = None
    anchors: Sequence[Tensor | None] | None = None
    importances: Sequence[Tensor | None] | None = None
    proximal: bool = False

    def fused(self, **options: Any) -> FusedAdam:
        return FusedAdam(**(self.__dict__ | options))

    def clone(self) -> "Problem":
        return copy.deepcopy(self)

    def gradients(self) -> list[Tensor]:
        return [torch.randn_like(param) for param in self.params]

    def reference_step_(
        self,
        grads: list[Tensor],
        *,
        loss: Tensor | None,
        clip: bool,
        reported: Tensor,
        scale: float = 1.0,
    ) -> Tensor:
        """Take the step by the reference; return the diagnostics.

        Norm, phi and chi are those that the kernel reported: they are compared on their own, and
        their rounding errors must not count as the update's.
        """
        norm = reported[Diagnostic.GRAD_NORM]
        phi, chi = 1.0, 0.0
        said = {Diagnostic.SURPRISE: math.nan, Diagnostic.RHO: 0.0, Diagnostic.PSI: 1.0}
        said |= {Diagnostic.PHI: phi, Diagnostic.CHI: chi}
        if self.controller is not None:
            signals = observe(self.controller, norm if loss is None else loss)
            phi, chi = float(reported[Diagnostic.PHI]), float(reported[Diagnostic.CHI])
            said = {
                Diagnostic.SURPRISE: float(signals.surprise),
                Diagnostic.RHO: float(signals.rho),
                Diagnostic.PSI: float(signals.psi),
                Diagnostic.PHI: float(signals.phi),
                Diagnostic.CHI: float(signals.chi),
            }
        penalty = 0.0
        for i, param in enumerate(self.params):
            row = self.hyper[self.groups[i]].tolist()
            lr, beta1, beta2 = row[Hyper.LR] * (1 + chi), row[Hyper.BETA1], row[Hyper.BETA2]
            beta1, beta2 = beta1 * phi, beta2 * phi
            self.steps[i] += 1
            if self.products is None:
                product1, product2 = (beta ** float(self.steps[i]) for beta in (beta1, beta2))
            else:
                self.products[i] *= self.products[i].new_tensor([beta1, beta2])
                product1, product2 = self.products[i].tolist()
            anchor = None if self.anchors is None else self.anchors[i]
            importance = None if self.importances is None else self.importances[i]
            strength = row[Hyper.STRENGTH]
            if anchor is not None and importance is not None:
                operands = (t.double() for t in (param, anchor, importance))
                penalty += float(reference.ewc_value(*operands, strength))
            coefficient = 1.0
            if clip and row[Hyper.MAX_NORM] < math.inf:
                coefficient = float(reference.clip_coefficient(norm, row[Hyper.MAX_NORM]))
            result = reference.adam_step(
                param,
                grads[i],  # divided by the scale with the coefficient, before it is rounded
                self.exp_avgs[i],
                self.exp_avg_sqs[i],
                None if self.max_exp_avg_sqs is None else self.max_exp_avg_sqs[i],
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                correction1=1 - product1,
                correction2=1 - product2,
                eps=row[Hyper.EPS],
                weight_decay=row[Hyper.WEIGHT_DECAY],
                decoupled=self.decoupled,
                maximize=row[Hyper.SIGN] < 0,
                clip=coefficient / scale,
                anchor=anchor,
                importance=importance,
                strength=strength,
                proximal=self.proximal,
            )
            targets = (param, self.exp_avgs[i], self.exp_avg_sqs[i])
            for target, value in zip(targets, result, strict=False):
                target.copy_(value)
            largest = None if self.max_exp_avg_sqs is None else self.max_exp_avg_sqs[i]
            if largest is not None and result.max_exp_avg_sq is not None:
                largest.copy_(result.max_exp_avg_sq)
        row = self.hyper[0].tolist()
        said |= {
            Diagnostic.LR: row[Hyper.LR] * (1 + chi),
            Diagnostic.BETA1: row[Hyper.BETA1] * phi,
            Diagnostic.BETA2: row[Hyper.BETA2] * phi,
            Diagnostic.GRAD_NORM: float(norm),
            Diagnostic.PENALTY: penalty,
        }
        return torch.tensor([said[entry] for entry in Diagnostic], dtype=torch.float64)


def make_problem(
    device: str,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    shapes: Sequence[tuple[int, ...]] = RAGGED,
    *,
    group_count: int = 1,
    amsgrad: bool = False,
    maximize: bool = False,
    max_norm: float = math.inf,
    controller: str | None = None,
    window: int = 20,
    history: int = 12,
    penalty: str | None = None,
    penalty_dtypes: Sequence[torch.dtype] = (torch.float32,),
    unpenalized: Sequence[int] = (),
    decoupled: bool = True,
) -> Problem:
    """Every shape in every dtype; groups, and penalties of the given dtypes, in turn."""
    params = [torch.randn(s, dtype=dtype, device=device) for dtype in dtypes for s in shapes]
    count = len(params)
    moment = [p.to(torch.float64 if p.dtype == torch.float64 else torch.float32) for p in params]
    rows = []
    for group in range(group_count):
        row = [0.0] * len(Hyper)
        for name, value in HYPER.items():  # each group's own, in the same range
            row[Hyper[name.upper()]] = value / (1 + 0.25 * group)
        row[Hyper.MAX_NORM] = max_norm * (1 + group)
        row[Hyper.SIGN] = -1.0 if maximize else 1.0
        rows.append(row)
    anchors, importances = None, None
    if penalty is not None:
        stored = [penalty_dtypes[i % len(penalty_dtypes)] for i in range(count)]
        anchors = [
            None if i in unpenalized else (p + torch.randn_like(p)).to(stored[i])
            for i, p in enumerate(params)
        ]
        importances = [
            None if i in unpenalized else torch.rand_like(moment[i]).to(stored[i])
            for i in range(count)
        ]
    return Problem(
        params=params,
        exp_avgs=[0.5 * torch.randn_like(m) for m in moment],
        exp_avg_sqs=[0.5 * torch.rand_like(m) for m in moment],
        max_exp_avg_sqs=[0.5 * torch.rand_like(m) for m in moment] if amsgrad else None,
        steps=[torch.tensor(float(i % 3), device=device) for i in range(count)],
        products=None
        if controller is None
        else [
            torch.tensor([0.9, 0.8], dtype=torch.float64, device=device) / (1 + i)
            for i in range(count)
        ],
        groups=[i % group_count for i in range(count)],
        hyper=torch.tensor(rows, dtype=torch.float64, device=device),
        decoupled=decoupled,
        controller=None
        if controller is None
        else make_controller(controller, window, device, history),
        anchors=anchors,
        importances=importances,
        proximal=penalty == "proximal",
    )


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

    for i, param in enumerate(problem.params):
        allowed = MOMENT_ULPS[problem.exp_avgs[i].dtype]
        old, new = before.params[i], expected.params[i]
        anchor = None if before.anchors is None else before.anchors[i]
        operands = [t.double() for t in (grads[i], old, anchor) if t is not None]
        squares = [t * t for t in operands]
        assert ulps(problem.exp_avgs[i], expected.exp_avgs[i], *operands) <= allowed
        assert ulps(problem.exp_avg_sqs[i], expected.exp_avg_sqs[i], *squares) <= allowed
        if problem.max_exp_avg_sqs is not None and expected.max_exp_avg_sqs is not None:
            actual, wanted = problem.max_exp_avg_sqs[i], expected.max_exp_avg_sqs[i]
            if actual is not None and wanted is not None:
                assert ulps(actual, wanted, *squares) <= allowed
        update = new.double() - old.double()
        assert ulps(param, new, old, anchor, update) <= PARAM_ULPS[param.dtype]
        assert torch.equal(problem.steps[i], expected.steps[i])
        if problem.products is not None and expected.products is not None:
            torch.testing.assert_close(
                problem.products[i], expected.products[i], rtol=SIGNAL_TOLERANCE, atol=0
            )
    if problem.controller is not None and expected.controller is not None:
        assert torch.equal(problem.controller.counts, expected.controller.counts)
        assert torch.equal(problem.controller.window, expected.controller.window)
    assert_diagnostics(fused.diagnostics, diagnostics)


def assert_diagnostics(actual: Tensor, expected: Tensor) -> None:
    for entry in Diagnostic:
        tolerance = PENALTY_TOLERANCE if entry == Diagnostic.PENALTY else SIGNAL_TOLERANCE
        torch.testing.assert_close(
            actual[entry].cpu(), expected[entry], rtol=tolerance, atol=1e-12, equal_nan=True
        )
