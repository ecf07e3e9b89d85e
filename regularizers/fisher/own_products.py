r"""Modules that multiply by their parameters themselves, as the matrix products they are made of.

Attention (:class:`torch.nn.MultiheadAttention`) projects by one matrix without calling a layer,

    [q k v] = W_in x + b_in,        y = W_out attention(q, k, v) + b_out,

or by a third of W_in each where query, key and value are not one tensor. It is taken as torch's own
function between identities in the place of its projections, and the projections around it.

Experts (Mixtral's, and those of other models of transformers) multiply each token by the matrices
of the few experts e that a router chooses for it, with weights r_e,

    y = sum_e r_e D_e h(U_e x).

They are taken as this sum, one expert after another, where it is what they return.

A call is replaced by these products while it is looked at, so a gradient that reaches a product's
output is that of the model.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ars.regularizers.fisher.row_proof import outputs_tolerance

__all__ = ["Block", "Routed", "is_experts", "own_matrices", "replaced_by_products"]


class Block(NamedTuple):
    """Which of the matrices in one parameter a product is with, counted from 0.

    Args:
        number: The matrix's.
        of: How many there are, of one shape.
    """

    number: int
    of: int


class Routed(NamedTuple):
    """Which of all tokens a product's rows are.

    Args:
        places: Their numbers, int64, each once.
        of: How many tokens there are.
    """

    places: Tensor
    of: int

    def spread(self, rows: Tensor) -> Tensor:
        """Put rows in their tokens' places, (rows, d) to (tokens, d), and 0 in the others."""
        return rows.new_zeros(self.of, *rows.shape[1:]).index_copy(0, self.places, rows)


class Record(Protocol):
    """What is told of a product: its parameter, input and output, the samples in front."""

    def __call__(
        self,
        parameter: Tensor,
        module: nn.Module | None,
        inputs: Tensor,
        output: Tensor,
        block: Block | None = None,
        routed: Routed | None = None,
    ) -> None:
        """Note it."""
        ...


def own_matrices(module: nn.Module) -> dict[str, str | None]:
    """Name the matrices that a module multiplies by itself, and the bias that goes with each.

    Args:
        module: Any module.

    Returns:
        Names of its parameters; none of a module that is neither attention nor experts.
    """
    if "forward" in vars(module):
        return {}
    if type(module).forward is nn.MultiheadAttention.forward:
        own: Any = module
        if own.in_proj_weight is not None:
            return {"in_proj_weight": "in_proj_bias"}
        # Three matrices share a bias, of which none can have the whole.
        return dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight"))
    if is_experts(module):
        return dict.fromkeys((_up_name(module), "down_proj"))
    return {}


def _up_name(module: nn.Module) -> str:
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"


def is_experts(module: nn.Module) -> bool:
    """Whether a module looks like the experts of transformers: without bias, (experts, p, d).

    Args:
        module: Any module.
    """
    flags = ("has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel")
    matrices = (getattr(module, name, None) for name in (_up_name(module), "down_proj"))
    return (
        hasattr(module, "_apply_gate")
        and not any(getattr(module, flag, False) for flag in flags)
        and all(isinstance(each, nn.Parameter) and each.ndim == 3 for each in matrices)
    )


@contextmanager
def replaced_by_products(modules: list[nn.Module], record: Record) -> Iterator[None]:
    """Take the calls of attention and experts as products, and tell of each.

    Args:
        modules: Those that have matrices of their own; attention is found by its function.
        record: Gets every product in the order of the calls.
    """
    refused: set[nn.Module] = set()

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        if module in refused:
            return None
        products = _Products(record, module)
        found = _of_experts(module, products, *args, **kwargs)
        if found is None or not _is_close(found, output):
            refused.add(module)  # it has no factors, and is warned of by name
            return None
        products.tell()
        return found

    handles = [
        module.register_forward_hook(hook, with_kwargs=True)
        for module in modules
        if is_experts(module)
    ]
    try:
        with _Attention(record):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Products:
    """Products of one call, which are told of once the call is known to be made of them."""

    def __init__(self, record: Record, module: nn.Module | None) -> None:
        self._record, self._module = record, module
        self._made: list[tuple[Any, ...]] = []

    def __call__(
        self,
        parameter: Tensor,
        x: Tensor,
        bias: Tensor | None = None,
        block: Block | None = None,
        routed: Routed | None = None,
    ) -> Tensor:
        """Multiply x, samples first, by a parameter, or by one of the matrices in it."""
        weight = parameter
        if block is not None:
            weight = weight.unflatten(0, (block.of, -1))[block.number].flatten(0, -2)
        output = functional.linear(x, weight, bias)
        self._made.append((parameter, self._module, x, output, block, routed))
        return output

    def tell(self) -> None:
        """Tell of all."""
        for made in self._made:
            self._record(*made)


