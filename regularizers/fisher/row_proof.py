r"""The proof that each row of a layer belongs to the sample it is taken for, and who needs one.

The gradient g_r of a row is linear in the cotangents v_n that the samples' logits send backwards.
If row r depends on sample n alone, weighting the samples weights the row likewise,

    g_r(w_1 v_1, ..., w_N v_N) = w_n g_r(v_1, ..., v_N)        for all v and w,

and if it depends on another, or on several, this fails for almost all v and w. Two backward passes
of random v, each with weights of its own, are compared row by row. The weights are powers of two,
so that a right row's two gradients are equal to the last bit, however small and noisy they are.

Not every pass needs a proof of its own. Shapes and the numbers among the arguments fix where every
operator puts its rows, but for those that read places out of a tensor: an index, a mask, a sort, a
number that is read back into Python; and for a computed mask and the product of two computed
matrices, which may choose among rows of several samples. Two passes of equal records without any of
these put all rows in the same places, whatever the data; of the others each pass is proven by
itself.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ars.regularizers.fisher.estimators import Samples, accumulation_dtype

__all__ = [
    "Operators",
    "Passes",
    "RowProof",
    "computed_in",
    "outputs_tolerance",
    "values_decide",
]

# Largest deviation of a sample's logits in a batch from its logits alone that is rounding.
_OUTPUTS_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-2}
_HALF_OUTPUTS_TOLERANCE = 0.1

# The two weights of a sample differ by up to 2^30 either way; by 2^6 where float16 would overflow.
RANGE, FLOAT16_RANGE = 30, 6
# Wrong rows are off by a factor of two and more, but for such as several samples share; a GPU's
# atomic additions come in any order, which is noise of a few roundings of the largest row.
SLACK, ROUNDINGS, MOST_NOISE = 0.05, 32, 2.0**-7
# Reads that torch's dispatcher does not see; item(), bool() and the like it does.
_HOST_READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}
# What looks rows up: still if the table is a parameter or a buffer, as rows follow the index then.
_LOOKUPS = {
    torch.ops.aten.embedding.default, torch.ops.aten.gather.default, torch.ops.aten.index.Tensor,
    torch.ops.aten.index_select.default,
}  # fmt: skip
# What moves rows if both factors were computed, such as experts' rows by a matrix of 0 and 1.
_PRODUCTS = {
    getattr(torch.ops.aten, name).default
    for name in ("_addmm_activation", "addbmm", "addmm", "addmv", "baddbmm", "bmm", "mm", "mv")
}
_SORTS = {"kthvalue", "median", "mode", "nanmedian", "sort", "topk"}
# Still with integers and Booleans too: they are what is moved, or compared, not where to.
_VALUE_INDEPENDENT = {
    "_to_copy", "_unsafe_view", "all", "amax", "amin", "aminmax", "any", "argmax", "argmin", "cat",
    "clone", "constant_pad_nd", "copy_", "count_nonzero", "cumsum", "empty_like", "fill", "fill_",
    "flip", "full_like", "lift_fresh_copy", "max", "mean", "min", "new_empty", "new_full",
    "new_ones", "new_zeros", "ones_like", "prod", "repeat", "roll", "stack", "sum", "tril", "triu",
    "zero_", "zeros_like",
}  # fmt: skip


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


def outputs_tolerance(dtype: torch.dtype) -> float:
    """Return the largest deviation between two batches that is rounding, relative to the outputs.

    Args:
        dtype: What the model computes in.
    """
    return _OUTPUTS_TOLERANCE.get(dtype, _HALF_OUTPUTS_TOLERANCE)


def computed_in(parameters: Iterable[nn.Parameter], inputs: Tensor | Samples) -> torch.dtype:
    """Return the coarsest dtype that a model computes in: its parameters', or autocast's."""
    device = inputs.device.type
    dtypes = [p.dtype for p in parameters]
    if torch.is_autocast_enabled(device):
        dtypes.append(torch.get_autocast_dtype(device))
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


class Operators(TorchDispatchMode):
    """Records the operators that run within its context.

    Args:
        constants: Storages of what is the same for all samples, by address.
    """

    def __init__(self, constants: set[int]) -> None:
        super().__init__()
        self._constants = constants - {-1}
        self._kept: list[Tensor] = []  # so that the addresses of what constants give stay theirs
        self.by_value = False  # whether values were read into Python, or a computed mask selects
        self._record: list[tuple[Any, ...]] = []

    @property
    def record(self) -> tuple[Any, ...]:
        """Each operator with its arguments, a tensor's shape and dtype in its place."""
        return self.by_value, *self._record

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator."""
        call, tensors = [func], []  # every microsecond counts, so without a function call each
        for value in args:
            if isinstance(value, Tensor):
                call += (value.shape, value.dtype)
                tensors.append(value)
            elif isinstance(value, (list, tuple)):
                call.append(_key(value))
                tensors += [each for each in value if isinstance(each, Tensor)]
            else:
                call.append(value)
        if kwargs:
            tensors += [value for value in kwargs.values() if isinstance(value, Tensor)]
        computed = [each for each in tensors if self.address(each) not in self._constants]
        if any(each.dtype == torch.bool for each in computed):
            self.by_value = True
        if func in _LOOKUPS:
            call.append(self.address(args[0]) in self._constants)
        elif func in _PRODUCTS:
            call.insert(1, any(self.address(each) in self._constants for each in tensors[-2:]))
        if kwargs:
            call += map(_key, kwargs.items())
        self._record.append(tuple(call))
        output = func(*args, **(kwargs or {}))
        if not computed and torch.Tag.nondeterministic_seeded not in func.tags:
            outputs = output if isinstance(output, (list, tuple)) else (output,)
            made = [each for each in outputs if isinstance(each, Tensor)]
            self._kept += made
            self._constants.update({*map(self.address, made)} - {-1})
        elif func._schema.is_mutable and isinstance(output, Tensor):
            self._constants.discard(self.address(output))
        return output

    @staticmethod
    def address(tensor: Tensor) -> int:
        """Tell storages apart; -1 for a sparse tensor, which has none and counts as computed."""
        return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else -1


def values_decide(record: tuple[Any, ...]) -> bool:
    """Whether values may have decided where rows went.

    Args:
        record: Of :class:`Operators`.
    """
    by_value, *calls = record
    return by_value or any(_reads_places(*call) for call in calls)


def _reads_places(func: Any, *arguments: Any) -> bool:
    if func.namespace != "aten":
        return True  # anyone's own
    name, tags = func.overloadpacket.__name__, func.tags
    if func.is_view or name in _VALUE_INDEPENDENT or torch.Tag.pointwise in tags:
        return False
    if func in _PRODUCTS:
        return not arguments[0]
    dtypes = _dtypes(arguments)
    if func in _LOOKUPS and arguments[-1]:
        return torch.bool in dtypes
    if torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags:
        return True
    places = any(not (dtype.is_floating_point or dtype.is_complex) for dtype in dtypes)
    return name in _SORTS or (places and not name.startswith("_scaled_dot_product"))


class HostReads(TorchFunctionMode):
    """Tells a record when values are read in a way that it does not see.

    Args:
        operators: The record.
    """

    def __init__(self, operators: Operators) -> None:
        super().__init__()
        self._operators = operators

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one function."""
        if func in _HOST_READS:
            self._operators.by_value = True
        return func(*args, **(kwargs or {}))


