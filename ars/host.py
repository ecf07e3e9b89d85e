r"""The step on a CPU: torch's own fused Adam under gated betas, and the penalty in blocks.

torch's kernel corrects the bias by powers of constant betas. For betas that change it is given a
step so large that its own corrections are 1, and the right ones by a change of variables:

.. math::
    \eta \frac{m / c_1}{\sqrt{v / c_2} + \epsilon}
    = \eta' \frac{m}{\sqrt{v} + \epsilon'}, \qquad
    \eta' = \eta \frac{\sqrt{c_2}}{c_1}, \quad \epsilon' = \epsilon \sqrt{c_2}.

Tensors whose gradient must be changed first (penalty, clipping, half precision) are updated in runs
that stay in the cache between the operations, so main memory sees each element once: 28 bytes a
float32 parameter, 36 with a float32 penalty.
"""

import itertools
import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from ars import reference
from ars.batch import Batch, Hyper, Options, Scalar, gated, write_diagnostics
from ars.blocks import BLOCK, Piece, runs

__all__ = ["step_"]

# A step at which every beta ** step is 0, so that torch's own bias corrections are 1.
FOREVER = 1e9


def step_(batch: Batch, hypers: list[Hyper], options: Options, *, foreach: bool) -> None:
    """Take one step with torch's kernels, in place.

    Args:
        batch: The tensors, all on the CPU.
        hypers: Each group's hyperparameters.
        options: What holds for all groups.
        foreach: Use torch's foreach kernels instead of its fused one.
    """
    hypers = [_numbers(hyper) for hyper in hypers]
    norm = grad_norm(batch.grads) if options.needs_norm else math.nan
    values: dict[str, Scalar] = {"surprise": math.nan, "rho": 0.0, "psi": 1.0, "phi": 1.0}
    values |= {"chi": 0.0, "grad_norm": norm, "penalty": 0.0}
    controller = options.controller
    if controller is not None:
        surprise = options.surprise
        if surprise is None:
            surprise = torch.tensor(norm, dtype=torch.float64)
        signals = controller.observe(surprise)
        values |= signals._asdict()
        hypers = [gated(hyper, float(signals.phi), float(signals.chi)) for hyper in hypers]
    clip = 1.0
    if options.max_norm is not None:
        clip = float(
            reference.clip_coefficient(torch.tensor(norm, dtype=torch.float64), options.max_norm)
        )

    torch._foreach_add_(batch.steps, 1.0)
    scratch: dict[torch.dtype, Tensor] = {}
    for (group, products), members in _classes(batch, hypers).items():
        update = _Update(hypers[group], products, options, clip, foreach)
        direct = [i for i in members if update.is_direct(batch, i)]
        if direct:
            update.tensors(batch, direct)
        for pieces in runs(batch, sorted(set(members) - set(direct))):
            values["penalty"] += update.run(pieces, scratch)

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
    return hyper._replace(lr=lr, beta1=beta1, beta2=beta2)


def _classes(
    batch: Batch, hypers: list[Hyper]
) -> dict[tuple[int, tuple[float, float] | None], list[int]]:
    """Sort the tensors by group and by the products of their betas, which differ after a miss."""
    classes: dict[tuple[int, tuple[float, float] | None], list[int]] = defaultdict(list)
    if not batch.products:
        for i, group in enumerate(batch.groups):
            classes[group, None].append(i)
        return classes
    betas = [torch.tensor([hyper.beta1, hyper.beta2], dtype=torch.float64) for hyper in hypers]
    torch._foreach_mul_(batch.products, [betas[group] for group in batch.groups])
    for i, (product1, product2) in enumerate(torch.stack(batch.products).tolist()):
        classes[batch.groups[i], (product1, product2)].append(i)
    return classes


