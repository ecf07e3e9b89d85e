r"""Squared gradients of single samples: the ways to them, and the proof that one may be taken.

    total_i += sum_n sum_k ( (J_n^T v_nk)_i )^2,    J_n = d logits_n / d theta

The ways agree to rounding. Plain autograd, one sample at a time, takes every module as it is: it
is the oracle. ``vmap`` shares the overhead of the operators among the samples of a chunk, which is
most of the time of a small model, and needs a gradient's memory for each of them. ``hooks``
(:mod:`ars.regularizers.fisher.hooks`) take one backward pass for all.

Which is the fastest? On a CPU that is predicted from what a forward pass of one sample does. Each
way has prices of its own (``_PRICES``); a sample takes

    3 * (operations of products + byte * (bytes written)) + parameter * (parameters) / shared
    + (call * operators + fixed) / together

operations. Together is a batch for hooks, a chunk for vmap, one for the loop, and only hooks share
what a parameter costs. Nothing is timed, so a fit is as repeatable as its sums, and processes that
see samples of the same shapes go the same way.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from textwrap import shorten
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ars.regularizers.fisher.estimators import (
    Chunk,
    Samples,
    accumulation_dtype,
    cotangents,
    with_lookahead,
)
from ars.regularizers.fisher.hooks import Taps, UnsupportedModelError
from ars.regularizers.fisher.row_proof import computed_in

__all__ = [
    "METHODS",
    "Cost",
    "Differentiator",
    "Method",
    "add_squared_batch_gradient",
    "cost_of",
    "fastest_on_cpu",
    "zero_sums",
]

Method: TypeAlias = Literal["auto", "hooks", "vmap", "loop"]
METHODS: tuple[Method, ...] = get_args(Method)

# Samples that vmap differentiates together if not told otherwise: each needs a gradient's memory.
VMAP_CHUNK = 8
# Largest deviation from plain autograd, relative to the tensor's largest entry, that is rounding
# (TF32 included) and not another quantity: known mistakes are off by 9 % and more.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-2}
HALF_TOLERANCE = 0.2
# How many times plain autograd's own noise another way's may be: squares of a few times the size.
NOISE = 64


class _Prices(NamedTuple):
    """What a way takes beside the products, in operations of a core that does 5e10 a second.

    Args:
        byte: that is written forwards.
        parameter: whose gradient is squared.
        call: of an operator forwards, with its part backwards.
        fixed: once for all samples that are taken together.
    """

    byte: float
    parameter: float
    call: float
    fixed: float


# What `python benchmarks/fisher_prices.py` fits to 73 models on one core of a CPU.
_PRICES: dict[Method, _Prices] = {
    "loop": _Prices(byte=10, parameter=74, call=2.0e6, fixed=2.1e7),
    "vmap": _Prices(byte=7.4, parameter=140, call=3.6e6, fixed=1.1e8),
    "hooks": _Prices(byte=31, parameter=290, call=2.1e7, fixed=1.3e8),
}

# What vmap may hold for ``auto`` to choose it: of each sample of a chunk all that its forward pass
# has written, and for each parameter a gradient, its square and their sum, 12 bytes.
VMAP_BYTES = 2**30

LONGEST = 300  # characters of another's error in one of ours

_Add: TypeAlias = Callable[[dict[str, Tensor], str, Chunk], None]


class Differentiator:
    """Adds up squared gradients by the fastest way that gives what plain autograd gives.

    ``hooks`` prove for every batch that all uses of the parameters are seen, and that every row of
    every layer belongs to the sample it is taken for (:mod:`ars.regularizers.fisher.hooks`). Before
    ``hooks``, or ``vmap`` in its place, is relied upon, it is besides compared with plain autograd
    on two samples, or on the one there is, taken twice, until there are two, which tests the
    layers' rules. Random cotangents of size one take the place of the softmax's, which vanish where
    the model is certain. Each tensor is compared relative to its own largest entry, however small
    that is; only what plain autograd itself does not reproduce counts as rounding. The comparison
    is in float32, whatever the precision of the model, as plain autograd in bfloat16 may be off by
    as much as a mistake. A model that runs in half precision only is compared as it is: deviations
    of a square below a fifth pass then.

    Args:
        model: In evaluation mode.
        parameters: The parameters to differentiate by, by name.
        method: ``auto`` takes on a CPU what is predicted to be the fastest. Where that is hooks or
            fails, and elsewhere, it takes hooks, vmap and the loop in this order, and warns if it
            is not the first. The others are taken or refused.
        chunk_size: Samples to differentiate together; None for a batch with hooks, 8 with vmap.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        method: Method,
        chunk_size: int | None,
    ) -> None:
        self._model, self._parameters = model, parameters
        self._method, self._chunk_size = method, chunk_size
        self._taps: Taps | None = None
        self._current_method: Method = "hooks" if method == "auto" else method
        self._compared = 0  # different samples that the taps have been compared on
        self._begun = False

    def add_squares(self, total: dict[str, Tensor], estimator: str, whole: Chunk) -> None:
        """Add the squared gradients of every sample to ``total``, in place.

        Args:
            total: Sums by parameter name, contiguous, in the dtype to square and add in.
            estimator: A name in ``ESTIMATORS``.
            whole: A batch of samples.

        Raises:
            RuntimeError: The method that was asked for cannot do this model.
        """
        if not self._begun and self._method == "auto":
            self._current_method = self._fastest(total, whole)
        for chunk in whole.split(self._chunk_size or len(whole.targets)):
            if self._current_method == "hooks":
                try:
                    self._by_taps(total, estimator, chunk)
                except UnsupportedModelError as error:  # raised before total was touched
                    self._current_method = self._fall_back(total, chunk, str(error))
                else:
                    self._begun = True
                    continue
            size = self._chunk_size or VMAP_CHUNK
            parts = [chunk] if self._current_method == "loop" else chunk.split(size)
            for part in parts:
                self._by_vmap_or_loop(total, estimator, part)
            self._begun = True

    def _fastest(self, total: dict[str, Tensor], whole: Chunk) -> Method:
        """Return the way that is predicted to be the fastest, or hooks if that is not known."""
        if whole.targets.device.type != "cpu":  # prices there were never measured
            return "hooks"
        try:
            way = fastest_on_cpu(
                cost_of(self._model, whole.inputs[:1]),
                sum(parameter.numel() for parameter in self._parameters.values()),
                min(len(whole.targets), self._chunk_size or len(whole.targets)),
                min(len(whole.targets), self._chunk_size or VMAP_CHUNK),
            )
            if way == "vmap":
                self._verify(self._add_by_vmap, total, whole)
        except Exception:  # no count, as of what is compiled, or vmap cannot run the model
            return "hooks"
        return way

    def _add_by_vmap(self, total: dict[str, Tensor], estimator: str, chunk: Chunk) -> None:
        add_squares_by_vmap(total, self._model, self._parameters, estimator, chunk)

    def _by_taps(self, total: dict[str, Tensor], estimator: str, chunk: Chunk) -> None:
        if self._taps is None or self._compared < min(2, len(chunk.targets)):
            self._taps = self._compared_taps(total, chunk)
        self._taps.add_squares(total, estimator, chunk)

    def _compared_taps(self, total: dict[str, Tensor], chunk: Chunk) -> Taps:
        self._compared = min(2, len(chunk.targets))
        try:
            taps = Taps(self._model, self._parameters, chunk.inputs[_two_of(chunk.inputs)])
            self._verify(partial(taps.add_squares, prove=False), total, chunk)
        except UnsupportedModelError:
            raise
        except Exception as error:  # whatever the expanded outputs do to the model
            raise UnsupportedModelError(f"{type(error).__name__}: {error}") from error
        return taps

    def _by_vmap_or_loop(self, total: dict[str, Tensor], estimator: str, part: Chunk) -> None:
        if self._current_method == "vmap":
            try:
                self._add_by_vmap(total, estimator, part)
            except RuntimeError as error:  # total is as it was
                if self._method == "vmap":
                    raise
                self._warn(f"{error}. Samples are taken one by one from here on")
                self._current_method = "loop"
            else:
                return
        add_squares_one_by_one(total, self._model, self._parameters, estimator, part)

    def _fall_back(self, total: dict[str, Tensor], chunk: Chunk, reason: str) -> Method:
        name = type(self._model).__name__
        reason = f"{name} cannot be differentiated in one pass for all samples: {reason}"
        if self._method == "hooks":
            raise RuntimeError(f"{reason}. Use method='auto', 'vmap' or 'loop'")

        try:
            self._verify(self._add_by_vmap, total, chunk)
        except Exception as error:  # the loop has no need of it
            self._warn(f"{reason}. Nor by torch.func.vmap: {error}. Samples are taken one by one")
            return "loop"
        size = self._chunk_size or VMAP_CHUNK
        self._warn(f"{reason}. Samples are taken by torch.func.vmap, {size} at a time")
        return "vmap"

    def _warn(self, message: str) -> None:
        warnings.warn(f"{message}; choose a method to silence this", UserWarning, stacklevel=7)

    def _verify(self, add: _Add, total: dict[str, Tensor], chunk: Chunk) -> None:
        """Compare ``add`` with plain autograd on two samples.

        Raises:
            UnsupportedModelError: They differ; names the parameter.
        """
        # While nothing has been added, the sums lend their memory.
        free = zero_sums(self._parameters) if self._begun else total
        inputs = chunk.inputs[_two_of(chunk.inputs)]
        # Of class 0, so that none is masked.
        targets = torch.zeros_like(chunk.targets[_two_of(chunk.targets)])
        with torch.no_grad():
            logits = inputs[:1].run(self._model)
        generator = torch.Generator(logits.device).manual_seed(0)
        size = (2, 1, targets[0].numel(), logits.shape[-1])
        noise = torch.randn(size, generator=generator, device=logits.device)
        two = Chunk(inputs.widened(), targets, noise, None, 1)
        try:
            with in_float32(self._model):
                wrong = self._compare(add, free, two)
        except Exception:  # the model casts by itself, or there is no memory for it
            wrong = self._compare(add, free, two._replace(inputs=inputs))
        if wrong is not None:
            raise UnsupportedModelError(f"it gives {wrong!r} another gradient than plain autograd")

    def _compare(self, add: _Add, free: dict[str, Tensor], two: Chunk) -> str | None:
        """Return the first parameter whose squares differ from plain autograd's, or None."""
        names = [name for name, tensor in free.items() if tensor.numel()]

        def loop(times: float = 1.0, sign: int = 1) -> None:
            chunk = two._replace(noise=two.noise * times)
            scale = sign / times**2
            add_squares_one_by_one(free, self._model, self._parameters, "given", chunk, sign=scale)

        def largest() -> Tensor:
            return torch.stack([free[name].abs().max().double().cpu() for name in names])

        def clear() -> None:
            for tensor in free.values():
                tensor.zero_()

        try:
            add(free, "given", two)
            peaks = largest()
            loop(sign=-1)
            errors = largest()
            dtype = computed_in(self._parameters.values(), two.inputs)
            allowed = TOLERANCE.get(dtype, HALF_TOLERANCE) * peaks
            if (errors > allowed).any():
                # Gradients that are 0 but for rounding, as of a key's bias, differ by their
                # rounding: those that do so too if the cotangents are a multiple.
                for times in (3.0, 7.0):
                    clear()
                    loop()
                    loop(times, sign=-1)
                    allowed = torch.maximum(allowed, NOISE * largest())
        finally:
            clear()
        wrong = ~(errors <= allowed)
        # Those that are not finite are an error of their own.
        found = [name for name, w in zip(names, wrong & peaks.isfinite().all(), strict=True) if w]
        return found[0] if found else None


