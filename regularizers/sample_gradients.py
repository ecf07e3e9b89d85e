r"""Squared gradients of single samples, one by one or in chunks.

    total_i += sum_n sum_k ( (J_n^T v_nk)_i )^2,    J_n = d logits_n / d theta

The two ways agree to rounding. Plain autograd, one sample at a time, takes every module as it is,
and on a GPT of 3.3 M parameters and 256 tokens it is no slower than ``torch.func.vmap``: one
sequence fills the matrix products. ``vmap`` shares the overhead of the operators among the samples
of a chunk, which is most of the time of a small model.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ars.regularizers.estimators import IGNORE_INDEX, Estimator, accumulation_dtype

__all__ = ["add_squared_gradients"]


def add_squared_gradients(
    total: dict[str, Tensor],
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    estimator: Estimator,
    inputs: Tensor,
    targets: Tensor,
    noise: Tensor,
) -> None:
    """Add the squared gradients of every sample to ``total``, in place.

    Args:
        total: Sums by parameter name, in the dtype to square and add in.
        model: Maps inputs (B, ...) to logits (B, C) or (B, T, C).
        parameters: The parameters to differentiate by; the names of ``total`` in the same order.
        estimator: Turns logits into cotangents.
        inputs: One chunk, shape (B, ...); with B = 1 plain autograd is used, else vmap.
        targets: int64 in [0, C) or -100, shape (B,) or (B, T).
        noise: The estimator's random numbers, shape (B, ...).

    Raises:
        RuntimeError: vmap cannot run the model.
    """
    if len(targets) == 1:
        _add_one(total, model, parameters, estimator, inputs, targets, noise)
        return
    # The CPU's fused attention has no batching rule: vmap would warn and run it sample by sample.
    attention = sdpa_kernel(SDPBackend.MATH) if targets.device.type == "cpu" else nullcontext()
    try:
        with attention:
            _add_chunk(total, model, parameters, estimator, inputs, targets, noise)
    except RuntimeError as error:
        raise RuntimeError(
            f"torch.func.vmap could not differentiate {type(model).__name__} in chunks of "
            f"{len(targets)}: {error}\nUse chunk_size=1: plain autograd, one sample at a time."
        ) from error


def _add_one(
    total: dict[str, Tensor],
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    estimator: Estimator,
    inputs: Tensor,
    targets: Tensor,
    noise: Tensor,
) -> None:
    logits = model(inputs)
    leaves = list(parameters.values())
    for cotangent in _cotangents(estimator, logits.detach(), targets, noise):
        gradients = torch.autograd.grad(
            logits, leaves, cotangent, retain_graph=True, materialize_grads=True
        )
        for squares, gradient in zip(total.values(), gradients, strict=True):
            squares.addcmul_(gradient, gradient)  # promotes to its dtype before it multiplies


def _add_chunk(
    total: dict[str, Tensor],
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    estimator: Estimator,
    inputs: Tensor,
    targets: Tensor,
    noise: Tensor,
) -> None:
    def squares_of_one(
        leaves: dict[str, Tensor], x: Tensor, y: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        def logits_of(leaves: dict[str, Tensor]) -> Tensor:
            return functional_call(model, leaves, (x[None],))

        logits, pull_back, *_ = vjp(logits_of, leaves)
        squares = {name: torch.zeros_like(tensor) for name, tensor in total.items()}
        for cotangent in _cotangents(estimator, logits, y[None], noise[None]):
            (gradients,) = pull_back(cotangent)
            squares = {n: s + gradients[n].to(s.dtype).square() for n, s in squares.items()}
        return squares

    leaves = {name: p.detach() for name, p in parameters.items()}
    per_sample = vmap(squares_of_one, in_dims=(None, 0, 0, 0))(leaves, inputs, targets, noise)
    for name, squares in per_sample.items():
        total[name] += squares.sum(0)


def _cotangents(
    estimator: Estimator, logits: Tensor, targets: Tensor, noise: Tensor
) -> Iterator[Tensor]:
    """Yield the cotangents of the logits, (1, C) or (1, T, C), of one sample, 0 where masked."""
    flat = logits.reshape(-1, logits.shape[-1])  # (positions, C)
    labels = targets.reshape(-1)  # (positions,)
    p = flat.to(accumulation_dtype(flat.dtype)).softmax(-1)
    valid = (labels != IGNORE_INDEX)[:, None]
    for cotangent in estimator.cotangents(p, labels.clamp(min=0), noise[0]):
        yield (cotangent * valid).reshape(logits.shape).to(logits.dtype)
