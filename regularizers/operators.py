r"""What a forward pass does, operator by operator, and whether values decide where rows go.

A layer's rows may be shared out among the samples by their place only if a row's place does not
depend on the data. Shapes and the numbers among the arguments fix where every operator puts its
rows, but for those that read places out of a tensor: an index, a mask, a sort, a number that is
read back into Python; and for the product of two computed matrices, of which one may hold places.
Two passes of equal records without any of these put all rows in the same places, whatever the data;
of the others each pass has to be checked by itself.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["HostReads", "Operators", "Passes", "values_decide"]

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
_CAST = torch.ops.aten._to_copy.default
_SORTS = {"kthvalue", "median", "mode", "nanmedian", "sort", "topk"}
# Still with integers and Booleans too: they are what is moved, or compared, not where to.
_STILL = {
    "_to_copy", "_unsafe_view", "all", "amax", "amin", "aminmax", "any", "argmax", "argmin", "cat",
    "clone", "constant_pad_nd", "copy_", "count_nonzero", "cumsum", "empty_like", "fill", "fill_",
    "flip", "full_like", "lift_fresh_copy", "max", "mean", "min", "new_empty", "new_full",
    "new_ones", "new_zeros", "ones_like", "prod", "repeat", "roll", "stack", "sum", "tril", "triu",
    "zero_", "zeros_like",
}  # fmt: skip


class Operators(TorchDispatchMode):
    """Records the operators that run within its context.

    Args:
        constants: Storages of what is the same for all samples, by address.
    """

    def __init__(self, constants: set[int]) -> None:
        super().__init__()
        self._constants = set(constants)
        self._casts: list[Tensor] = []  # keeps the addresses of constants in other dtypes theirs
        self.host_reads = False
        self._record: list[tuple[Any, ...]] = []

    @property
    def record(self) -> tuple[Any, ...]:
        """Each operator with its arguments, a tensor's shape and dtype in its place."""
        return self.host_reads, *self._record

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator."""
        call = [func]  # every microsecond counts, so without a function call each
        for value in args:
            if isinstance(value, Tensor):
                call += (value.shape, value.dtype)
            else:
                call.append(_key(value) if isinstance(value, (list, tuple)) else value)
        if func in _LOOKUPS:
            call.append(self._is_constant(args[0]))
        elif func in _PRODUCTS:
            factors = [value for value in args if isinstance(value, Tensor)][-2:]
            call.insert(1, any(map(self._is_constant, factors)))
        if kwargs:
            call += map(_key, kwargs.items())
        self._record.append(tuple(call))
        output = func(*args, **(kwargs or {}))
        if func is _CAST and self._is_constant(args[0]):
            self._constants.add(output.untyped_storage().data_ptr())
            self._casts.append(output)
        return output

    def _is_constant(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._constants


def values_decide(record: tuple[Any, ...]) -> bool:
    """Whether values may have decided where rows went.

    Args:
        record: Of :class:`Operators`.
    """
    host_reads, *calls = record
    return host_reads or any(_reads_places(*call) for call in calls)


def _reads_places(func: Any, *arguments: Any) -> bool:
    if func.namespace != "aten":
        return True  # anyone's own
    name, tags = func.overloadpacket.__name__, func.tags
    if func.is_view or name in _STILL or torch.Tag.pointwise in tags:
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
            self._operators.host_reads = True
        return func(*args, **(kwargs or {}))


class Passes:
    """Which passes have been proven to put every row where it is taken to be.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        tensors = (*model.parameters(), *model.buffers())
        self._constants = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self._seen: dict[object, Tensor] = {}
        self._key: object = None
        self._by_value = False

    def run(self, inputs: Tensor) -> Any:
        """Return what the model makes of ``inputs``, and look at how it does so."""
        with Operators(self._constants) as operators, HostReads(operators):
            outputs = self._model(inputs)
        record = operators.record
        self._key = inputs.shape, inputs.dtype, record
        self._by_value = self._key not in self._seen and values_decide(record)
        return outputs

    @property
    def needs_proof(self) -> bool:
        """Whether the last pass is unlike all that have been proven."""
        seen = self._seen.get(self._key)
        return self._by_value or seen is None or not bool(seen.all())

    def proven(self, outputs: Any, seen: Tensor, *, ours: type | None = None) -> None:
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