def _two_of(samples: Tensor | Samples) -> slice | list[int]:
    """Return the places of the first two samples, or of the only one twice."""
    return slice(2) if len(samples) > 1 else [0, 0]


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Let the model compute in float32 at least: without autocast, its halves widened meanwhile."""
    tensors = [*model.parameters(), *model.buffers()]
    halves = [t for t in tensors if t.dtype in {torch.bfloat16, torch.float16}]
    stored = [t.data for t in halves]
    with ExitStack() as autocast:
        for device in {t.device.type for t in tensors}:
            autocast.enter_context(torch.autocast(device, enabled=False))
        try:
            for tensor in halves:
                tensor.data = tensor.data.float()
            yield
        finally:
            for tensor, data in zip(halves, stored, strict=True):
                tensor.data = data


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
        logits = one.inputs.run(model)
        for cotangent, more in with_lookahead(cotangents(estimator, logits.detach(), one)):
            gradients = torch.autograd.grad(
                logits, leaves, cotangent, retain_graph=more, materialize_grads=True
            )
            for squares, gradient in zip(total.values(), gradients, strict=True):
                gradient = _dense(gradient)
                # Promotes to its dtype before it multiplies.
                squares.addcmul_(gradient, gradient, value=sign)
            del gradients, gradient  # before there are others as large as the model


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
        leaves: dict[str, Tensor],
        x: tuple[Tensor, ...],
        y: Tensor,
        noise: Tensor,
        units: Tensor | None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        inputs = chunk.inputs.holding([tensor[None] for tensor in x])

        def forward(leaves: dict[str, Tensor]) -> Any:
            with _replaced_parameters(parameters, model, leaves):
                return inputs.run(model)

        one = Chunk(
            inputs, y[None], noise[None], None if units is None else units[None], chunk.n_units
        )
        logits, pull_back, *_ = vjp(forward, leaves)
        squares = {name: torch.zeros_like(tensor) for name, tensor in total.items()}
        for cotangent in cotangents(estimator, logits, one):
            (gradients,) = pull_back(cotangent)
            squares = {n: s + gradients[n].to(s.dtype).square() for n, s in squares.items()}
        return squares, logits

    leaves = {name: p.detach() for name, p in parameters.items()}
    in_dims = (None, 0, 0, 0, None if chunk.units is None else 0)
    each = leaves, chunk.inputs.tensors, *chunk[1:4]
    per_sample, logits = vmap(squares_of_one, in_dims=in_dims)(*each)
    if logits.requires_grad:  # though all leaves are detached
        raise ValueError("it uses a parameter that is not found at its place in the module")
    for name, squares in per_sample.items():
        total[name] += squares.sum(0)


@contextmanager
def _replaced_parameters(
    parameters: dict[str, nn.Parameter], model: nn.Module, leaves: dict[str, Tensor]
) -> Iterator[None]:
    """Run ``model`` with other tensors at all places of its parameters, and leave it as it was.

    torch.func.functional_call leaves its own tensors in a module that has two names.
    """
    names = {p: name for name, p in parameters.items()}
    kept = [
        (attributes, dict(attributes))
        for module in model.modules()
        for attributes in (vars(module), module._buffers)
    ]
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
        for attributes, before in kept:
            _put_back(attributes, before)


def _put_back(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    """Replace what vmap's own tensors, which are of no use behind it, have taken the place of."""
    for name, value in list(attributes.items()):
        if isinstance(value, Tensor) and is_functorch_wrapped_tensor(value):
            if name in before:
                attributes[name] = before[name]
            else:
                del attributes[name]