class Passes:
    """Which passes have been proven to put every row where it is taken to be.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        tensors = (*model.parameters(), *model.buffers())
        self._constants = {Operators.address(tensor) for tensor in tensors}
        self._seen: dict[object, Tensor] = {}
        self._key: object = None
        self._by_value = False

    def run(self, inputs: Samples) -> Any:
        """Return what the model makes of ``inputs``, and look at how it does so."""
        with Operators(self._constants) as operators, HostReads(operators):
            outputs = inputs.run(self._model)
        record = operators.record
        self._key = inputs.shapes, record
        self._by_value = self._key not in self._seen and values_decide(record)
        return outputs

    @property
    def needs_proof(self) -> bool:
        """Whether the last pass is unlike all that have been proven."""
        seen = self._seen.get(self._key)
        return self._by_value or seen is None or not bool(seen.all())

    def mark_proven(self, outputs: Any, seen: Tensor, *, ours: type | None = None) -> None:
        """Take the last pass as proven, and those like it, unless values decide.

        Args:
            outputs: What it returned.
            seen: Which parts of the pass could be looked at this time, Booleans of one shape for
                all passes that are alike. Until all have been, it is proven again.
            ours: The one kind of autograd function, by its backward class, that moves no row.
        """
        if not (self._by_value or (isinstance(outputs, Tensor) and _has_functions(outputs, ours))):
            self._seen[self._key] = seen | self._seen.get(self._key, seen)


def _has_functions(outputs: Tensor, ours: type | None) -> bool:
    """Whether anyone's own autograd function took part, whose kernels no record shows."""
    todo, known = [outputs.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in known:
            continue
        known.add(node)
        if isinstance(node, BackwardCFunction) and type(node) is not ours:
            return True
        todo += [following for following, _ in node.next_functions]
    return False


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    return tuple(map(_key, value)) if isinstance(value, (list, tuple)) else value


def _dtypes(arguments: Any) -> set[torch.dtype]:
    """Return the tensors' dtypes; that of what is to be made is told by its keyword."""
    found: set[torch.dtype] = set()
    for value in arguments:
        if isinstance(value, torch.dtype):
            found.add(value)
        elif (
            isinstance(value, tuple)
            and not isinstance(value, torch.Size)
            and value[:1] != ("dtype",)
        ):
            found |= _dtypes(value)
    return found
