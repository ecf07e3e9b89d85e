r"""The step on a CPU: torch's own fused Adam, and the penalty in blocks.

torch's kernel corrects the bias by powers of constant betas. For betas that a gate changes it is
given a step so large that its own corrections are 1, and the right ones by a change of variables:

.. math::
    \eta \frac{m / c_1}{\sqrt{v / c_2} + \epsilon}
    = \eta' \frac{m}{\sqrt{v} + \epsilon'}, \qquad
    \eta' = \eta \frac{\sqrt{c_2}}{c_1}, \quad \epsilon' = \epsilon \sqrt{c_2}.

Tensors whose gradient must be changed first (penalty, clipping, half precision) are updated in runs
that stay in the cache between the operations, so main memory sees each element once: 28 bytes a
float32 parameter, 36 with a float32 penalty. The way the tensors are cut is kept from step to step.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from ars import reference
from ars.batch import Batch, Hyper, Options, gated, write_diagnostics
from ars.blocks import Run, Scratch, gathered
from ars.counters import Counters
from ars.penalty import Scalar
from ars.plan import Direct, Plan

__all__ = ["HostStep"]

# A step at which every beta ** step is 0, that of a beta next to 1 too, so that torch's own bias
# corrections are 1.
FOREVER = torch.tensor(torch.finfo(torch.float32).max, dtype=torch.float32, device="cpu")


class HostStep:
    """Takes steps with torch's kernels."""

    def __init__(self) -> None:
        self._scratch = Scratch()
        self._counters: Counters | None = None
        self._plan: Plan | None = None

    def step_(self, batch: Batch, hypers: list[Hyper], options: Options, *, foreach: bool) -> None:
        """Take one step, in place.

        Args:
            batch: The tensors, all on the CPU.
            hypers: Each group's hyperparameters.
            options: What holds for all groups.
            foreach: Use torch's foreach kernels instead of its fused one.
        """
        if options.found_inf is not None and options.found_inf.item() != 0:
            return
        hypers = given = [_numbers(hyper) for hyper in hypers]
        factor = 1.0 if options.grad_scale is None else 1 / options.grad_scale.item()
        norm = grad_norm(batch.grads) * factor if options.needs_norm else math.nan
        values: dict[str, Scalar] = {"surprise": math.nan, "rho": 0.0, "psi": 1.0, "phi": 1.0}
        values |= {"chi": 0.0, "grad_norm": norm, "penalty": 0.0}
        if options.penalty is not None:
            values["penalty"] = float(options.penalty)
        controller = options.controller
        if controller is not None:
            surprise = norm if options.surprise is None else options.surprise
            signals = controller.observe(surprise)
            values |= signals._asdict()
            hypers = [gated(hyper, signals, controller.config.gate) for hyper in hypers]
        if options.max_norm is not None:
            number = torch.tensor(norm, dtype=torch.float64, device="cpu")
            factor *= float(reference.clip_coefficient(number, options.max_norm))

        counters = self._counters
        if counters is None or not counters.hold(batch):
            counters = self._counters = Counters(batch)
        kinds, products = counters.multiply_(given, hypers)
        plan, scaled = self._plan, factor * float(hypers[0].factor) != 1.0
        if plan is None or not plan.holds(batch, kinds, scaled=scaled):
            plan = self._plan = Plan(batch, kinds, self._scratch, scaled=scaled)
        counters.count_()
        stretches = plan.stretches(batch.grads)
        for alike in plan.classes:
            hyper = hypers[batch.groups[alike.first]]
            pair = None if products is None else products[alike.first].tolist()
            update = _Update(hyper, pair, options, factor, foreach)
            if alike.direct.indices:
                update.tensors(alike.direct, batch.grads)
            for run in alike.runs:
                values["penalty"] += update.run(run, stretches)
            for run, gradients in plan.strided(alike, self._scratch):
                values["penalty"] += update.run(run, gradients)

        values |= {"lr": hypers[0].lr, "beta1": hypers[0].beta1, "beta2": hypers[0].beta2}
        write_diagnostics(options.diagnostics, values)


def grad_norm(grads: list[Tensor]) -> float:
    """Euclidean norm of all gradients as one vector.

    Float32 gradients are summed by the BLAS dot product, which reads them twice as fast as torch's
    norm does; if that overflows, and for every other dtype, the reference is used.
    """
    squares = 0.0
    for grad in grads:
        if grad.dtype == torch.float32 and grad.is_contiguous():
            flat = grad.detach().view(-1)
            square = float(torch.dot(flat, flat))
        else:
            square = math.inf
        if not math.isfinite(square):
            square = float(reference.grad_norm([grad.detach()])) ** 2
        squares += square
    return math.sqrt(squares)


def _numbers(hyper: Hyper) -> Hyper:
    """Read tensor hyperparameters as numbers: on a CPU that waits for nothing."""
    lr, beta1, beta2 = (float(value) for value in (hyper.lr, hyper.beta1, hyper.beta2))
    return hyper._replace(lr=lr, beta1=beta1, beta2=beta2, strength=float(hyper.strength))


