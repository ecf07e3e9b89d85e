"""At which share of a training a loss is reached: the one interpolation of all comparisons.

Only cooled models are held against each other. A trunk has cooled branches at several shares of the
steps, or of the operations, of the model that it is compared with; its *share at equal loss* is
where the losses of its branches cross that model's. Between two neighbouring branches the loss is
taken as linear in the logarithm of the share:

    log s* = log s_a + (L_a - L) / (L_a - L_b) (log s_b - log s_a),     L_a > L >= L_b,  s_a < s_b

Where the losses do not fall everywhere the last crossing counts: every branch behind it is at or
below the level. What lies outside the branches is not extrapolated but said as a bound.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from common.statistics import Estimate, Interval

__all__ = ["ABOVE", "AT_MOST", "EXACT", "Bounded", "equal_share", "mean_of"]

EXACT, AT_MOST, ABOVE = "", "at most", "above"


@dataclass(frozen=True)
class Bounded:
    """A number of which perhaps only a bound is known; ``f"{number:.2f}"`` shows it with that.

    Args:
        value: the number, or its bound.
        bound: ``EXACT``, or the words before a bound, such as ``AT_MOST`` and ``ABOVE``.
        interval: 95 % t interval of a mean over seeds; ``None`` for one seed, and for a bound.
    """

    value: float
    bound: str = EXACT
    interval: Interval | None = None

    def __format__(self, form: str) -> str:
        shown = f"{Estimate(self.value, self.interval, ()):{form}}"
        return f"{self.bound} {shown}" if self.bound else shown


def equal_share(points: Sequence[tuple[float, float]], level: float) -> Bounded:
    """The share at which the loss equals a level.

    The result is ``AT_MOST`` the smallest share if that is below the level already, and ``ABOVE``
    the largest if that does not reach it.

    Args:
        points: share, > 0, and loss of each cooled branch, in any order; a loss that is not finite
            is one that diverged, and is above every level.
        level: loss to reach, finite.

    Raises:
        ValueError: there is no point, a share is not positive or is there twice, or the level is
            not finite.

    Example:
        >>> branches = [(0.1, 2.4), (0.2, 2.2), (0.4, 2.0)]
        >>> f"{equal_share(branches, 2.1):.3f}", f"{equal_share(branches, 2.5):.2f}"
        ('0.283', 'at most 0.10')
        >>> f"{equal_share(branches, 1.9):.2f}"
        'above 0.40'
    """
    if not math.isfinite(level):
        raise ValueError(f"the level must be finite, got {level}: its model diverged")
    ordered = sorted(points)
    shares = [share for share, _ in ordered]
    if not shares or not all(0 < share < math.inf for share in shares):
        raise ValueError(f"there must be branches, all at positive shares, got {shares}")
    if len(set(shares)) < len(shares):
        raise ValueError(f"a share stands there twice: {shares}")
    losses = [loss if math.isfinite(loss) else math.inf for _, loss in ordered]
    above = [k for k, loss in enumerate(losses) if loss > level]
    if not above:
        return Bounded(shares[0], EXACT if losses[0] == level else AT_MOST)
    before, after = above[-1], above[-1] + 1
    if after == len(shares):
        return Bounded(shares[-1], ABOVE)
    if losses[before] == math.inf:  # the way down from there is not known
        return Bounded(shares[after], AT_MOST)
    part = (losses[before] - level) / (losses[before] - losses[after])
    return Bounded(shares[before] * (shares[after] / shares[before]) ** part)


def mean_of(numbers: Sequence[Bounded]) -> Bounded | None:
    """The mean over seeds: a bound if that of any seed is one, ``None`` if they bound both sides.

    Args:
        numbers: one a seed, at least one.

    Example:
        >>> f"{mean_of([Bounded(0.3), Bounded(0.4, ABOVE)]):.2f}"
        'above 0.35'
        >>> mean_of([Bounded(0.3, AT_MOST), Bounded(0.4, ABOVE)]) is None
        True
    """
    bounds = {number.bound for number in numbers} - {EXACT}
    if len(bounds) > 1:
        return None
    found = Estimate.of([number.value for number in numbers])
    return (
        Bounded(found.mean, bounds.pop()) if bounds else Bounded(found.mean, EXACT, found.interval)
    )
