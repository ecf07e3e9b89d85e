r"""What others do against spikes, written from their papers: gradient rules and two optimizers.

A *rule* stands between the backward pass and AdamW. It is called with the gradients and the loss of
a step, may scale the gradients in place, and says whether the step is to be taken:

    ZClip      clips the norm of all gradients by its z-score
    AdaGC      clips the norm of each tensor by its own running mean
    SkipStep   leaves out a step whose loss or norm has a large z-score

An *optimizer* is another AdamW: `SPAM` forgets its moments now and then and clips single entries,
`StableAdamW` takes smaller steps where the second moment lags behind.

The papers train for 10^4 to 10^6 steps, with warm-ups of 25 to 500; the stress runs have 200 steps
and begin their stress at step 100. Lengths counted in steps are therefore settings here, with the
paper's value named beside ours. Norms are read on the host: every rule costs a synchronisation.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["OPTIMIZERS", "RULES", "SPAM", "AdaGC", "Rule", "SkipStep", "StableAdamW", "ZClip"]


class Rule(Protocol):
    """What is done to the gradients of a step before AdamW sees them."""

    def __call__(self, gradients: Sequence[Tensor], loss: float) -> bool:
        """Change the gradients in place, and say whether the step is to be taken.

        Args:
            gradients: of all parameters, in one order throughout.
            loss: of the step.
        """


def _norm(gradients: Sequence[Tensor]) -> float:
    """The norm of all tensors together, in float32."""
    return math.sqrt(sum(float(torch.linalg.vector_norm(g.float())) ** 2 for g in gradients))


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {value!r}")


class ZClip:
    r"""Clip the gradient's norm where it is far above its running mean.

    With the norm g_t, its running mean mu and deviation s,

        z   = (g_t - mu) / s
        g*  = mu + (threshold^2 / z) s   if z > threshold, else g_t
        mu  <- alpha mu + (1 - alpha) g*
        s^2 <- alpha s^2 + (1 - alpha) (g* - mu)^2

    so the larger a spike, the more it is clipped. In the first ``warmup`` steps nothing is clipped;
    mu and s are then the mean and deviation of these. A norm that is not finite makes a gradient of
    0, which the paper does not treat, and leaves mu and s alone.

    Args:
        threshold: of z, above 0; 2.5 in the paper.
        alpha: in [0, 1]; 0.97 in the paper.
        warmup: steps, at least 2; 25 in the paper.

    Raises:
        ValueError: a setting is outside its range.

    Example:
        >>> clip = ZClip(warmup=2)
        >>> for norm in (1.0, 3.0, 102.0):
        ...     gradient = torch.tensor([norm])
        ...     taken = clip([gradient], loss=1.0)
        >>> taken, gradient  # mu 2, s 1: z is 100
        (True, tensor([2.0625]))

    References:
        Kumar et al., "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", arXiv:2504.02507.
    """

    def __init__(self, threshold: float = 2.5, alpha: float = 0.97, warmup: int = 25) -> None:
        _check("threshold", threshold, 1e-6, math.inf)
        _check("alpha", alpha, 0.0, 1.0)
        _check("warmup", warmup, 2, math.inf)
        self.threshold, self.alpha, self.warmup = threshold, alpha, warmup
        self._first: list[float] = []
        self.mean = self.variance = 0.0

    def __call__(self, gradients: Sequence[Tensor], loss: float) -> bool:
        """Clip in place; every step is taken."""
        norm = _norm(gradients)
        if not math.isfinite(norm):
            torch._foreach_zero_(list(gradients))
            return True
        if len(self._first) < self.warmup:
            self._first.append(norm)
            self.mean = sum(self._first) / len(self._first)
            squares = ((value - self.mean) ** 2 for value in self._first)
            self.variance = sum(squares) / len(self._first)
            return True
        deviation = max(math.sqrt(self.variance), 1e-6)  # the paper's eps: a constant norm has none
        z = (norm - self.mean) / deviation
        kept = norm
        if z > self.threshold:
            kept = self.mean + self.threshold**2 / z * deviation
            torch._foreach_mul_(list(gradients), kept / norm)
        self.mean = self.alpha * self.mean + (1 - self.alpha) * kept
        square = (kept - self.mean) ** 2
        self.variance = self.alpha * self.variance + (1 - self.alpha) * square
        return True


class AdaGC:
    r"""Clip each tensor's gradient by the running mean of its own clipped norms.

    With the gradient g_i of tensor i and its memory gamma_i, in the first ``warmup`` steps

        h_i = min(1, absolute / |g|),    gamma_i <- min(gamma_i, |h_i g_i|)

    where |g| is the norm of all gradients, and afterwards

        h_i = min(1, relative gamma_i / |g_i|),    gamma_i <- beta gamma_i + (1 - beta) |h_i g_i|

    The gradient becomes h_i g_i. Ours: a norm of 0 leaves gamma_i alone. Models here begin with
    projections of 0, behind which the first gradients are exactly 0; their minimum would be 0, and
    these tensors would never move again. A norm that is not finite makes a gradient of 0.

    Args:
        relative: above 0; 1.05 in the paper.
        beta: in [0, 1]; 0.98 in the paper.
        absolute: above 0; 1 in the paper.
        warmup: steps; 100 in the paper, which is where the stress begins here.

    Raises:
        ValueError: a setting is outside its range.

    Example:
        >>> clip = AdaGC(warmup=1)
        >>> for norm in (0.5, 8.0):
        ...     gradient = torch.tensor([norm])
        ...     taken = clip([gradient], loss=1.0)
        >>> taken, gradient  # 1.05 x 0.5
        (True, tensor([0.5250]))

    References:
        Wang et al., "AdaGC: Enhancing LLM Pretraining Stability via Adaptive Gradient Clipping",
        arXiv:2502.11034.
    """

    def __init__(
        self, relative: float = 1.05, beta: float = 0.98, absolute: float = 1.0, warmup: int = 20
    ) -> None:
        _check("relative", relative, 1e-6, math.inf)
        _check("beta", beta, 0.0, 1.0)
        _check("absolute", absolute, 1e-6, math.inf)
        _check("warmup", warmup, 0, math.inf)
        self.relative, self.beta, self.absolute, self.warmup = relative, beta, absolute, warmup
        self.gammas: list[float] = []
        self._steps = 0

    def __call__(self, gradients: Sequence[Tensor], loss: float) -> bool:
        """Clip in place; every step is taken."""
        self._steps += 1
        self.gammas = self.gammas or [math.inf] * len(gradients)
        whole = _norm(gradients)
        for at, gradient in enumerate(gradients):
            norm, gamma = _norm([gradient]), self.gammas[at]
            if norm == 0.0:
                continue
            if not math.isfinite(norm):
                gradient.zero_()
                continue
            if self._steps <= self.warmup:
                kept = norm * min(1.0, self.absolute / whole)
                self.gammas[at] = min(gamma, kept)
            elif math.isinf(gamma):  # the first gradient that is not 0 comes after the warm-up
                kept = self.gammas[at] = norm
            else:
                kept = min(norm, self.relative * gamma)
                self.gammas[at] = self.beta * gamma + (1 - self.beta) * kept
            if kept < norm:
                gradient.mul_(kept / norm)
        return True


class SkipStep:
    r"""Leave out a step whose loss or gradient norm is far above those of the steps before.

        skip if  loss > mean + sigmas deviation  or  norm > mean + sigmas deviation

    over the last ``window`` steps, taken or left out. Nothing is left out before half of the window
    is full. A step that is left out changes neither weights nor moments. A loss or norm that is not
    finite is left out and not kept.

    Large laboratories do this in several ways; the rule is that of OLMo 2, with a window of 128 and
    6 deviations. PaLM went back by some hundred steps and left out the batches instead.

    Args:
        sigmas: above 0.
        window: steps, at least 4.

    Raises:
        ValueError: a setting is outside its range.

    Example:
        >>> skip = SkipStep(sigmas=3.0, window=4)
        >>> [skip([torch.tensor([1.0])], loss=loss) for loss in (1.0, 1.2, 9.0, 1.1)]
        [True, True, False, True]

    References:
        Team OLMo, "2 OLMo 2 Furious", arXiv:2501.00656.
        Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", arXiv:2204.02311.
    """

    def __init__(self, sigmas: float = 6.0, window: int = 128) -> None:
        _check("sigmas", sigmas, 1e-6, math.inf)
        _check("window", window, 4, math.inf)
        self.sigmas, self.window = sigmas, window
        self._past: tuple[deque[float], deque[float]] = (deque(maxlen=window), deque(maxlen=window))

    def __call__(self, gradients: Sequence[Tensor], loss: float) -> bool:
        """Say whether the step is to be taken; the gradients stay as they are."""
        values = (loss, _norm(gradients))
        if not all(map(math.isfinite, values)):
            return False
        usual = all(
            len(past) < self.window // 2 or value <= self._most(past)
            for past, value in zip(self._past, values, strict=True)
        )
        for past, value in zip(self._past, values, strict=True):
            past.append(value)
        return usual

    def _most(self, past: Sequence[float]) -> float:
        deviation, mean = torch.std_mean(torch.tensor(past, dtype=torch.float64))
        return float(mean + self.sigmas * deviation)


class _Adam(torch.optim.Optimizer):
    """AdamW's moments in the parameters' dtype; a subclass says what becomes of them."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        _check("lr", lr, 0.0, math.inf)
        for beta in betas:
            _check("betas", beta, 0.0, 1.0 - 1e-9)
        _check("eps", eps, 0.0, math.inf)
        _check("weight_decay", weight_decay, 0.0, math.inf)
        groups = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, groups)
        self.taken = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: must be ``None``.

        Raises:
            ValueError: a closure is given.
        """
        if closure is not None:
            raise ValueError(f"{type(self).__name__} takes no closure: call backward() before")
        self.taken += 1
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    state = self.state[weight]
                    if not state:
                        state["exp_avg"] = torch.zeros_like(weight)
                        state["exp_avg_sq"] = torch.zeros_like(weight)
                    self._update(weight, weight.grad, state, group)

    def _update(self, weight: Tensor, g: Tensor, state: Any, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def _moments(self, g: Tensor, state: Any, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Take the gradient in, and return m and v with their bias corrected."""
        first, second = group["betas"]
        m = state["exp_avg"].lerp_(g, 1 - first)
        v = state["exp_avg_sq"].mul_(second).addcmul_(g, g, value=1 - second)
        return m / (1 - first**self.taken), v / (1 - second**self.taken)


