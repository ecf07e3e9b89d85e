r"""Squared gradients of single samples, one by one or by vmap, for any model.

    total_i += sum_n sum_k ( (J_n^T v_nk)_i )^2,    J_n = d logits_n / d theta

The two ways agree to rounding. Plain autograd, one sample at a time, takes every module as it is:
it is the oracle. ``vmap`` shares the overhead of the operators among the samples of a chunk, which
is most of the time of a small model, and needs a gradient's memory for each of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from textwrap import shorten

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ars.regularizers.cotangents import Chunk, and_whether_more, cotangents
from ars.regularizers.estimators import accumulation_dtype

__all__ = [
    "add_squared_batch_gradient", "add_squares_by_vmap", "add_squares_one_by_one", "zero_sums",
]  # fmt: skip

LONGEST = 300  # characters of another's error in one of ours


def zero_sums(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return a sum of squares for each parameter: contiguous, float32 or float64, 0."""
    return {
        name: torch.zeros(p.shape, dtype=accumulation_dtype(p.dtype), device=p.device)
        for name, p in parameters.items()
    }


def add_squares_one_by_one(
    total: dict[str, Tensor],
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    estimator: str,
    chunk: Chunk,
    sign: float = 1,
) -> None:
    """Add the squared gradients of every sample to ``total``, in place, by plain autograd.

    Args:
        total: Sums by parameter name, in the dtype to square and add in.
        model: Maps inputs (B, ...) to logits (B, C) or (B, T, C).
        parameters: The parameters to differentiate by; the names of ``total`` in the same order.
        estimator: A name in ``ESTIMATORS``.
        chunk: The samples.
        sign: What to multiply the squares by; -1 subtracts them.
    """
    leaves = list(parameters.values())
    for one in chunk.split(1):
        logits = model(one.inputs)
        for cotangent, more in and_whether_more(cotangents(estimator, logits.detach(), one)):
            gradients = torch.autograd.grad(
                logits, leaves, cotangent, retain_graph=more, materialize_grads=True
            )
            for squares, gradient in zip(total.values(), gradients, strict=True):
                gradient = _dense(gradient)
                # Promotes to its dtype before it multiplies.
                squares.addcmul_(gradient, gradient, value=sign)


def add_squares_by_vmap(
    total: dict[str, Tensor],
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    estimator: str,
    chunk: Chunk,
) -> None:
    """Add the squared gradients of every sample by ``torch.func.vmap``; arguments as above.

    ``total`` is as it was after an error.

    Raises:
        RuntimeError: vmap cannot run the model, or does not see all that it does.
    """
    # The CPU's fused attention has no batching rule: vmap would warn and run it sample by sample.
    on_cpu = chunk.targets.device.type == "cpu"
    attention = sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext()
    try:
        with attention:
            _add_by_vmap(total, model, parameters, estimator, chunk)
    except Exception as error:  # of the model's own too: values are not there to look at
        # A missing kernel's message goes on with all there are, 50 lines; the cause has it whole.
        reason = shorten(str(error), LONGEST, placeholder=" ...").rstrip(".")
        raise RuntimeError(
            f"torch.func.vmap could not differentiate {type(model).__name__} in chunks of "
            f"{len(chunk.targets)}: {type(error).__name__}: {reason}. Use method='loop': plain "
            "autograd, one sample at a time"
        ) from error


def _add_by_vmap(
    total: dict[str, Tensor],
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    estimator: str,
    chunk: Chunk,
) -> None:
    def squares_of_one(
        leaves: dict[str, Tensor], x: Tensor, y: Tensor, noise: Tensor, units: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        def logits_of(leaves: dict[str, Tensor]) -> Tensor:
            with _in_place_of(parameters, model, leaves):
                return model(x[None])

        one = Chunk(
            x[None], y[None], noise[None], None if units is None else units[None], chunk.n_units
        )
        logits, pull_back, *_ = vjp(logits_of, leaves)
        squares = {name: torch.zeros_like(tensor) for name, tensor in total.items()}
        for cotangent in cotangents(estimator, logits, one):
            (gradients,) = pull_back(cotangent)
            squares = {n: s + gradients[n].to(s.dtype).square() for n, s in squares.items()}
        return squares, logits

    leaves = {name: p.detach() for name, p in parameters.items()}
    in_dims = (None, 0, 0, 0, None if chunk.units is None else 0)
    per_sample, logits = vmap(squares_of_one, in_dims=in_dims)(leaves, *chunk[:4])
    if logits.requires_grad:  # though all leaves are detached
        raise ValueError("it uses a parameter that is not found at its place in the module")
    for name, squares in per_sample.items():
        total[name] += squares.sum(0)


@contextmanager
def _in_place_of(
    parameters: dict[str, nn.Parameter], model: nn.Module, leaves: dict[str, Tensor]
) -> Iterator[None]:
    """Run ``model`` with other tensors at all places of its parameters.

    torch.func.functional_call leaves its own tensors in a module that has two names.
    """
    names = {p: name for name, p in parameters.items()}
    places = [
        (module._parameters, own, p)
        for module in model.modules()
        for own, p in module._parameters.items()
        if p in names
    ]
    try:
        for tensors, own, p in places:
            tensors[own] = leaves[names[p]]  # type: ignore[assignment]
        yield
    finally:
        for tensors, own, p in places:
            tensors[own] = p


def add_squared_batch_gradient(
    total: dict[str, Tensor],
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    chunk: Chunk,
) -> None:
    """Add B (mean_n g_n)^2, the square of one gradient of the whole batch; arguments as above."""
    batch = len(chunk.targets)
    logits = model(chunk.inputs)
    for cotangent in cotangents("batched", logits.detach(), chunk):
        gradients = torch.autograd.grad(
            logits, list(parameters.values()), cotangent, materialize_grads=True
        )
        for squares, gradient in zip(total.values(), gradients, strict=True):
            gradient = _dense(gradient)
            squares.addcmul_(gradient, gradient, value=1 / batch)


def _dense(gradient: Tensor) -> Tensor:
    """Add up the rows that ``nn.Embedding(sparse=True)`` returns."""
    return gradient.to_dense() if gradient.layout != torch.strided else gradient