def add_squared_batch_gradient(
    total: dict[str, Tensor],
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    chunk: Chunk,
) -> None:
    """Add B (mean_n g_n)^2, the square of one gradient of the whole batch; arguments as above."""
    batch = len(chunk.targets)
    logits = chunk.inputs.run(model)
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


class Cost(NamedTuple):
    """Of one sample's forward pass.

    Args:
        operators: Calls that compute something.
        operations: Of matrix products and convolutions.
        written: Bytes.
    """

    operators: int
    operations: int
    written: int


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost(0, 0, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if not func.is_view:
            count = flop_registry.get(func._overloadpacket)
            operations = count(*args, **(kwargs or {}), out_val=output) if count else 0
            outputs = output if isinstance(output, (tuple, list)) else (output,)
            written = sum(t.numel() * t.element_size() for t in outputs if isinstance(t, Tensor))
            before = self.cost
            self.cost = Cost(
                before.operators + 1, before.operations + operations, before.written + written
            )
        return output


def cost_of(model: nn.Module, one: Samples) -> Cost:
    """Count what a forward pass of one sample does.

    Args:
        model: In evaluation mode.
        one: One sample.
    """
    # With a graph, as without one attention may take kernels that are not differentiated.
    with torch.enable_grad(), _Counter() as counter:
        one.run(model)
    return counter.cost


def fastest_on_cpu(cost: Cost, parameters: int, batch: int, chunk: int) -> Method:
    """Return the way that is predicted to take the least time on a CPU, in bounded memory.

    Args:
        cost: Of one sample.
        parameters: How many are differentiated by.
        batch: Samples that hooks take together.
        chunk: Samples that vmap takes together.
    """
    together: dict[Method, int] = {"loop": 1, "vmap": chunk, "hooks": batch}
    if chunk * (cost.written + 12 * parameters) > VMAP_BYTES:
        del together["vmap"]

    def predicted(way: Method) -> float:
        price, n = _PRICES[way], together[way]
        shared = n if way == "hooks" else 1
        return (
            3 * (cost.operations + price.byte * cost.written)
            + price.parameter * parameters / shared
            + (price.call * cost.operators + price.fixed) / n
        )

    return min(together, key=predicted)
