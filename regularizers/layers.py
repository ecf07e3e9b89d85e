r"""Linear and convolution layers as matrices: y_t = W a_t + b at every position t.

For a linear layer a_t is its input vector; for a convolution it is the patch under the kernel, in
the order of ``weight.flatten(1)``, and t runs over the output's pixels. What the layer reads, the
rows a_t, and the place in the graph where its output appears are recorded while the model runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional

from ars.regularizers.estimators import IGNORE_INDEX, accumulation_dtype
from ars.regularizers.evaluation import evaluation_mode

__all__ = [
    "MatrixLayer",
    "Use",
    "batched_rows",
    "input_rows",
    "matrix_layers",
    "output_rows",
    "recorded_uses",
]

MatrixModule: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
# Of a subclass that computes something else the inputs and outputs are not those of a product.
_FORWARDS = {kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}


@dataclass(frozen=True)
class MatrixLayer:
    """The layers that share one weight.

    Args:
        modules: Them, by their names in the model; several if the weight is tied.
        bias: Name of the bias that is trained with the weight, or None.
    """

    modules: dict[str, MatrixModule]
    bias: str | None


class Use(NamedTuple):
    """One call of a layer.

    Args:
        weight: Name of its weight.
        module: The layer.
        inputs: What it read.
        output: Where its output appears in the graph, before anything overwrites it in place; None
            without a graph.
    """

    weight: str
    module: MatrixModule
    inputs: Tensor
    output: GradientEdge | None


def matrix_layers(model: nn.Module) -> dict[str, MatrixLayer]:
    """Find the linear and ungrouped convolution layers whose weight is trained.

    Args:
        model: The model.

    Returns:
        Name of the weight, as in ``named_parameters()``, -> its layers, in the model's order.

    Raises:
        ValueError: Two layers share a weight, but not their bias.
    """
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
    layers: dict[str, MatrixLayer] = {}
    for path, module in model.named_modules():
        if not isinstance(module, MatrixModule) or type(module).forward not in _FORWARDS:
            continue
        if module.weight not in names:
            continue
        if not isinstance(module, nn.Linear) and module.groups > 1:
            continue
        weight = names[module.weight]
        bias = None if module.bias is None else names.get(module.bias)
        layer = layers.setdefault(weight, MatrixLayer({}, bias))
        if layer.bias != bias:
            first = next(iter(layer.modules))
            raise ValueError(
                f"{first!r} and {path!r} share the weight {weight!r}, but not their bias, so the "
                "two have no common matrix; share the bias too, or freeze both biases"
            )
        layer.modules[path] = module
    return layers


@contextmanager
def recorded_uses(model: nn.Module, layers: dict[str, MatrixLayer]) -> Iterator[list[Use]]:
    """Run ``model`` in evaluation mode and record every call of its layers.

    Training flags and hooks are as before afterwards, whatever happens.

    Args:
        model: The model.
        layers: What :func:`matrix_layers` found in it.

    Yields:
        The record, in the order of the calls; empty it before each forward pass.
    """
    uses: list[Use] = []

    def record(weight: str, module: MatrixModule, inputs: Tensor, output: Tensor) -> None:
        edge = get_gradient_edge(output) if output.requires_grad else None
        uses.append(Use(weight, module, inputs.detach(), edge))

    def hook(weight: str) -> Any:
        def call(module: Any, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
            record(weight, module, args[0] if args else kwargs["input"], output)

        return call

    handles = [
        module.register_forward_hook(hook(weight), with_kwargs=True)
        for weight, layer in layers.items()
        for module in layer.modules.values()
    ]
    try:
        with evaluation_mode(model):
            yield uses
    finally:
        for handle in handles:
            handle.remove()


def input_rows(module: MatrixModule, inputs: Tensor) -> Tensor:
    """Return what a layer multiplies its weight matrix with, one row a position.

    Args:
        module: A linear layer, or a convolution with one group.
        inputs: What it read: (..., d), or (B, C, pixels...).

    Returns:
        Shape (positions, d); d = C * kernel elements for a convolution.
    """
    if isinstance(module, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1])
    patches = functional.pad(inputs, _padding(module), mode=_padding_mode(module))
    sizes = zip(module.kernel_size, module.dilation, module.stride, strict=True)
    for i, (kernel, dilation, stride) in enumerate(sizes):
        patches = patches.unfold(2 + i, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    # (B, C, pixels..., kernel...) -> (B, pixels..., C, kernel...)
    return patches.movedim(1, 1 + i + 1).reshape(-1, module.weight[0].numel())


def output_rows(module: MatrixModule, outputs: Tensor) -> Tensor:
    """Return a layer's outputs, or their gradient, one row a position.

    Args:
        module: A linear layer, or a convolution.
        outputs: Of the shape it returns: (..., p), or (B, p, pixels...).

    Returns:
        Shape (positions, p), positions in the order of :func:`input_rows`.
    """
    if not isinstance(module, nn.Linear):
        outputs = outputs.movedim(1, -1)
    return outputs.reshape(-1, outputs.shape[-1])


def batched_rows(uses: list[Use], targets: Tensor, *, with_bias: bool) -> tuple[Tensor, Tensor]:
    """Return what one weight multiplied in a batch, and which of it belongs to a target.

    Args:
        uses: All calls with that weight, at least one.
        targets: int64, (B,) or (B, T), -100 where masked.
        with_bias: Append a 1 to every row.

    Returns:
        Rows (B, t, d) in float32 at least, and Booleans (B, t). Where a layer has as many positions
        as there are targets, each position goes by its own; otherwise those of a sample with any
        target all count.

    Raises:
        ValueError: The positions of a layer are not a multiple of B.
    """
    rows, valid = [], []
    batch = len(targets)
    unmasked = (targets != IGNORE_INDEX).reshape(batch, -1)  # (B, T)
    for use in uses:
        part = input_rows(use.module, use.inputs)
        if len(part) % batch:
            raise ValueError(
                f"the layer of {use.weight!r} has {len(part)} positions for {batch} samples: each "
                "sample must pass through it by itself; fit on batches of one sample"
            )
        part = part.to(accumulation_dtype(part.dtype)).unflatten(0, (batch, -1))
        rows.append(functional.pad(part, (0, 1), value=1.0) if with_bias else part)
        own = part.shape[1] == unmasked.shape[1]
        valid.append(unmasked if own else unmasked.any(1, keepdim=True).expand(part.shape[:2]))
    return torch.cat(rows, 1), torch.cat(valid, 1)


def _padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """Return the padding as torch.nn.functional.pad takes it: last dimension first."""
    if module.padding == "valid":
        pairs = [(0, 0) for _ in module.kernel_size]
    elif module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = [(int(p), int(p)) for p in module.padding]
    return [p for pair in reversed(pairs) for p in pair]


def _padding_mode(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> str:
    return "constant" if module.padding_mode == "zeros" else module.padding_mode
