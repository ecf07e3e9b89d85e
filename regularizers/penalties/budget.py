r"""The strength of a penalty from what may be lost: measured on a few samples of the old task.

    r = rise / B,                     rise = loss_old(theta) - loss_old at the start
    log F <- log F + k clamp(log r, -1, log 4)
    lambda = lambda_0 F clamp(r, 1/4, 4)^2

The integral F finds the strength that holds the rise at the budget B, over orders of magnitude; the
square of r answers at once and damps.

The rise is measured and not read off the penalty: its quadratic model of the old loss is far too
small once the weights have moved along directions that it thinks cheap (docs/regularizers.md).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ars.penalty import LARGEST_STRENGTH, what_to_pass
from ars.regularizers.penalties.penalty_base import check_state, checked_strength

__all__ = ["LossBudget"]

_MOST = 4.0  # of rise over budget, and its inverse, that the strength answers to at once


class LossBudget:
    r"""Chooses a penalty's strength so that the old loss rises by about a given amount.

    Every ``every`` steps it measures the old loss on samples that you kept, and

    .. math:: r = \frac{L_\text{old}(\theta) - L_\text{old}(\theta_0)}{B}, \qquad
              \log F \leftarrow \log F + k \, \mathrm{clamp}(\log r, -1, \log 4), \qquad
              \lambda = \lambda_0 F \, \mathrm{clamp}(r, \tfrac14, 4)^2

    with :math:`\theta_0` the model as it is now, :math:`\lambda_0` the strength that the penalty
    has now, and a rise of 0 or less taken as the least. Once the rise has reached the budget it
    stays about there, and the strength is what that takes. :math:`\lambda_0` need not be good, but
    what is far too weak takes measurements to correct, and the old loss is above the budget
    meanwhile: give a run some dozens of measurements.

    The strength is a 0-d float32 tensor on the device of the loss, which the penalty and the
    optimizer read where it is: nothing waits for the device. A measurement costs a forward pass of
    the samples that are kept. In several processes measure the same samples in each, or average
    the loss over them: each must get the same number.

    Args:
        penalty: An :class:`EWC`, a :class:`KroneckerPenalty`, a :class:`SubspacePenalty`, or a
            :class:`ProgressiveInheritance`, whose two strengths keep their ratio.
        measure: Called without arguments and without gradients; returns the old loss, 0-d and
            finite: of the same samples every time, some dozens, held out or not.
        budget: B > 0, by how much the loss may rise, in its own unit.
        every: Steps between two measurements, >= 1.
        gain: k > 0. Smaller is smoother; larger is faster.
        bounds: The smallest and the largest F, 0 < low <= 1 <= high, finite. A small one lets the
            strength fall far while nothing is lost yet, from where it must rise again.

    Raises:
        TypeError: ``penalty`` is no penalty, or ``measure`` not callable or returns no 0-d tensor.
        ValueError: An argument is out of its range, a strength is 0, or the loss is not finite.

    Example:
        >>> import torch
        >>> from ars import ARSAdamW
        >>> from ars.regularizers import EWC, LossBudget
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(1.0)
        >>> penalty = EWC(model, {"weight": torch.ones(1, 1)}, strength=1.0)
        >>> budget = LossBudget(
        ...     penalty, lambda: (model.weight - 1).square().sum(), budget=0.25, every=5
        ... )
        >>> opt = ARSAdamW(model.parameters(), lr=0.01, weight_decay=0, ars=None, penalty=penalty)
        >>> for _ in range(500):
        ...     opt.zero_grad()
        ...     (model.weight - 9).square().sum().backward()  # the new task wants 9, the old one 1
        ...     budget.step()
        ...     _ = opt.step()
        >>> round((model.weight - 1).square().item(), 2)
        0.25
    """

    def __init__(
        self,
        penalty: Any,
        measure: Callable[[], Tensor],
        budget: float,
        *,
        every: int = 10,
        gain: float = 0.3,
        bounds: tuple[float, float] = (1e-3, 1e6),
    ) -> None:
        self._parts = _parts_of(penalty)
        if not callable(measure):
            raise TypeError(f"measure must be callable, got {type(measure).__name__}")
        for name, value in (("budget", budget), ("gain", gain)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be finite and > 0, got {value!r}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be an integer >= 1, got {every!r}")
        low, high = bounds
        if not 0 < low <= 1 <= high < math.inf:
            raise ValueError(f"bounds must be 0 < low <= 1 <= high, finite, got {bounds!r}")
        self._initial = [float(part.strength) for part in self._parts]
        if not all(value > 0 for value in self._initial):
            raise ValueError("the penalty's strength is 0, which no factor changes: begin with 1")
        if max(self._initial) * high * _MOST**2 > LARGEST_STRENGTH:
            raise ValueError(f"bounds lead to a strength above {LARGEST_STRENGTH:g}: lower them")
        self.penalty, self.budget, self.every, self.gain = penalty, float(budget), every, gain
        self.bounds = (float(low), float(high))
        self.steps = 0
        self._measure = measure
        self._start = self._measured()
        if not bool(self._start.isfinite()):
            raise ValueError(f"measure returned {float(self._start)}: the old loss must be finite")
        self.factor = torch.ones_like(self._start)
        self.rise = torch.zeros_like(self._start)
        self._strengths = [torch.full_like(self._start, value) for value in self._initial]
        self._set()

    @torch.no_grad()
    def step(self) -> None:
        """Set the strength of the next optimizer step; call it once before each."""
        if self.steps and self.steps % self.every == 0:
            self.rise.copy_(self._measured() - self._start)
            change = self._ratio().clamp(math.exp(-1), _MOST).log() * self.gain
            self.factor.mul_(change.exp()).clamp_(*self.bounds)
            self._choose()
        self._set()
        self.steps += 1

    def _ratio(self) -> Tensor:
        # NaN is a loss that has exploded: as infinite, the penalty gets stronger.
        return torch.nan_to_num(self.rise / self.budget, nan=torch.inf)

    def _choose(self) -> None:
        factor = self.factor * self._ratio().clamp(1 / _MOST, _MOST).square()
        for strength, initial in zip(self._strengths, self._initial, strict=True):
            torch.mul(factor, initial, out=strength)

    def _set(self) -> None:
        # Each time: a state loaded into the penalty has put a number in its place.
        for part, strength in zip(self._parts, self._strengths, strict=True):
            part.strength = strength

    @torch.no_grad()
    def _measured(self) -> Tensor:
        loss = self._measure()
        if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
            what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"measure must return a 0-d floating-point tensor, got {what}")
        return loss.detach().to(torch.float32)

    def state_dict(self) -> dict[str, Any]:
        """Steps taken, the old loss at the start, its last rise and the factor, as numbers."""
        return {
            "steps": self.steps,
            "start": float(self._start),
            "rise": float(self.rise),
            "factor": float(self.factor),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, in the same tensors; the budget is of the old start.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            TypeError: An entry is not a number. Nothing has changed then.
            ValueError: An entry is missing or out of range. Nothing has changed then.
        """
        check_state("a LossBudget", state, {"steps", "start", "rise", "factor"}, set(), {})
        steps = state["steps"]
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"steps must be an integer >= 0, got {steps!r}")
        for name in ("start", "rise"):
            if not isinstance(state[name], (int, float)) or isinstance(state[name], bool):
                raise TypeError(f"{name} must be a number, got {state[name]!r}")
        if not math.isfinite(state["start"]):
            raise ValueError(f"start must be finite, got {state['start']!r}")
        factor = float(checked_strength(state["factor"], "factor"))
        if not self.bounds[0] * 0.999 <= factor <= self.bounds[1] * 1.001:
            raise ValueError(f"factor {factor} is outside bounds={self.bounds!r}")
        self.steps = steps
        self._start.fill_(state["start"])
        self.rise.fill_(state["rise"])
        self.factor.fill_(factor)
        if steps > self.every:  # before, nothing has been measured
            self._choose()
        self._set()


def _parts_of(penalty: Any) -> list[Any]:
    """The penalty, or the two that it is made of.

    Raises:
        TypeError: it is no penalty.
    """
    if isinstance(penalty, type) or not (
        hasattr(penalty, "strength") and hasattr(penalty, "terms")
    ):
        raise TypeError(
            f"penalty {type(penalty).__name__} has no strength or no terms(): "
            + what_to_pass(penalty)
        )
    both = hasattr(penalty, "ewc") and hasattr(penalty, "subspace")
    return [penalty.ewc, penalty.subspace] if both else [penalty]
