"""A problem that the fused step can be given, and the same step by the reference."""

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from controller_cases import make_controller, observe
from torch import Tensor

from ars import reference
from ars.csrc_triton.layout import Diagnostic, Hyper, Operands
from ars.csrc_triton.step import Controller, FusedAdam

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
    remainders: Sequence[Tensor | None] | None = None
    pulls: Sequence[Tensor | None] | None = None
    scales: Sequence[Tensor | None] | None = None
    stochastic: bool = False
    seed: int = 0
    numbers: list[int] | None = None
    products_steps: list[Tensor] | None = None

    def entry(self, name: str, i: int) -> Tensor | None:
        """Parameter i's entry of an optional list."""
        values = getattr(self, name)
        return None if values is None else values[i]

    def weight(self, i: int) -> Tensor:
        """Parameter i as the step computes with it: its master weight, if there is one."""
        remainder = self.entry("remainders", i)
        if remainder is not None:
            return reference.join_master(self.params[i], remainder)
        return self.params[i]

    def importance(self, i: int) -> Tensor | None:
        importance, scale = self.entry("importances", i), self.entry("scales", i)
        if importance is None or scale is None:
            return importance
        return reference.decode_importance(importance, scale)

    def write(self, i: int, result: reference.AdamResult) -> None:
        """Store what the reference computed in parameter i's tensors."""
        values = list(result)
        targets = [self.params[i], self.exp_avgs[i], self.exp_avg_sqs[i]]
        targets += [self.entry("max_exp_avg_sqs", i)]
        remainder = self.entry("remainders", i)
        if remainder is not None:
            values[0], rest = reference.split_master(result.param)
            remainder.copy_(rest)
        if self.exp_avgs[i].dtype == torch.bfloat16:
            number = i if self.numbers is None else self.numbers[i]
            bits = reference.rounding_bits(
                self.params[i], seed=self.seed, step=self.steps[i], number=number
            )
            values = [
                value if value is None else reference.stochastic_round(value, torch.bfloat16, bit)
                for value, bit in zip(values, (*bits, bits[2]), strict=True)
            ]
        for target, value in zip(targets, values, strict=True):
            if target is not None and value is not None:
                target.copy_(value)

    def operands(self) -> list[Operands]:
        columns = [getattr(self, COLUMNS.get(name, f"{name}s")) for name in Operands._fields]
        absent = [None] * len(self.params)
        return [Operands(*row) for row in zip(*(c or absent for c in columns), strict=True)]

    def fused(self, **options: Any) -> FusedAdam:
        """The kernels for these tensors; options replace lists of them, or other settings."""
        changed = dataclasses.replace(self, **{k: v for k, v in options.items() if k in FIELDS})
        names = ("hyper", "decoupled", "controller", "proximal", "stochastic", "seed", "numbers")
        settings = {name: getattr(changed, name) for name in names}
        others = {name: value for name, value in options.items() if name not in FIELDS}
        return FusedAdam(changed.operands(), changed.groups, **settings, **others)

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
        gate: tuple[str, ...] = ()
        said = {Diagnostic.SURPRISE: math.nan, Diagnostic.RHO: 0.0, Diagnostic.PSI: 1.0}
        said |= {Diagnostic.PHI: phi, Diagnostic.CHI: chi}
        if self.controller is not None:
            signals = observe(self.controller, norm if loss is None else loss)
            phi, chi = float(reported[Diagnostic.PHI]), float(reported[Diagnostic.CHI])
            gate = self.controller.gate
            said = {
                Diagnostic.SURPRISE: float(signals.surprise),
                Diagnostic.RHO: float(signals.rho),
                Diagnostic.PSI: float(signals.psi),
                Diagnostic.PHI: float(signals.phi),
                Diagnostic.CHI: float(signals.chi),
            }
        lr_factor = (1 + chi) * (phi if "lr" in gate else 1.0)
        beta_factor = phi if "betas" in gate else 1.0
        penalty = 0.0
        for i, param in enumerate(self.params):
            row = self.hyper[self.groups[i]].tolist()
            lr, beta1, beta2 = row[Hyper.LR] * lr_factor, row[Hyper.BETA1], row[Hyper.BETA2]
            bases = (beta1, beta2)
            factor = beta_factor * row[Hyper.BETA_FACTOR]
            beta1, beta2 = beta1 * factor, beta2 * factor
            taken = self.steps[i].clone()
            self.steps[i] += 1
            if self.products is None or self.products_steps is None:
                product1, product2 = (beta ** float(self.steps[i]) for beta in (beta1, beta2))
            else:
                product, count = self.products[i], self.products_steps[i]
                for entry, base, beta in zip(product.unbind(), bases, (beta1, beta2), strict=True):
                    entry.copy_(reference.next_product(entry, count, taken, base, beta))
                product1, product2 = product.tolist()
                count.copy_(self.steps[i])
            anchor, importance = self.entry("anchors", i), self.importance(i)
            strength = row[Hyper.STRENGTH]
            if anchor is not None and importance is not None:
                operands = (t.double() for t in (self.weight(i), anchor, importance))
                penalty += float(reference.ewc_value(*operands, strength))
            coefficient = 1.0
            if clip and row[Hyper.MAX_NORM] < math.inf:
                coefficient = float(reference.clip_coefficient(norm, row[Hyper.MAX_NORM]))
            # Divided by the scale with the coefficient, before either is rounded.
            coefficient *= row[Hyper.SIGN] / scale
            coefficient *= phi if "grad" in gate else 1.0
            exact = torch.float64 if param.dtype == torch.float64 else torch.float32
            grad = grads[i].to(exact) * coefficient
            pull, largest = self.entry("pulls", i), self.entry("max_exp_avg_sqs", i)
            result = reference.adam_step(
                self.weight(i).to(exact) if self.stochastic else self.weight(i),
                grad if pull is None else grad + pull,
                self.exp_avgs[i].to(exact),
                self.exp_avg_sqs[i].to(exact),
                None if largest is None else largest.to(exact),
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                correction1=1 - product1,
                correction2=1 - product2,
                eps=row[Hyper.EPS],
                weight_decay=row[Hyper.WEIGHT_DECAY],
                decoupled=self.decoupled,
                anchor=anchor,
                importance=importance,
                strength=strength,
                proximal=self.proximal,
            )
            self.write(i, result)
        row = self.hyper[0].tolist()
        said |= {
            Diagnostic.LR: row[Hyper.LR] * lr_factor,
            Diagnostic.BETA1: row[Hyper.BETA1] * beta_factor,
            Diagnostic.BETA2: row[Hyper.BETA2] * beta_factor,
            Diagnostic.GRAD_NORM: float(norm),
            Diagnostic.PENALTY: penalty,
        }
        return torch.tensor([said[entry] for entry in Diagnostic], dtype=torch.float64)