class SPAM(_Adam):
    r"""AdamW whose moments are forgotten at intervals, and whose spikes are clipped entry by entry.

    At every ``interval``-th step m and v become 0, and the learning rate is multiplied by

        w(n) = 1 - (1 + cos(pi n / warmup)) / 2     n = steps since then, 1 from ``warmup`` on

    Before the moments take a gradient in, an entry whose square exceeds ``theta`` times its second
    moment is a spike:

        g <- sign(g) sqrt(theta v)      if g^2 > theta v

    As in the authors' program the clipping waits until v holds enough gradients after the start and
    after each reset, ``warmup`` steps here and 20 there, the bias correction counts all steps, and
    the weight decay is not multiplied by w. Ours: the sparse momentum is left out.

    Args:
        params: parameters.
        lr: learning rate.
        betas: of the moments.
        eps: of the denominator.
        weight_decay: decoupled.
        theta: above 0; 5000 in the paper.
        interval: steps, at least 1; 500 in the paper.
        warmup: steps, below ``interval``; 150 in the paper.

    Raises:
        ValueError: a setting is outside its range.

    Example:
        >>> weight = torch.zeros(1, requires_grad=True)
        >>> optimizer = SPAM([weight], lr=0.1, theta=4.0, interval=50, warmup=1)
        >>> for gradient in (1.0, 100.0):
        ...     weight.grad = torch.tensor([gradient])
        ...     optimizer.step()
        >>> weight.grad  # v was 0.001, of which the bias is not corrected
        tensor([0.0632])

    References:
        Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training",
        arXiv:2501.06842.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        theta: float = 5000.0,
        interval: int = 80,
        warmup: int = 15,
    ) -> None:
        _check("theta", theta, 1e-6, math.inf)
        _check("interval", interval, 1, math.inf)
        _check("warmup", warmup, 0, interval - 1)
        super().__init__(params, lr, betas, eps, weight_decay)
        self.theta, self.interval, self.warmup = theta, interval, warmup

    def factor(self) -> float:
        """What the learning rate of the step in work is multiplied by."""
        since = self.taken % self.interval
        if self.taken < self.interval or since >= self.warmup:
            return 1.0
        return 1 - (1 + math.cos(math.pi * since / self.warmup)) / 2

    def _update(self, weight: Tensor, g: Tensor, state: Any, group: dict[str, Any]) -> None:
        since = self.taken % self.interval
        if since == 0:
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
        elif since > self.warmup:
            most = state["exp_avg_sq"].mul(self.theta).sqrt_()
            g.copy_(torch.minimum(g.abs(), most).copysign_(g))
        m, v = self._moments(g, state, group)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.addcdiv_(m, v.sqrt_().add_(group["eps"]), value=-group["lr"] * self.factor())


class StableAdamW(_Adam):
    r"""AdamW that takes smaller steps in a tensor whose second moment lags behind its gradient.

        RMS = sqrt(mean(g^2 / max(v^, eps^2)))      over the entries of a tensor
        lr' = lr / max(1, RMS)

    lr' takes the place of lr in the update and in the weight decay. v^ is the second moment with
    this gradient in it, its bias corrected.

    Args:
        params: parameters.
        lr: learning rate.
        betas: of the moments.
        eps: of the denominator.
        weight_decay: decoupled.

    Raises:
        ValueError: a setting is outside its range.

    Example:
        >>> weight = torch.zeros(1, requires_grad=True)
        >>> optimizer = StableAdamW([weight], lr=0.1, betas=(0.0, 0.5))
        >>> weight.grad = torch.tensor([3.0])
        >>> optimizer.step()
        >>> weight.detach()  # the first v^ is g^2: RMS is 1
        tensor([-0.1000])

    References:
        Wortsman et al., "Stable and low-precision training for large-scale vision-language models",
        arXiv:2304.13013.
    """

    def _update(self, weight: Tensor, g: Tensor, state: Any, group: dict[str, Any]) -> None:
        m, v = self._moments(g, state, group)
        least = torch.full_like(v, group["eps"] ** 2)
        rms = float((g.square() / torch.maximum(v, least)).float().mean().sqrt())
        # A RMS that is not finite comes of a gradient that is not: the weights shall show it.
        rate = group["lr"] / (max(1.0, rms) if math.isfinite(rms) else 1.0)
        weight.mul_(1 - rate * group["weight_decay"])
        weight.addcdiv_(m, v.sqrt_().add_(group["eps"]), value=-rate)


RULES: dict[str, Callable[..., Rule]] = {"zclip": ZClip, "adagc": AdaGC, "skip": SkipStep}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "spam": SPAM, "stableadamw": StableAdamW,
}  # fmt: skip
