r"""How strong a penalty is: by schedule, by layer, or in proportion to the task's gradient.

    schedule   gamma_t = gamma_0 (1 - t / T)^p
    layer      factor_l = mean_m tr(Omega_m) / tr(Omega_l)
    ratio      lambda* = rho ||g_task|| / ||g_penalty||,   g_penalty at strength 1
               log lambda <- s log lambda + (1 - s) log clamp(lambda*, low, high)

The mean of the logarithm, because a strength is a scale: a target that is off by the factor 10
upwards and then downwards leaves it where it was.
"""

import math
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ars.penalty import LARGEST_STRENGTH, what_to_pass
from ars.regularizers.fisher.diagonal import DiagonalFisher
from ars.regularizers.fisher.estimators import accumulation_dtype
from ars.regularizers.penalties.penalty_base import check_state, checked_strength, importance_of
from ars.regularizers.storage import dequantize
from ars.sharded import is_sharded, part_of, sum_of_parts, with_part

__all__ = ["AdaptiveStrength", "factor_of", "layer_factors", "trace_strengths"]


class AdaptiveStrength:
    r"""Strength of a penalty that follows a schedule, the gradients, or both.

    .. math:: \lambda_t = \bar\lambda_t \, (1 - t/T)^p, \qquad
              \bar\lambda \leftarrow \bar\lambda^{\,s} \,
              \mathrm{clamp}\big(\rho \|g\| / \|g_E\|,\, \text{low},\, \text{high}\big)^{1-s}

    :math:`g` is the task's gradient and :math:`g_E` the penalty's at strength 1, both over the
    penalised parameters; where either is 0 or not finite, :math:`\bar\lambda` stays. Without
    ``ratio`` it is the initial strength, without ``total_steps`` the schedule is 1. For strengths
    by layer see :func:`trace_strengths`.

    The strength is a 0-d float32 tensor on the parameters' device, which the penalty and the
    optimizer read where it is: nothing waits for the device. A step with ``ratio`` reads parameter,
    anchor, importance and gradient once more; to spare that, call it every few steps only.

    Args:
        penalty: An :class:`EWC`, a :class:`SubspacePenalty`, or an object with the same members.
            Its ``strength`` becomes the tensor; what it was is the initial one.
        total_steps: T, >= 1: after as many steps the strength is 0.
        power: p > 0 of the schedule.
        ratio: rho > 0, the norm of the penalty's gradient relative to the task's to aim at.
        smoothing: s in [0, 1), the weight of the past.
        bounds: The smallest and the largest :math:`\bar\lambda` that ``ratio`` may lead to,
            0 < low <= high, at most 1e38.

    Raises:
        TypeError: ``penalty`` has not one strength.
        ValueError: Neither ``total_steps`` nor ``ratio``, or an argument out of its range.

    Example:
        >>> import torch
        >>> from ars.regularizers import EWC, AdaptiveStrength
        >>> model = torch.nn.Linear(2, 1)
        >>> penalty = EWC(model, {"weight": torch.ones(1, 2)}, strength=8.0)
        >>> adaptive = AdaptiveStrength(penalty, total_steps=4, power=2.0)
        >>> for _ in range(5):
        ...     adaptive.step()
        ...     print(penalty.strength.item())
        8.0
        4.5
        2.0
        0.5
        0.0
    """

    def __init__(
        self,
        penalty: Any,
        *,
        total_steps: int | None = None,
        power: float = 1.0,
        ratio: float | None = None,
        smoothing: float = 0.95,
        bounds: tuple[float, float] = (1e-3, 1e6),
    ) -> None:
        has_both = hasattr(penalty, "strength") and hasattr(penalty, "terms")
        if isinstance(penalty, type) or not has_both:
            several = isinstance(penalty, (list, tuple, set))
            remedy = "make one for each penalty" if several else what_to_pass(penalty)
            raise TypeError(
                f"penalty {type(penalty).__name__} has no strength or no terms(): {remedy}"
            )
        if hasattr(penalty, "subspace"):
            raise TypeError(
                f"penalty {type(penalty).__name__} has two strengths; adapt its .ewc, its "
                ".subspace, or each by an AdaptiveStrength of its own"
            )
        if total_steps is None and ratio is None:
            raise ValueError("give total_steps for a schedule, ratio to follow the gradients")
        if total_steps is not None and (not isinstance(total_steps, int) or total_steps < 1):
            raise ValueError(f"total_steps must be an integer >= 1, got {total_steps!r}")
        if not 0 < power < math.inf:
            raise ValueError(f"power must be finite and > 0, got {power!r}")
        if ratio is not None and not 0 < ratio < math.inf:
            raise ValueError(f"ratio must be finite and > 0, got {ratio!r}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {smoothing!r}")
        low, high = _checked_bounds(bounds)
        initial = float(penalty.strength)
        if ratio is not None and not low <= initial <= high:
            raise ValueError(
                f"the penalty's strength {initial} is outside bounds={bounds!r}; start inside them"
            )
        self.penalty = penalty
        self.total_steps, self.power, self.ratio = total_steps, power, ratio
        self.smoothing, self.bounds = smoothing, (float(low), float(high))
        self.steps = 0
        device = _penalised(penalty)[0].device
        self._level = torch.tensor(initial, device=device, dtype=torch.float32)
        self.strength = self._level.clone()
        penalty.strength = self.strength

    @torch.no_grad()
    def step(self, grad_norm: Tensor | None = None) -> None:
        """Set the strength of the next optimizer step; call it after the backward pass.

        Args:
            grad_norm: Norm of the task's gradient, 0-d, for ``ratio``; by default that of the
                penalised parameters' ``grad``, which must then be of the task loss alone (as it is
                when the optimizer applies the penalty).
        """
        if self.ratio is not None:
            norm = self._grad_norm() if grad_norm is None else grad_norm.to(self._level)
            self._update_level(self.ratio * norm / self._unit_norm())
        factor = 1.0
        if self.total_steps is not None:
            left = max(0, self.total_steps - self.steps)
            factor = (left / self.total_steps) ** self.power
        torch.mul(self._level, factor, out=self.strength)
        # A state loaded into the penalty has put a number in its place.
        self.penalty.strength = self.strength
        self.steps += 1

    def _update_level(self, target: Tensor) -> None:
        valid = target.isfinite() & (target > 0)
        log = self._level.log() * self.smoothing
        log += (1 - self.smoothing) * target.clamp(*self.bounds).log()
        self._level.copy_(torch.where(valid, log.exp().clamp(*self.bounds), self._level))

    def _grad_norm(self) -> Tensor:
        return self._norm([p.grad for p in _penalised(self.penalty) if p.grad is not None])

    def _unit_norm(self) -> Tensor:
        """Norm of the penalty's gradient at strength 1."""
        pulls = []
        for param, anchor, importance, *scale in self.penalty.terms():
            theta, start, omega = map(part_of, (param, anchor, importance))
            omega = dequantize(omega, *scale) if scale else omega
            pulls.append(self._norm([with_part((theta - start) * omega, param)]))
        if hasattr(self.penalty, "gradients"):
            self.penalty.refresh()  # fills the buffers, with the strength in them
            buffers = [buffer for _, buffer in self.penalty.gradients()]
            pulls.append(self._norm(buffers) / self.strength)
        return self._norm(pulls)

    def _norm(self, tensors: list[Tensor]) -> Tensor:
        # In float32 at least: the squares of half-precision gradients overflow.
        norms = [
            torch.linalg.vector_norm(part_of(t), dtype=accumulation_dtype(t.dtype)).to(self._level)
            for t in tensors
        ]
        if not norms:
            return torch.zeros_like(self._level)
        if any(map(is_sharded, tensors)):
            return sum_of_parts([norm.double().square() for norm in norms], tensors).sqrt().float()
        return torch.linalg.vector_norm(torch.stack(norms))

    def state_dict(self) -> dict[str, Any]:
        """Steps taken, the smoothed strength and the one in force, as numbers."""
        level, strength = float(self._level), float(self.strength)
        return {"steps": self.steps, "level": level, "strength": strength}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, in the same tensor.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            TypeError: An entry is not a number. Nothing has changed then.
            ValueError: An entry is missing or out of range. Nothing has changed then.
        """
        check_state("an AdaptiveStrength", state, {"steps", "level", "strength"}, set(), {})
        steps = state["steps"]
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"steps must be an integer >= 0, got {steps!r}")
        level, strength = checked_strength(state["level"]), checked_strength(state["strength"])
        self.steps = steps
        self._level.copy_(torch.as_tensor(level))
        self.strength.copy_(torch.as_tensor(strength))


def _penalised(penalty: Any) -> list[Tensor]:
    pairs = [*penalty.terms(), *(penalty.gradients() if hasattr(penalty, "gradients") else ())]
    return list(dict.fromkeys(pair[0] for pair in pairs))


def _checked_bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    low, high = bounds
    if not 0 < low <= high <= LARGEST_STRENGTH:
        raise ValueError(
            f"bounds must be 0 < low <= high, finite, at most {LARGEST_STRENGTH:g}, got {bounds!r}"
        )
    return low, high


def trace_strengths(
    fisher: DiagonalFisher | Mapping[str, Tensor],
    *,
    bounds: tuple[float, float] = (1e-2, 1e2),
) -> dict[str, float]:
    r"""Strengths by parameter that give each the same total importance.

    .. math:: f_l = \operatorname{mean}_m \operatorname{tr}(\Omega_m) / \operatorname{tr}(\Omega_l)

    For ``EWC(..., layer_strengths=trace_strengths(fisher))``: the Fisher of one layer is often
    orders of magnitude above another's, and one lambda then holds the first and not the second.

    Args:
        fisher: A fitted Fisher, or importances by parameter name.
        bounds: The smallest and the largest factor, 0 < low <= high, finite.

    Returns:
        The factor of each parameter; 1 where the importance is 0.

    Raises:
        ValueError: ``fisher`` is not fitted or empty, or ``bounds`` out of range.

    Example:
        >>> import torch
        >>> from ars.regularizers import trace_strengths
        >>> trace_strengths({"a": torch.ones(3), "b": torch.ones(1), "c": torch.zeros(1)})
        {'a': 0.444..., 'b': 1.333..., 'c': 1.0}
    """
    low, high = _checked_bounds(bounds)
    traces = {
        name: float(sum_of_parts([part_of(omega).sum(dtype=torch.float64)], [omega]))
        for name, omega in importance_of(fisher).items()
    }
    mean = sum(traces.values()) / len(traces)
    return {
        name: min(max(mean / trace, low), high) if trace > 0 else 1.0
        for name, trace in traces.items()
    }


def layer_factors(
    strengths: Mapping[str, float] | None, names: Collection[str]
) -> dict[str, float]:
    """Resolve factors given by name or pattern to one for each parameter.

    Args:
        strengths: Finite factors >= 0 by parameter name or shell pattern.
        names: The parameters.

    Returns:
        For each name the factor given for it, else that of the first pattern it matches, else 1.

    Raises:
        TypeError: Not a mapping, or a factor is not a number.
        ValueError: A factor is negative or not finite, or a key matches nothing.
    """
    if strengths is None:
        strengths = {}
    if not isinstance(strengths, Mapping):
        raise TypeError(
            "layer_strengths must be a mapping from name or pattern to number, "
            f"got {type(strengths).__name__}"
        )
    for key, factor in strengths.items():
        if isinstance(factor, bool) or not isinstance(factor, Real):
            raise TypeError(f"layer_strengths[{key!r}] must be a number, got {factor!r}")
        checked_strength(factor, f"layer_strengths[{key!r}]")
        if key not in names and not any(fnmatchcase(name, key) for name in names):
            raise ValueError(
                f"layer_strengths[{key!r}] matches none of the penalised parameters {list(names)}"
            )
    return {name: factor_of(strengths, name) for name in names}


def factor_of(strengths: Mapping[str, float], name: str) -> float:
    """Return the factor of one parameter.

    Args:
        strengths: Factors by parameter name or shell pattern.
        name: The parameter's.

    Returns:
        What is given for the name, else for the first pattern that it matches, else 1.
    """
    if name not in strengths:
        name = next((pattern for pattern in strengths if fnmatchcase(name, pattern)), name)
    return float(strengths.get(name, 1.0))
