r"""A tensor that is the same for all samples, with a copy for each sample behind it.

A parameter that a module uses by itself, or what a layer makes of positions alone, has no dimension
for the samples; once it meets what has one, its gradient is summed over them. Such a tensor is kept
here in two forms: as the model sees it, and as N copies, which are what is differentiated. What is
done to it alone is done to each copy. Where it meets a tensor x whose first dimension holds the N
samples, each copy meets its own sample,

    f(s, x)  becomes  cat_n f(s_n, x[n : n + 1]),

and the result is an ordinary tensor. Which tensors hold samples is a guess from their shapes; that
the logits and the gradients are those of single samples is proven elsewhere.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ars.regularizers.fisher.row_proof import Operators

__all__ = ["Shared"]

_WRITES = {"__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv"))}


class Shared(Tensor):
    """What is the same for all samples; made by :meth:`of`."""

    each: Tensor
    constants: Collection[int]

    @staticmethod
    def of(each: Tensor, constants: Collection[int]) -> "Shared":
        """Let copies be seen as one tensor.

        Args:
            each: (N, *shape), equal for all n.
            constants: Addresses of storages that hold no samples, whatever their shapes.
        """
        made = each.detach()[0].as_subclass(Shared)
        made.each, made.constants = each, constants
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one function on the copies; alone, or each with its sample.

        Raises:
            RuntimeError: It writes to a shared tensor, or does not return the samples in front.
        """
        given, structure = tree_flatten((args, kwargs or {}))
        shared = [i for i, value in enumerate(given) if isinstance(value, Shared)]
        first = given[shared[0]] if shared else None
        with torch._C.DisableTorchFunctionSubclass():
            if first is None:
                return func(*args, **(kwargs or {}))
            name = getattr(func, "__name__", "")
            if name in _WRITES or (name.endswith("_") and not name.endswith("__")):
                raise RuntimeError(f"{name} writes to a tensor that all samples share")
            samples = [i for i, v in enumerate(given) if _holds_samples(v, first)]
            places = [*shared, *samples]

            def call(*values: Tensor) -> Any:
                now = dict(zip(places, values, strict=True))
                each = [now.get(i, value) for i, value in enumerate(given)]
                own_args, own_kwargs = tree_unflatten(each, structure)
                return func(*own_args, **own_kwargs)

            if not samples:
                seen = call(*(given[i].as_subclass(Tensor) for i in shared))
                leaves = tree_flatten(seen)[0]
                if not all(isinstance(leaf, Tensor) for leaf in leaves) or not leaves:
                    return seen  # a shape, a dtype, a number
            copies = [given[i].each for i in shared]
            if not samples:
                found = vmap(call)(*copies)
                return tree_map(lambda each: Shared.of(each, first.constants), found)
            rows = [given[i].unsqueeze(1) for i in samples]
            # Fused attention does not see, below vmap, that a mask is differentiated.
            with sdpa_kernel(SDPBackend.MATH):
                return tree_map(_merged, vmap(call)(*copies, *rows))


def _holds_samples(value: object, shared: Shared) -> bool:
    return (
        isinstance(value, Tensor)
        and not isinstance(value, Shared)
        and value.ndim > 0
        and len(value) == len(shared.each)
        and Operators.address(value) not in shared.constants
    )


def _merged(found: Tensor) -> Tensor:
    """Return results (N, 1, ...) as (N, ...)."""  # noqa: DOC501
    if found.ndim < 2 or found.shape[1] != 1:
        raise RuntimeError(f"one sample became {tuple(found.shape[1:])}, without a place for it")
    return found.flatten(0, 1)
