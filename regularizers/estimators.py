r"""What each Fisher estimator sends backwards from the logits of one sample.

The Fisher information of a categorical output with probabilities p is, per position,

    J^T (diag(p) - p p^T) J,    J = d logits / d theta,

so an estimator is a random (or enumerated) logits cotangent v with E[v v^T] = diag(p) - p p^T:

    sketch           v = sqrt(p) * z - p (sqrt(p) . z),   z uniform in {-1, +1}^C
    mc               v = p - onehot(y),                   y ~ p
    exact            v_c = sqrt(p_c) (onehot(c) - p),     c = 1..C, one backward pass each

Three others put the data's labels in place of the model's and so estimate other quantities:

    empirical        v = p - onehot(target)
    logit_reversal   v = q - onehot(target),              q = softmax(-logits)
    batched          as empirical, but summed over a batch before the square
In sketch and mc the cotangents of different positions are independent with mean zero, which is why
the square of their sum over a sequence is an unbiased estimate of the sum of the squares.

References:
    Kunstner et al., "Limitations of the empirical Fisher approximation for natural gradient
    descent", arXiv:1905.12558.
    van de Ven, "On the computation of the Fisher information in continual learning",
    arXiv:2502.11756.
    "EWC-DR", arXiv:2603.18596 (logit_reversal).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ESTIMATORS",
    "GIVEN",
    "IGNORE_INDEX",
    "Estimator",
    "accumulation_dtype",
    "draw_nothing",
    "sampled_labels",
]

# torch.nn.functional.cross_entropy's default: a target with this value masks its position.
IGNORE_INDEX = -100


class Estimator(NamedTuple):
    """How one estimator draws its randomness and turns it into cotangents.

    ``draw(shape, generator, device)`` returns the random numbers of one sample, ``shape`` being
    (draws, positions, classes). They are drawn sample by sample and outside any batching, so they
    depend only on the samples' order. ``cotangents(logits, labels, noise)`` yields tensors of the
    shape of ``logits``, (..., positions, classes), given labels (..., positions) and the noise of
    one draw; the gradients they pull back are squared and added.
    """

    draw: Callable[[tuple[int, int, int], torch.Generator | None, torch.device], Tensor]
    cotangents: Callable[[Tensor, Tensor, Tensor], Iterator[Tensor]]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, else float32 (bf16 sums stall, squares underflow in fp16)."""
    return torch.promote_types(dtype, torch.float32)


def _minus_one_hot(p: Tensor, labels: Tensor) -> Tensor:
    # Not by one_hot, whose int64 would be twice the memory of the logits.
    index = labels[..., None]
    return p.scatter_add(-1, index, -torch.ones_like(index, dtype=p.dtype))


def draw_nothing(
    shape: tuple[int, int, int], generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Return the random numbers of an estimator that has none, (draws, 0)."""
    return torch.empty((shape[0], 0), device=device)


def _draw_signs(
    shape: tuple[int, int, int], generator: torch.Generator | None, device: torch.device
) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator, device=device, dtype=torch.int8) * 2 - 1


def _draw_uniforms(
    shape: tuple[int, int, int], generator: torch.Generator | None, device: torch.device
) -> Tensor:
    return torch.rand(shape[:2], generator=generator, device=device, dtype=torch.float64)


def _sketch(logits: Tensor, labels: Tensor, noise: Tensor) -> Iterator[Tensor]:
    p = logits.softmax(-1)
    signed_root = p.sqrt() * noise
    yield signed_root - p * signed_root.sum(-1, keepdim=True)


def _mc(logits: Tensor, labels: Tensor, noise: Tensor) -> Iterator[Tensor]:
    p = logits.softmax(-1)
    yield _minus_one_hot(p, sampled_labels(p, noise))


def sampled_labels(p: Tensor, noise: Tensor) -> Tensor:
    """Labels by inversion of the distribution.

    Args:
        p: Probabilities, shape (..., C).
        noise: float64 in [0, 1), shape (...).

    Returns:
        int64, shape (...).
    """
    # In float64: an fp32 sum over a large vocabulary would misplace rare labels.
    cdf = p.double().cumsum(-1)
    return (cdf <= noise[..., None] * cdf[..., -1:]).sum(-1).clamp(max=p.shape[-1] - 1)


def _exact(logits: Tensor, labels: Tensor, noise: Tensor) -> Iterator[Tensor]:
    p = logits.softmax(-1)
    positions, classes = p.shape[-2:]
    at_position = torch.eye(positions, dtype=p.dtype, device=p.device)[:, :, None]
    at_class = torch.eye(classes, dtype=p.dtype, device=p.device)
    for t in range(positions):
        here = p[..., t, None, :]
        for c in range(classes):
            yield at_position[t] * (here[..., c, None].sqrt() * (at_class[c] - here))


def _empirical(logits: Tensor, labels: Tensor, noise: Tensor) -> Iterator[Tensor]:
    yield _minus_one_hot(logits.softmax(-1), labels)


def _logit_reversal(logits: Tensor, labels: Tensor, noise: Tensor) -> Iterator[Tensor]:
    # The loss of the reversed logits: its gradient is the negative of this, and it is squared.
    yield from _empirical(-logits, labels, noise)


def _given(logits: Tensor, labels: Tensor, noise: Tensor) -> Iterator[Tensor]:
    yield noise


ESTIMATORS = {
    "sketch": Estimator(_draw_signs, _sketch),
    "mc": Estimator(_draw_uniforms, _mc),
    "exact": Estimator(draw_nothing, _exact),
    "empirical": Estimator(draw_nothing, _empirical),
    "logit_reversal": Estimator(draw_nothing, _logit_reversal),
    "batched": Estimator(draw_nothing, _empirical),
}
# Not an estimate: the noise, of the logits' shape, is the cotangent. For checks.
GIVEN = Estimator(draw_nothing, _given)
