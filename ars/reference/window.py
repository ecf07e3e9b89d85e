"""A window of past surprises: the ring buffer, its trend and its lag-1 autocorrelation."""

import functools
import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ars.reference.scalars import Scalar, at_least, at_most, choose, is_host, read

__all__ = [
    "ERROR_FLOOR", "MIN_HISTORY", "RELATIVE_NOISE_FLOOR", "Count", "autocorrelation", "divisor",
    "oldest_first", "remember_", "trend",
]  # fmt: skip

# A number of values: on the device, or an int where reading it waits for nothing.
Count: TypeAlias = int | Tensor

# Variation below this share of a window's largest value is rounding, not signal.
RELATIVE_NOISE_FLOOR = 1e-12
# A trend line and its deviation mean nothing over fewer values than this.
MIN_HISTORY = 10
# Least error of a prediction, relative to it, so that a constant signal does not divide by 0.
ERROR_FLOOR = 1e-6


def remember_(window: Tensor, counts: Tensor, value: Scalar, finite: Any) -> None:
    """Write a finite surprise over the oldest one, and count."""
    if isinstance(value, Tensor):
        slot = (counts[0] % window.numel()).unsqueeze(0)
        window.scatter_(0, slot, torch.where(finite, value, window.gather(0, slot)))
        counts += torch.stack((finite.to(torch.int64), torch.ones_like(counts[1])))
        return
    if finite:
        window[counts[0] % window.numel()] = value
    counts += _taken(finite)


@functools.cache
def _taken(finite: bool) -> Tensor:
    return torch.tensor([int(finite), 1], device="cpu")


def oldest_first(window: Tensor, count: Tensor) -> tuple[Tensor, Count]:
    """Return the ring buffer in order of age, and how many values are valid.

    Entry ``count % W`` of the ring is written next, so with n valid values the oldest is at
    ``(count - n) % W``. On a CPU the values are exactly the valid ones and n is an int; elsewhere,
    where reading n would wait for the device, there are W values and the unwritten ones are 0.
    """
    size = window.numel()
    if is_host(window):
        written = int(count)
        oldest = written % size if written > size else 0
        return torch.cat((window[oldest:], window[:oldest]))[:written], min(written, size)
    age = torch.arange(size, device=window.device)
    valid = count.clamp(max=size)
    ordered = window[(count - valid + age) % size]
    return torch.where(age < valid, ordered, 0.0), valid


def _used(values: Tensor, valid: Count) -> Tensor | None:
    """Return which values count, or None if all do."""
    if isinstance(valid, int):
        return None
    return torch.arange(values.numel(), device=values.device) < valid


def _masked(values: Tensor, used: Tensor | None) -> Tensor:
    """Set what does not count to 0."""
    return values if used is None else torch.where(used, values, 0.0)


def divisor(count: Count) -> Any:
    """Return a count to divide by, at least 1."""
    if isinstance(count, int):
        return max(count, 1)
    return count.clamp(min=1).to(torch.float64)  # int64 would divide in float32


def autocorrelation(values: Tensor, valid: Count, scale: Scalar) -> Scalar:
    r"""Lag-1 autocorrelation ``rho = corr(H[:-1], H[1:])`` (eq. 1), 0 while it is undefined.

    Pearson's correlation of the pairs of successive values. It is undefined with fewer than two
    pairs, when either side's standard deviation is within 1e-12 of ``scale``: rounding, or when a
    variance overflows.

    Args:
        values: The window oldest first, shape (W,).
        valid: How many leading values count: 0-d, or an int if they all do.
        scale: Magnitude of what the values were computed from, 0-d or a number.

    Returns:
        rho in [-1, 1], a number on a CPU, else 0-d.
    """
    pairs = valid - 1
    if isinstance(pairs, int) and pairs < 2:
        return 0.0
    used = _used(values[1:], pairs)
    n = divisor(pairs)
    # Subtracting the first value makes a constant window vary by exactly 0, whatever its level.
    shifted = values - values[0]
    x, y = _masked(shifted[:-1], used), _masked(shifted[1:], used)
    x = _masked(x - read(x.sum()) / n, used)
    y = _masked(y - read(y.sum()) / n, used)
    xx, yy, xy = read(x.dot(x)), read(y.dot(y)), read(x.dot(y))
    noise = RELATIVE_NOISE_FLOOR * scale
    floor = n * (noise * noise)  # a power of a number would raise where this is infinite
    defined = (xx > floor) & (yy > floor) & (xx + yy < math.inf) & (pairs >= 2)
    rho = xy / choose(defined, xx**0.5 * yy**0.5, 1.0)
    return choose(defined, at_least(at_most(rho, 1.0), -1.0), 0.0)


@functools.lru_cache(maxsize=4)
def _ages(count: int, device: torch.device) -> Tensor:
    """Return the ages of a full window, centred."""
    return torch.arange(count, dtype=torch.float64, device=device) - (count - 1) / 2


def trend(values: Tensor, valid: Count, *, linear: bool) -> tuple[Tensor, Scalar, Scalar]:
    r"""Least-squares trend of a window and what it predicts for the next value.

    With ages ``t_k = k - (n-1)/2`` the line is ``mean + slope t_k``. Its prediction for
    ``t_n = (n+1)/2`` has the standard error ``s sqrt(1 + 1/n + t_n^2 / sum t_k^2)``, with ``s^2``
    the residual variance (the last term only with a slope).

    Args:
        values: The window oldest first, shape (W,).
        valid: How many leading values count: 0-d, or an int if they all do.
        linear: Fit a line; otherwise the mean alone.

    Returns:
        residuals, shape (W,), 0 where nothing counts; the predicted next value and its standard
        error, numbers on a CPU, else 0-d.
    """
    if isinstance(valid, int) and valid == 0:
        return values, 0.0, 0.0
    used = _used(values, valid)
    n = divisor(valid)
    first = read(values[0])
    # As in autocorrelation: a constant window must leave residuals of exactly 0.
    shifted = _masked(values - first, used)
    mean = read(shifted.sum()) / n
    residuals, predicted = shifted - mean, first + mean
    leverage, freedom = 1 + 1 / n, at_least(n - (2 if linear else 1), 1)
    if linear:
        age = _ages(values.numel(), values.device)
        age = age if used is None else _masked(age + (values.numel() - n) / 2, used)
        spread = at_least(n * (n * n - 1) / 12, 0.5)  # the sum of age^2
        slope = read(age.dot(shifted)) / spread
        ahead = (n + 1) / 2
        residuals, predicted = residuals - slope * age, predicted + slope * ahead
        leverage = leverage + ahead * ahead / spread
    residuals = _masked(residuals, used)
    error = (read(residuals.dot(residuals)) / freedom * leverage) ** 0.5
    return residuals, predicted, error