FIELDS = {field.name for field in dataclasses.fields(Problem)}
# Lists whose name is not their operand's with an s.
COLUMNS = {"products": "products", "products_step": "products_steps"}


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
    pulled: Sequence[int] = (),
    master: bool = False,
    stochastic: bool = False,
) -> Problem:
    """Every shape in every dtype; groups, and penalties of the given dtypes, in turn."""
    params = [torch.randn(s, dtype=dtype, device=device) for dtype in dtypes for s in shapes]
    count = len(params)
    exact = [p.to(torch.float64 if p.dtype == torch.float64 else torch.float32) for p in params]
    moment = [
        p if stochastic and p.dtype == torch.bfloat16 else e
        for p, e in zip(params, exact, strict=True)
    ]
    held = None if controller is None else make_controller(controller, window, device, history)
    varies = held is not None and "betas" in held.gate
    rows = []
    for group in range(group_count):
        row = [0.0] * len(Hyper)
        for name, value in HYPER.items():  # each group's own, in the same range
            row[Hyper[name.upper()]] = value / (1 + 0.25 * group)
        row[Hyper.MAX_NORM] = max_norm * (1 + group)
        row[Hyper.SIGN] = -1.0 if maximize else 1.0
        row[Hyper.BETA_FACTOR] = 1.0 - 0.25 * group * varies
        rows.append(row)
    anchors, importances, scales = None, None, None
    if penalty is not None:
        stored = [penalty_dtypes[i % len(penalty_dtypes)] for i in range(count)]
        # A quantized importance has a bf16 anchor.
        quantized = [dtype == torch.uint8 for dtype in stored]
        anchors = [
            None
            if i in unpenalized
            else (p + torch.randn_like(p)).to(torch.bfloat16 if quantized[i] else stored[i])
            for i, p in enumerate(params)
        ]
        importances = [
            None
            if i in unpenalized
            else torch.rand_like(p).to(stored[i])
            if not quantized[i]
            else torch.randint_like(p, 256, dtype=torch.uint8)
            for i, p in enumerate(exact)
        ]
        if any(quantized):
            scales = [
                0.1 + torch.rand((p.numel() + 63) // 64, device=device)
                if quantized[i] and i not in unpenalized
                else None
                for i, p in enumerate(params)
            ]
    remainders = None
    if master:
        remainders = [
            # Of an exact 0, which some versions of torch draw, a negative one would be a NaN.
            torch.randint_like(p, -(1 << 15), 1 << 15, dtype=torch.int16).where(p != 0, 0)
            if p.dtype == torch.bfloat16
            else None
            for p in params
        ]
    steps = [torch.tensor(float(i % 3), device=device) for i in range(count)]
    return Problem(
        params=params,
        exp_avgs=[0.5 * torch.randn_like(m) for m in moment],
        exp_avg_sqs=[0.5 * torch.rand_like(m) for m in moment],
        max_exp_avg_sqs=[0.5 * torch.rand_like(m) for m in moment] if amsgrad else None,
        steps=steps,
        products=[
            torch.tensor([0.9, 0.8], dtype=torch.float64, device=device) / (1 + i)
            for i in range(count)
        ]
        if varies
        else None,
        groups=[i % group_count for i in range(count)],
        hyper=torch.tensor(rows, dtype=torch.float64, device=device),
        decoupled=decoupled,
        controller=held,
        anchors=anchors,
        importances=importances,
        proximal=penalty == "proximal",
        remainders=remainders,
        pulls=[torch.randn_like(p) if i in pulled else None for i, p in enumerate(exact)]
        if pulled
        else None,
        scales=scales,
        stochastic=stochastic,
        seed=-(2**50) - 3,
        numbers=[3 * i + 1 for i in range(count)],
        # Every third is out of date, and not used.
        products_steps=[s + (i % 3 == 1) for i, s in enumerate(steps)] if varies else None,
    )


def plain_numbers(problem: Problem) -> None:
    """Numbers so round that the kernels' and the reference's float32 results are the same bits."""
    row = {"lr": 0.25, "beta1": 0.5, "beta2": 0.75, "eps": 0.125, "weight_decay": 0.5}
    for name, value in row.items():
        problem.hyper[:, Hyper[name.upper()]] = value
    for step in problem.steps:
        step.zero_()
