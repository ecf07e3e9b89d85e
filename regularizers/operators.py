r"""What a forward pass does, operator by operator, and whether values decide where rows go.

A layer's rows may be shared out among the samples by their place only if a row's place does not
depend on the data. Shapes and the numbers among the arguments fix where every operator puts its
rows, but for those that read places out of a tensor: an index, a mask, a sort, a number that is
read back into Python. Two passes of equal records without any of these put all rows in the same
places, whatever the data; of the others each pass has to be checked by itself.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["HostReads", "Operators", "Passes"]

# Reads that torch's dispatcher does not see; item(), bool() and the like it does.
_HOST_READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}
# What looks rows up: still if the table is a parameter or a buffer, as rows follow the index then.
_LOOKUPS = {"embedding", "gather", "index", "index_select"}
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
        model: Its parameters and buffers are the same for all samples.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._constants = {
            t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())
        }
        self._record: list[tuple[Any, ...]] = []
        self.by_value = False  # whether values may have decided where rows went

    @property
    def record(self) -> tuple[tuple[Any, ...], ...]:
        """Each operator with its arguments, a tensor's shape in its place."""
        return tuple(self._record)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        self._record.append((func, *map(_key, args), *map(_key, kwargs.items())))
        if not self.by_value:
            self.by_value = self._reads_places(func, (*args, *kwargs.values()))
        return func(*args, **kwargs)

    def _reads_places(self, func: Any, args: tuple[Any, ...]) -> bool:
        if func.namespace != "aten":
            return True  # anyone's own
        name, tags = func.overloadpacket.__name__, func.tags
        if func.is_view or name in _STILL or torch.Tag.pointwise in tags:
            return False
        places = [t for t in _tensors(args) if not t.is_floating_point() and not t.is_complex()]
        if name in _LOOKUPS and args[0].untyped_storage().data_ptr() in self._constants:
            return any(t.dtype == torch.bool for t in places)
        if torch.Tag.dynamic_output_shape in tags or torch.Tag.data_dependent_output in tags:
            return True
        return name in _SORTS or (bool(places) and not name.startswith("_scaled_dot_product"))


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
        self._seen: dict[object, Tensor] = {}
        self._key: object = None
        self._by_value = False

    def run(self, inputs: Tensor) -> Any:
        """Return what the model makes of ``inputs``, and look at how it does so."""
        with Operators(self._model) as operators, HostReads(operators):
            outputs = self._model(inputs)
        self._key = inputs.shape, inputs.dtype, operators.record
        self._by_value = operators.by_value
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
        return value.shape
    return tuple(map(_key, value)) if isinstance(value, (list, tuple)) else value


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found
