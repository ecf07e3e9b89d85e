r"""Subspaces of a layer's inputs, from their streamed second moments.

Of activations a_n only C = 1/N sum_n a_n a_n^T is kept, (d, d) a layer while it is being built; its
eigenvectors are the right singular vectors of the matrix of all a_n.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ars.regularizers.bases import check_size, covariance_basis
from ars.regularizers.checks import check_names
from ars.regularizers.estimators import accumulation_dtype

__all__ = ["activation_bases", "activation_covariance"]


def activation_bases(
    model: nn.Module,
    activations: Mapping[str, Tensor] | Iterable[Any],
    names: Iterable[str] | None = None,
    *,
    energy: float | None = None,
    rank: int | None = None,
) -> dict[str, Tensor]:
    """Span of the leading directions of each layer's inputs.

    Args:
        model: The model.
        activations: Second moments (d, d) by parameter or module name, or batches.
        names: Parameters; by default all in the mapping, or that the batches reach.
        energy: Fraction of the second moment to keep, in (0, 1].
        rank: Instead of ``energy``: how many directions, at most.

    Returns:
        U by parameter name, (d, k).

    Raises:
        ValueError: A name that the model or the mapping does not have, or what the functions below
            refuse.
    """
    check_size(energy, rank)
    if isinstance(activations, Mapping):
        known = dict(model.named_parameters(remove_duplicate=False))
        covariances = {
            name if name in known else f"{name}.weight": covariance
            for name, covariance in activations.items()
        }
        wanted = list(covariances) if names is None else list(names)
        for name in wanted:
            if name not in covariances:
                raise ValueError(f"activations lack {name!r}, which names asks for")
        covariances = {name: covariances[name] for name in wanted}
    else:
        covariances = activation_covariance(model, activations, names)
    check_names(covariances, model, "activations")
    return {
        name: covariance_basis(f"the covariance of {name!r}", c, energy=energy, rank=rank)
        for name, c in covariances.items()
    }


def activation_covariance(
    model: nn.Module, batches: Iterable[Any], names: Iterable[str] | None = None
) -> dict[str, Tensor]:
    r"""Second moment of the inputs of linear and convolutional layers, :math:`\frac1N \sum a a^T`.

    One forward pass a batch, without gradients and in evaluation mode; only one (d, d) matrix a
    layer is kept. N counts positions: tokens, or the places of a convolution's kernel.

    Args:
        model: The model; ``nn.Linear``, ``nn.Conv1d`` and ``nn.Conv2d`` are looked at.
        batches: Inputs of the model, or tuples that begin with them, such as (inputs, targets).
        names: Weights to look at, by parameter name; by default all of such layers that are used.

    Returns:
        C by parameter name, (d, d) float32 (float64 for float64 inputs). d is the number of columns
        of the weight flattened from dimension 1 on, so a convolution's patches are ordered (C, k).

    Raises:
        TypeError: A batch holds no tensor.
        ValueError: A name that is no weight of such a layer, a layer that is not used or has
            groups, or no batches.
    """
    first: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    layers: dict[str, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            layers.setdefault(first[module.weight], []).append(module)
    wanted = layers.keys() if names is None else list(names)
    for name in wanted:
        if name not in layers:
            raise ValueError(
                f"{name!r} is not the weight of an nn.Linear, nn.Conv1d or nn.Conv2d; "
                f"choose among {list(layers)}, or compute its covariance yourself"
            )
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        rows = _rows(name, module, inputs[0].detach())
        with torch.autocast(device_type=rows.device.type, enabled=False):
            sums[name] = sums.get(name, 0) + rows.T @ rows
        counts[name] = counts.get(name, 0) + len(rows)

    handles = [
        module.register_forward_pre_hook(lambda m, x, name=name: add(name, m, x))
        for name in wanted
        for module in layers[name]
    ]
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            for index, batch in enumerate(batches):
                inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
                if not isinstance(inputs, Tensor):
                    raise TypeError(
                        f"batch {index} must be a tensor or a tuple that begins with one, "
                        f"got {type(inputs).__name__}"
                    )
                model(inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training.items():
            module.training = flag
    unused = [name for name in wanted if name not in sums]
    if not sums or (names is not None and unused):
        raise ValueError(
            f"no input reached {unused or 'any layer'}: give at least one batch, "
            "and only layers that the model's forward calls as modules"
        )
    return {name: total / counts[name] for name, total in sums.items()}


def _rows(name: str, module: nn.Module, inputs: Tensor) -> Tensor:
    """Return the vectors that the flattened weight multiplies, one a row."""  # noqa: DOC501
    inputs = inputs.to(accumulation_dtype(inputs.dtype))
    if isinstance(module, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1])
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise ValueError(
            f"the layer of {name!r} has groups={module.groups}, padding={module.padding!r}, "
            f"padding_mode={module.padding_mode!r}; its patches are known for groups=1 and a "
            "number of zeros only: compute its covariance yourself, or name the other layers"
        )
    batched = inputs if inputs.ndim == module.weight.ndim else inputs[None]
    dilation, padding, stride = module.dilation, module.padding, module.stride
    kernel = module.kernel_size
    if isinstance(module, nn.Conv1d):  # an image one pixel high
        batched = batched.unsqueeze(2)
        kernel, dilation, stride = (1, *kernel), (1, *dilation), (1, *stride)
        padding = (0, *padding)
    patches = functional.unfold(batched, kernel, dilation, padding, stride)  # (B, C k, places)
    return patches.mT.reshape(-1, patches.shape[1])