class _Update:
    """The update of tensors of one group whose betas have the same products."""

    def __init__(
        self,
        hyper: Hyper,
        products: tuple[float, float] | None,
        options: Options,
        clip: float,
        foreach: bool,
    ) -> None:
        self.hyper, self.products, self.options = hyper, products, options
        self.sign, self.foreach = -clip if hyper.maximize else clip, foreach
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

    def is_direct(self, batch: Batch, i: int) -> bool:
        """Whether torch's kernel can read the gradient and write the parameter as they are."""
        param = batch.params[i]
        operands = (param, batch.grads[i], batch.exp_avgs[i], batch.exp_avg_sqs[i])
        return (
            abs(self.sign) == 1.0
            and batch.anchors[i] is None
            and all(t.dtype == param.dtype and t.is_contiguous() for t in operands)
        )

    def tensors(self, batch: Batch, members: list[int]) -> None:
        """Update whole tensors, all in one call."""
        lists = (batch.params, batch.grads, batch.exp_avgs, batch.exp_avg_sqs)
        largest = [t for i in members if (t := batch.max_exp_avg_sqs[i]) is not None]
        steps = [batch.steps[i] for i in members]
        params, grads, exp_avgs, exp_avg_sqs = ([tensors[i] for i in members] for tensors in lists)
        maximize = self.hyper.maximize
        self._adam(params, grads, exp_avgs, exp_avg_sqs, largest, steps, maximize=maximize)

    def run(self, pieces: list[Piece], scratch: dict[torch.dtype, Tensor]) -> float:
        """Update one run of pieces, and return its penalty before the step.

        Args:
            pieces: Of one kind, together no more elements than a run may have.
            scratch: Buffers for intermediate results by dtype: new memory for each would cost more
                than the arithmetic, in page faults.
        """
        dtype, amsgrad, penalized = pieces[0].kind
        if dtype not in scratch:
            scratch[dtype] = torch.empty(4, BLOCK, dtype=dtype)
        theta_row, gradient_row, delta_row, pull_row = scratch[dtype]
        ends = list(itertools.accumulate(piece.param.numel() for piece in pieces))
        cuts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

        thetas, gradients = [], []
        for piece, cut in zip(pieces, cuts, strict=True):
            theta, gradient = piece.param, piece.grad
            if theta.dtype != dtype:
                theta = theta_row[cut].copy_(theta)
            if gradient.dtype != dtype:  # before the product, which would round to half precision
                gradient = gradient_row[cut].copy_(gradient)
            if self.sign != 1.0:
                gradient = torch.mul(gradient, self.sign, out=gradient_row[cut])
            thetas.append(theta)
            gradients.append(gradient)

        penalty, strength = 0.0, self.options.strength
        if penalized:
            for piece, theta, cut in zip(pieces, thetas, cuts, strict=True):
                assert piece.anchor is not None
                assert piece.importance is not None
                delta = torch.sub(theta, piece.anchor, out=delta_row[cut])
                torch.mul(delta, piece.importance, out=pull_row[cut])
            penalty = 0.5 * strength * float(torch.dot(delta_row[: ends[-1]], pull_row[: ends[-1]]))
            if not self.options.proximal:  # eq. 8; delta has served, its memory is used again
                gradients = [
                    torch.add(gradient, pull_row[cut], alpha=strength, out=delta_row[cut])
                    for gradient, cut in zip(gradients, cuts, strict=True)
                ]

        columns = (list(column) for column in zip(*pieces, strict=True))
        params, exp_avgs, exp_avg_sqs, largest, _, _, _, steps = columns
        self._adam(thetas, gradients, exp_avgs, exp_avg_sqs, largest if amsgrad else [], steps)
        if penalized and self.options.proximal:
            for theta, piece in zip(thetas, pieces, strict=True):
                self._proximal(theta, piece)
        for param, theta in zip(params, thetas, strict=True):
            if theta is not param:
                param.copy_(theta)
        return penalty

    def _proximal(self, theta: Tensor, piece: Piece) -> None:
        """Take the proximal step (9) after Adam's, in its metric."""
        assert piece.anchor is not None
        assert piece.importance is not None
        beta2 = float(self.hyper.beta2)
        product2 = beta2 ** float(piece.step) if self.products is None else self.products[1]
        second = piece.exp_avg_sq if piece.max_exp_avg_sq is None else piece.max_exp_avg_sq
        denominator = reference.adam_denominator(second, 1 - product2, self.hyper.eps)
        metric = float(self.hyper.lr) * self.options.strength / denominator
        theta.copy_(reference.ewc_proximal(theta, piece.anchor, piece.importance, metric))

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
            steps = [torch.tensor(FOREVER, dtype=torch.float32)] * len(params)
        arguments = self.arguments | {"amsgrad": bool(largest), "maximize": maximize}
        if self.foreach:  # torch advances the steps it is given
            steps = [step - 1 for step in steps]
            arguments |= {"foreach": True, "decoupled_weight_decay": self.options.decoupled}
            adam(params, grads, exp_avgs, exp_avg_sqs, largest, steps, **arguments)
        else:
            fused = torch._fused_adamw_ if self.options.decoupled else torch._fused_adam_
            fused(params, grads, exp_avgs, exp_avg_sqs, largest, steps, **arguments)
