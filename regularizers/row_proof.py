r"""Whether each row of a layer's output gradient belongs to the sample it is taken for.

The gradient g_r of a row is linear in the cotangents v_n that the samples' logits send backwards.
If row r depends on sample n alone, weighting the samples weights the row likewise,

    g_r(w_1 v_1, ..., w_N v_N) = w_n g_r(v_1, ..., v_N)        for all v and w,

and if it depends on another, or on several, this fails for almost all v and w. Two backward passes
of random v, each with weights of its own, are compared row by row. The weights are powers of two,
so that a right row's two gradients are equal to the last bit, however small and noisy they are.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ars.regularizers.estimators import accumulation_dtype

__all__ = ["Evidence", "RowProof"]

# The two weights of a sample differ by up to 2^30 either way; by 2^6 where float16 would overflow.
RANGE, FLOAT16_RANGE = 30, 6
# Wrong rows are off by a factor of two and more, but for such as several samples share; a GPU's
# atomic additions come in any order, which is noise of a few roundings of the largest row.
SLACK, ROUNDINGS, MOST_NOISE = 0.05, 32, 2.0**-7


class Evidence(NamedTuple):
    """What two passes have shown.

    Args:
        misplaced: Number of a layer with a row of another sample, or None.
        finite: Whether all gradients are.
        seen: Which samples have reached which layers, a flat Boolean tensor on the CPU.
    """

    misplaced: int | None
    finite: bool
    seen: Tensor


class RowProof:
    """Two weighted backward passes.

    Args:
        logits: (N, ...).
        generator: Of the logits' device.
        float16: Whether any gradient is in float16.
    """

    def __init__(self, logits: Tensor, generator: torch.Generator, *, float16: bool) -> None:
        samples, device = len(logits), logits.device
        span = FLOAT16_RANGE if float16 else RANGE
        steps = torch.linspace(-span, span, samples).round()
        order = torch.randperm(samples, generator=generator, device=device).cpu()
        exponents = torch.stack((steps, -steps))[:, order].clamp(min=0).tolist()
        # Formed by Python, exactly.
        powers = torch.tensor([[2.0**k for k in row] for row in exponents], dtype=torch.float64)
        self._weights = powers.to(device, accumulation_dtype(logits.dtype))
        size, dtype = logits.shape, self._weights.dtype
        self._cotangent = torch.randn(size, generator=generator, device=device, dtype=dtype)
        self._dtype = logits.dtype
        self._norms: tuple[dict[int, Tensor], ...] = ({}, {})
        self._noise: dict[int, tuple[float, float]] = {}
        self._now = self._norms[0]

    def cotangents(self) -> Iterator[Tensor]:
        """Yield those of the logits; call :meth:`add` for every layer before the next."""
        for norms, weights in zip(self._norms, self._weights, strict=True):
            self._now = norms
            shape = (-1, *[1] * (self._cotangent.ndim - 1))
            yield (self._cotangent * weights.view(shape)).to(self._dtype)

    def add(self, number: int, gradient: Tensor) -> None:
        """Note the gradient of a layer's output.

        Args:
            number: Of the layer's call, the same in both passes.
            gradient: (N, ..., width), the samples in front; a row is ``width`` numbers.
        """
        dtype = accumulation_dtype(gradient.dtype)
        self._now[number] = torch.linalg.vector_norm(gradient, 1, -1, dtype=dtype)
        info = torch.finfo(gradient.dtype)
        # Below the normal numbers, rounding is absolute.
        smallest = gradient.shape[-1] * info.smallest_normal * info.eps
        self._noise[number] = min(ROUNDINGS * info.eps, MOST_NOISE), smallest

    def evidence(self) -> Evidence:
        """Compare the two passes."""
        first, second = self._norms
        both = sorted(first.keys() & second.keys())
        if not both:
            return Evidence(None, finite=True, seen=torch.ones(0, dtype=torch.bool))
        wrong, finite, seen = [], [], []
        for number in both:
            a, b = (
                norms[number].flatten(1) / weights[:, None]
                for norms, weights in zip(self._norms, self._weights, strict=True)
            )
            relative, absolute = self._noise[number]
            bound = SLACK * b + relative * b.amax(1, keepdim=True) + absolute
            wrong.append(((a - b).abs() > bound).any())
            finite.append((a.isfinite() & b.isfinite()).all())
            seen.append(b.any(1))
        flags = torch.stack((*wrong, torch.stack(finite).all())).cpu()
        misplaced = next((n for n, is_wrong in zip(both, flags, strict=False) if is_wrong), None)
        return Evidence(misplaced, finite=bool(flags[-1]), seen=torch.cat(seen).cpu())