class _Update:
    """The update of tensors of one group whose betas have the same products."""

    def __init__(
        self,
        hyper: Hyper,
        products: list[float] | None,  # of its betas, if a gate makes these vary
        options: Options,
        factor: float,  # of the gradients: unscaling and clipping
        foreach: bool,
    ) -> None:
        self.hyper, self.products, self.options = hyper, products, options
        factor *= float(hyper.factor)
        self.factor, self.foreach = -factor if hyper.maximize else factor, foreach
        self.arguments: dict[str, Any] = {
            "lr": hyper.lr,
            "beta1": hyper.beta1,
            "beta2": hyper.beta2,
            "eps": hyper.eps,
            "weight_decay": hyper.weight_decay,
        }
        if products is not None:
            correction1, root2 = 1 - products[0], math.sqrt(1 - products[1])
            self.arguments["lr"] = float(hyper.lr) * root2 / correction1
            self.arguments["eps"] = hyper.eps * root2
            if options.decoupled:  # torch decays by lr' w'; L2 decay does not meet the lr
                self.arguments["weight_decay"] = hyper.weight_decay * correction1 / root2

    def tensors(self, direct: Direct, gradients: list[Tensor]) -> None:
        """Update whole tensors, all in one call.

        Args:
            direct: The tensors.
            gradients: Those of the batch.
        """
        indices, params, exp_avgs, exp_avg_sqs, largest, steps = direct
        grads = [gradients[i] for i in indices]
        maximize = self.hyper.maximize
        self._adam(params, grads, exp_avgs, exp_avg_sqs, largest, steps, maximize=maximize)

    def run(self, run: Run, stretches: Mapping[int, Sequence[Tensor]]) -> float:
        """Update one run of pieces, and return its penalty before the step.

        Args:
            run: The pieces.
            stretches: The gradient of each tensor of the batch, cut as the tensor is.
        """
        columns, strength = run.columns, float(self.hyper.strength)
        thetas: list[Tensor] = columns.param
        if any(theta.dtype != run.dtype for theta in thetas):
            gathered(thetas, run.theta)
            thetas = list(run.thetas)
        gradients = [stretches[piece.tensor][piece.part] for piece in run.pieces]
        penalty = 0.0
        coupled = run.penalized and not self.options.proximal
        if run.penalized:
            anchor = gathered(columns.anchor, run.pull)
            delta = torch.sub(gathered(thetas, run.delta), anchor, out=run.delta)
            pull = torch.mul(
                delta,
                gathered([piece.importance() for piece in run.pieces], run.pull),
                out=run.pull,
            )
            penalty = 0.5 * strength * float(torch.dot(delta, pull))
        kept = self.factor == 1.0 and not (coupled or run.pulled)
        if not kept or any(gradient.dtype != run.dtype for gradient in gradients):
            # Converted before the product, which would round to half precision.
            gradient = gathered(gradients, run.gradient)
            if self.factor != 1.0:
                gradient = torch.mul(gradient, self.factor, out=run.gradient)
            if coupled:  # eq. 8
                gradient = torch.add(gradient, run.pull, alpha=strength, out=run.gradient)
            if run.pulled:
                pull = gathered(columns.pull, run.pull)
                gradient = torch.add(gradient, pull, out=run.gradient)
            gradients = list(run.gradients) if len(gradients) > 1 else [gradient]

        largest = columns.max_exp_avg_sq if run.amsgrad else []
        self._adam(thetas, gradients, columns.exp_avg, columns.exp_avg_sq, largest, run.steps)
        if run.penalized and self.options.proximal:
            if len(thetas) > 1 and thetas[0] is columns.param[0]:
                torch.cat(thetas, out=run.theta)
                thetas = list(run.thetas)
            self._proximal(run, run.theta if len(thetas) > 1 else thetas[0])
        for param, theta in zip(columns.param, thetas, strict=True):
            if theta is not param:
                param.copy_(theta)
        return penalty

    def _proximal(self, run: Run, theta: Tensor) -> None:
        """Take the proximal step (9), as :func:`ars.reference.ewc_proximal`, after Adam's.

        Args:
            run: The pieces.
            theta: Their parameters in one row, overwritten.
        """
        columns, bound = run.columns, torch.finfo(run.dtype).max
        denominator, q, part = run.gradient, run.delta, run.pull  # scratch that is free by now
        seconds = columns.max_exp_avg_sq if run.amsgrad else columns.exp_avg_sq
        torch.sqrt(gathered(seconds, denominator), out=denominator)
        roots = self._roots(run)
        if len(set(roots)) == 1:
            denominator.div_(roots[0])
        else:
            for stretch, root in zip(denominator.split(run.sizes), roots, strict=True):
                stretch.div_(root)
        denominator.add_(self.hyper.eps).clamp_(max=bound)
        metric = min(float(self.hyper.lr) * float(self.hyper.strength), bound)
        torch.mul(gathered([piece.importance() for piece in run.pieces], q), metric, out=q)
        held = q > denominator
        torch.minimum(q, denominator, out=part).div_(denominator.add_(q))
        anchor = gathered(columns.anchor, q)
        part.mul_(torch.sub(theta, anchor, out=denominator))
        torch.where(held, torch.add(anchor, part, out=denominator), theta.sub_(part), out=theta)

    def _roots(self, run: Run) -> list[float]:
        """Return the root of the second moment's bias correction of each piece."""
        if self.products is not None:
            return [math.sqrt(1 - self.products[1])]
        beta2 = float(self.hyper.beta2)
        steps = [float(step) for step in run.steps]
        return [math.sqrt(1 - beta2**step) for step in steps]

    def _adam(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        largest: list[Tensor],
        steps: list[Tensor],
        *,
        maximize: bool = False,
    ) -> None:
        """Call torch's kernel."""
        if self.products is not None:
            steps = [FOREVER] * len(params)
        arguments = self.arguments | {"amsgrad": bool(largest), "maximize": maximize}
        if self.foreach:  # torch advances the steps it is given
            steps = [step.float() for step in torch._foreach_sub(steps, 1)]
            arguments |= {"foreach": True, "decoupled_weight_decay": self.options.decoupled}
            adam(params, grads, exp_avgs, exp_avg_sqs, largest, steps, **arguments)
        else:
            fused = torch._fused_adamw_ if self.options.decoupled else torch._fused_adam_
            fused(params, grads, exp_avgs, exp_avg_sqs, largest, steps, **arguments)