def _of_experts(
    module: Any, product: _Products, x: Tensor, index: Tensor, weights: Tensor, *rest: Any
) -> Tensor | None:
    """Return what experts make of tokens (tokens, d), each by those in ``index`` (tokens, k)."""
    if rest or x.ndim != 2 or index.ndim != 2 or index.shape != weights.shape:
        return None
    up, down = getattr(module, _up_name(module)), module.down_proj
    hidden = module._apply_gate if getattr(module, "has_gate", True) else module.act_fn
    total = torch.zeros_like(x)
    for number in range(len(up)):
        chosen = index == number
        places = chosen.any(1).nonzero()[:, 0]
        share = torch.where(chosen, weights, 0).sum(1)[places]
        block, routed = Block(number, len(up)), Routed(places, len(x))
        rows = hidden(product(up, x[places], None, block, routed))
        rows = product(down, rows, None, block, routed) * share[:, None]
        total = total.index_add(0, places, rows.to(total.dtype))
    return total


def _is_close(found: Tensor, expected: object) -> bool:
    """Whether two results are equal but for rounding; if not finite, an error of its own."""
    if not isinstance(expected, Tensor) or found.shape != expected.shape:
        return False
    allowed = outputs_tolerance(expected.dtype)
    difference = (found - expected).detach().abs()
    return not bool((difference > allowed * expected.detach().abs().max()).any())


class _Attention(TorchFunctionMode):
    """Takes torch's attention as products; its fused kernels are not chosen meanwhile."""

    _signature = inspect.signature(functional.multi_head_attention_forward)

    def __init__(self, record: Record) -> None:
        super().__init__()
        self._record = record

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one function."""
        if func is functional.multi_head_attention_forward:
            given = self._signature.bind(*args, **(kwargs or {}))
            given.apply_defaults()
            if given.arguments["static_k"] is None and given.arguments["static_v"] is None:
                return _of_attention(_Products(self._record, None), given.arguments)
        return func(*args, **(kwargs or {}))


def _of_attention(products: _Products, given: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Return what attention does, and tell of its products; arguments are those of the function."""

    def product(parameter: Tensor, x: Tensor, bias: Tensor | None, block: Block | None) -> Tensor:
        # The function has the samples in the second dimension.
        if x.ndim < 3:
            return products(parameter, x, bias, block)
        return products(parameter, x.transpose(0, 1), bias, block).transpose(0, 1)

    read = [given[name] for name in ("query", "key", "value")]
    weight, bias = given["in_proj_weight"], given["in_proj_bias"]
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    if given["use_separate_proj_weight"]:
        own = [given[f"{name}_proj_weight"] for name in "qkv"]
        qkv = [product(p, x, b, None) for p, x, b in zip(own, read, biases, strict=True)]
    elif read[0] is read[1] is read[2]:
        qkv = list(product(weight, read[0], bias, None).chunk(3, -1))
    else:
        qkv = [
            product(weight, x, b, Block(i, 3))
            for i, (x, b) in enumerate(zip(read, biases, strict=True))
        ]
    eye = torch.eye(qkv[0].shape[-1], dtype=given["out_proj_weight"].dtype, device=qkv[0].device)
    identities = {f"{name}_proj_weight": eye for name in ("q", "k", "v", "out")}
    projected = dict(zip(("query", "key", "value"), qkv, strict=True))
    nothing = dict.fromkeys(("in_proj_weight", "in_proj_bias", "out_proj_bias"))
    between = given | projected | nothing | identities | {"use_separate_proj_weight": True}
    y, weights = functional.multi_head_attention_forward(**between)
    y = product(given["out_proj_weight"], y, given["out_proj_bias"], None)
    products.tell()
    return y, weights
