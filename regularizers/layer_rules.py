r"""Per-sample gradients of the layers that are known, from what went in and what came back.

For a layer's parameters, given its input x and the gradient g of its output,

    Linear       W: sum_t g_t x_t^T                   b: sum_t g_t
    Conv         as Linear, x unfolded into patches   b: sum over the output's positions
    Embedding    row v: sum of the g_t with id_t = v
    norms        w: sum_t g_t x^_t                    b: sum_t g_t,    x^ normalised without w, b

A rule belongs to a ``forward``, not to a class: a subclass that computes something else is unknown.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ars.regularizers.contributions import Contribution, Outer, Patches, Rows, Sums
from ars.regularizers.estimators import accumulation_dtype

__all__ = ["Rule", "rule_of", "to_samples"]

# Contributions by parameter name, from the module, its input and its output's gradient, both with
# the samples in front: (N, ...).
Rule = Callable[[nn.Module, Tensor, Tensor], dict[str, Contribution]]

# Elements of unfolded patches to hold at once; 32 MiB of fp32.
PATCHES = 2**23


def to_samples(tensor: Tensor, dim: int, samples: int) -> Tensor:
    """Bring the samples to the front: (..., N * s, ...) with ``dim`` N * s becomes (N, s, ...)."""
    moved = tensor.movedim(dim, 0)
    return moved.reshape(samples, moved.shape[0] // samples, *moved.shape[1:])


def _full(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor.dtype))


def _linear(module: nn.Linear, x: Tensor, g: Tensor) -> dict[str, Contribution]:
    x, g = x.flatten(1, -2), g.flatten(1, -2)  # (N, T, d), (N, T, p)
    return {"weight": Outer(g[:, :, None], x[:, :, None]), "bias": Sums(_full(g).sum(1))}


def _embedding(module: nn.Embedding, ids: Tensor, g: Tensor) -> dict[str, Contribution]:
    if module.padding_idx is not None:
        g = g * (ids != module.padding_idx)[..., None]
    return {"weight": Rows(ids.flatten(1).long(), g.flatten(1, -2))}


def _conv(module: nn.Conv1d | nn.Conv2d, x: Tensor, g: Tensor) -> dict[str, Contribution]:
    # Samples (N, s, C, ...); a 1d convolution is a 2d one of height 1.
    samples = len(x)
    flat = module.kernel_size if len(module.kernel_size) == 2 else (1, *module.kernel_size)
    stride, dilation = (
        pair if len(pair) == 2 else (1, *pair) for pair in (module.stride, module.dilation)
    )

    def outer(part: slice) -> Outer:
        images, gradients = x[part].flatten(0, 1), g[part].flatten(0, 1)
        padding = module._reversed_padding_repeated_twice
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        images = functional.pad(images, padding, mode=mode)
        if images.ndim == 3:
            images = images.unsqueeze(2)
        patches = functional.unfold(images, flat, dilation=dilation, stride=stride)
        split = (len(x[part]), -1, module.groups)
        # (N s, C k, L) -> (N, s L, groups, C k / groups), and so for the gradient.
        patches = patches.mT.reshape(*split, patches.shape[1] // module.groups)
        gradients = gradients.flatten(2).mT
        return Outer(gradients.reshape(*split, module.out_channels // module.groups), patches)

    unfolded = g[0, :, 0].numel() * x.shape[2] * math.prod(flat)  # elements a sample
    weight = Patches(samples, max(1, PATCHES // unfolded), outer)
    bias = Sums(_full(g).transpose(1, 2).flatten(2).sum(2))
    return {"weight": weight, "bias": bias}


def _affine(normalised: Tensor, g: Tensor, dims: tuple[int, ...]) -> dict[str, Contribution]:
    weight = (_full(g) * normalised).sum(dims)
    return {"weight": Sums(weight), "bias": Sums(_full(g).sum(dims))}


def _layer_norm(module: nn.LayerNorm, x: Tensor, g: Tensor) -> dict[str, Contribution]:
    shape = module.normalized_shape
    normalised = functional.layer_norm(_full(x), shape, eps=module.eps)
    return _affine(normalised, g, tuple(range(1, x.ndim - len(shape))))


def _rms_norm(module: nn.RMSNorm, x: Tensor, g: Tensor) -> dict[str, Contribution]:
    shape = module.normalized_shape
    # eps None is the smallest of the dtype that the layer itself computed in.
    eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
    normalised = functional.rms_norm(_full(x), shape, eps=eps)
    return _affine(normalised, g, tuple(range(1, x.ndim - len(shape))))


def _group_norm(module: nn.GroupNorm, x: Tensor, g: Tensor) -> dict[str, Contribution]:
    flat = functional.group_norm(_full(x).flatten(0, 1), module.num_groups, eps=module.eps)
    return _affine(flat.view(x.shape), g, (1, *range(3, x.ndim)))


def _batch_norm(module: nn.BatchNorm2d, x: Tensor, g: Tensor) -> dict[str, Contribution]:
    mean, var = module.running_mean, module.running_var
    flat = functional.batch_norm(_full(x).flatten(0, 1), mean, var, eps=module.eps)
    return _affine(flat.view(x.shape), g, (1, *range(3, x.ndim)))


# Beside the rule: whether the samples may be in another dimension than the first of the input.
_RULES: dict[object, tuple[Callable[..., dict[str, Contribution]], bool]] = {
    nn.Linear.forward: (_linear, True),
    nn.Embedding.forward: (_embedding, True),
    nn.LayerNorm.forward: (_layer_norm, True),
    nn.RMSNorm.forward: (_rms_norm, True),
    nn.Conv1d.forward: (_conv, False),
    nn.Conv2d.forward: (_conv, False),
    nn.GroupNorm.forward: (_group_norm, False),
    nn.BatchNorm1d.forward: (_batch_norm, False),
}


def rule_of(module: nn.Module) -> tuple[Rule, bool] | None:
    """Return the module's rule, and whether it takes the samples in any dimension; None if unknown.

    Args:
        module: In evaluation mode.
    """
    if "forward" in vars(module):
        return None  # somebody's own
    if isinstance(module, nn.Embedding) and (module.scale_grad_by_freq or module.max_norm):
        return None
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
        return None  # mixes the samples
    return _RULES.get(type(module).forward)
