r"""Per-sample gradients of the layers that are known, from what went in and what came back.

For a layer's parameters, given its input x and the gradient g of its output,

    Linear       W: sum_t g_t x_t^T                   b: sum_t g_t    (Conv1D of GPT-2: W^T)
    Conv         as Linear, x unfolded into patches   b: sum over the output's positions
    Embedding    row v: sum of the g_t with id_t = v
    norms        w: sum_t g_t x^_t                    b: sum_t g_t,    x^ normalised without w, b

A rule belongs to a ``forward``, not to a class: a subclass that computes something else is unknown.
An unknown module that has no layers of its own below it, such as somebody's norm, is differentiated
by itself, sample by sample, with the same x and g.

What a rule returns, the contribution of one use of a parameter to the gradient of each sample, is
kept unsummed and unformed. Each kind knows two things: to add the squares of its samples' gradients
to a sum, for a parameter with this one use, and to add one sample's gradient to a scratch tensor,
for a parameter whose uses (a tied embedding and head) must be added before they are squared.

The squares of a matrix's gradients,

    total += sum_n (sum_t g_nt a_nt^T)^2                                     (eq. 11)

are the product of two squared matrices if T = 1. Otherwise no formula is cheaper than the N
gradients themselves, 2 N T p d operations; what differs is where they live:

    scratch   some rows of one, or a few small ones, in memory, squared by a second operation
    kernel    in registers (:mod:`ars.csrc_triton.fisher`), on a GPU in half precision

Nothing of the size of N gradients is ever held.
"""

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn import functional

from ars.csrc_triton import has_triton
from ars.regularizers.fisher.estimators import accumulation_dtype

__all__ = [
    "Contribution",
    "Outer",
    "Patches",
    "Rows",
    "Rule",
    "Sums",
    "add_squared_products_",
    "add_squares_of_uses_",
    "can_be_differentiated",
    "choose_squares",
    "differentiated",
    "is_known_to_mix",
    "is_transposed",
    "patches_of",
    "rule_of",
    "to_samples",
]

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
# Elements of unfolded patches, or of single gradients, to hold at once; 32 MiB of fp32.
PATCHES = 2**23
# Elements of the scratch, and below which several samples share it. On a CPU it and its part of
# the sum, 1 MiB each, stay in a core's cache; a GPU wants large products.
SCRATCH = {"cpu": 2**18}
SHARED = {"cpu": 2**14}
GPU_SCRATCH = 2**24
GPU_SHARED = 2**18
# The scratch costs 16 bytes of traffic an element and sample whatever T, its product as much as the
# kernel's, but on a library that may be a quarter faster: at 4.8 TB/s and 700 Tflop/s, by count of
# bytes and operations, the two ways meet near T = 3500.
LONG = 3500
# Elements below which a matrix has too few tiles for a GPU; products of a batch fill it better.
SMALL = 2**16


class Contribution(Protocol):
    """One use of a parameter by all samples."""

    def add_squares_(self, total: Tensor) -> None:
        """Add the squared gradients of all samples to ``total``, of the parameter's shape."""
        ...

    def add_to_(self, scratch: Tensor, n: int) -> None:
        """Add the gradient of sample n to ``scratch``, of the parameter's shape."""
        ...


class Sums(NamedTuple):
    """Gradients that are small enough to be formed: (N, *shape)."""

    gradients: Tensor

    def add_squares_(self, total: Tensor) -> None:
        """Add the squares."""
        total += self.gradients.to(total.dtype).square().sum(0)

    def add_to_(self, scratch: Tensor, n: int) -> None:
        """Add one sample's."""
        scratch += self.gradients[n]


class Outer(NamedTuple):
    """Sums of outer products, a matrix for each sample.

    Args:
        g: (N, T, p), the gradients of the outputs.
        a: (N, T, d), the inputs; the parameter has p * d elements in this order.
    """

    g: Tensor
    a: Tensor

    def add_squares_(self, total: Tensor) -> None:
        """Add the squares."""
        add_squared_products_(total.view(self.g.shape[2], self.a.shape[2]), self.g, self.a)

    def add_to_(self, scratch: Tensor, n: int) -> None:
        """Add one sample's product."""
        g, a = self.g[n].to(scratch.dtype), self.a[n].to(scratch.dtype)
        scratch.view(g.shape[1], a.shape[1]).addmm_(g.mT, a)


class Patches(NamedTuple):
    """Outer products whose inputs are too large to be unfolded for all samples at once.

    Args:
        samples: N.
        size: Samples to unfold together.
        outer: Forms the products of some samples.
    """

    samples: int
    size: int
    outer: Callable[[slice], Outer]

    def add_squares_(self, total: Tensor) -> None:
        """Add the squares, some samples at a time."""
        for start in range(0, self.samples, self.size):
            self.outer(slice(start, start + self.size)).add_squares_(total)

    def add_to_(self, scratch: Tensor, n: int) -> None:
        """Add one sample's."""
        self.outer(slice(n, n + 1)).add_to_(scratch, 0)


class Pieces(NamedTuple):
    """Gradients that are formed for some samples at a time.

    Args:
        samples: N.
        size: Samples to take together.
        gradients: Those of some samples, (n, *shape).
    """

    samples: int
    size: int
    gradients: Callable[[slice], Tensor]

    def add_squares_(self, total: Tensor) -> None:
        """Add the squares, some samples at a time."""
        for start in range(0, self.samples, self.size):
            Sums(self.gradients(slice(start, start + self.size))).add_squares_(total)

    def add_to_(self, scratch: Tensor, n: int) -> None:
        """Add one sample's."""
        scratch += self.gradients(slice(n, n + 1))[0]


class Rows(NamedTuple):
    """Rows of an embedding: the gradient of row v is the sum of those positions that read it.

    Args:
        ids: (N, T), int64.
        g: (N, T, d).
    """

    ids: Tensor
    g: Tensor

    def add_squares_(self, total: Tensor) -> None:
        """Add the squares: sums over equal (sample, id), then squares over equal id.

        By sorting, so that nothing of a vocabulary's size is made and no sum's order is left to
        chance, as it would be with a GPU's atomic additions.
        """
        samples = len(self.ids)
        numbers = torch.arange(samples, device=self.ids.device)[:, None]
        # (id, sample) in this order: equal ids end up side by side for the second sum.
        key, order = (self.ids * samples + numbers).flatten().sort(stable=True)
        rows = self.g.flatten(0, 1)[order].to(total.dtype)
        key, sizes = key.unique_consecutive(return_counts=True)
        squares = _segment_sums(rows, sizes).square_()
        ids, sizes = (key // samples).unique_consecutive(return_counts=True)
        total.index_add_(0, ids, _segment_sums(squares, sizes))

    def add_to_(self, scratch: Tensor, n: int) -> None:
        """Add one sample's."""
        key, order = self.ids[n].sort(stable=True)
        ids, sizes = key.unique_consecutive(return_counts=True)
        scratch.index_add_(0, ids, _segment_sums(self.g[n][order].to(scratch.dtype), sizes))


def _segment_sums(rows: Tensor, sizes: Tensor) -> Tensor:
    """Sum consecutive rows, ``sizes`` of them at a time, in their order."""
    if rows.device.type == "cpu":  # a loop there; 5 times faster than segment_reduce
        segment = torch.arange(len(sizes)).repeat_interleave(sizes)
        return rows.new_zeros(len(sizes), rows.shape[1]).index_add_(0, segment, rows)
    return torch.segment_reduce(rows, "sum", lengths=sizes)


def add_squares_of_uses_(total: Tensor, uses: Sequence[Contribution], samples: int) -> None:
    """Add the squares of the summed uses of a parameter.

    Args:
        total: Of the parameter's shape.
        uses: Everything the samples' gradients consist of.
        samples: N.
    """
    if len(uses) == 1:
        uses[0].add_squares_(total)
        return
    small = [use.gradients for use in uses if isinstance(use, Sums)]
    if len(small) == len(uses):
        Sums(torch.stack(small).sum(0)).add_squares_(total)
        return
    scratch = torch.empty_like(total)
    for n in range(samples):
        scratch.zero_()
        for use in uses:
            use.add_to_(scratch, n)
        total.addcmul_(scratch, scratch)


def choose_squares(
    device: torch.device, dtype: torch.dtype, positions: int, numel: int, *, aligned: bool
) -> Literal["squared", "scratch", "kernel"]:
    """Choose how to add up the squares.

    Args:
        device: Of all operands.
        dtype: Of g and a, the narrower if they differ.
        positions: T.
        numel: Elements of the sum, p d.
        aligned: Whether 16 bytes divide every row of g and a: the kernel reads others by element.

    Returns:
        ``squared`` for two squared matrices, ``scratch`` or ``kernel``. fp32 goes to the scratch:
        without tensor cores there is nothing to gain on the library's product.
    """
    if positions == 1:
        return "squared"
    if (
        device.type == "cuda"
        and dtype in {torch.bfloat16, torch.float16}
        and positions <= LONG
        and numel >= SMALL
        and aligned
        and has_triton()
    ):
        return "kernel"
    return "scratch"


def add_squared_products_(
    total: Tensor, g: Tensor, a: Tensor, offsets: Tensor | None = None
) -> None:
    r"""Add :math:`\sum_n (\sum_t g_{nt} a_{nt}^T)^2` to ``total`` in place.

    Products are summed in the dtype of ``total``. On a GPU, of operands that differ in precision
    the wider may be rounded to the narrower, as autocast does before the product itself.

    Args:
        total: Shape (p, d), float32 or float64, contiguous.
        g: Gradients of a matrix product's outputs, floating point, shape (N, T, p); or, with
            ``offsets``, (rows, p).
        a: Its inputs, shape (N, T, d); or (rows, d).
        offsets: int64, (N + 1,), non-decreasing from 0 to rows: sample n has rows
            ``offsets[n]`` to ``offsets[n + 1]``.

    Raises:
        ValueError: The shapes do not fit.

    Example:
        >>> import torch
        >>> from ars.regularizers.fisher.rules import add_squared_products_
        >>> total = torch.zeros(1, 1)
        >>> g = torch.tensor([[[1.0], [1.0]], [[1.0], [-1.0]]])  # two samples of two positions
        >>> add_squared_products_(total, g, torch.ones(2, 2, 1))
        >>> total  # (1 + 1)^2 + (1 - 1)^2
        tensor([[4.]])
    """
    _check_products(total, g, a, offsets)
    samples = len(g) if offsets is None else len(offsets) - 1
    if not (samples and g.shape[-2] and total.numel()):
        return
    positions = g.shape[1] if offsets is None else max(2, len(g) // samples)
    narrow = min(g.dtype, a.dtype, key=lambda dtype: dtype.itemsize)
    aligned = all(t.stride(-2) * narrow.itemsize % 16 == 0 and t.stride(-1) == 1 for t in (g, a))
    way = choose_squares(total.device, narrow, positions, total.numel(), aligned=aligned)
    if way == "kernel" and total.dtype == torch.float32:
        from ars.csrc_triton import fisher

        fisher.add_squared_products_(total, g.to(narrow), a.to(narrow), offsets)
        return
    if way == "squared":
        g, a = g[:, 0].to(total.dtype), a[:, 0].to(total.dtype)
        total.addmm_(g.square().mT, a.square())
        return
    # A GPU multiplies half precision into fp32; elsewhere the operands are converted.
    halves = total.device.type == "cuda" and total.dtype == torch.float32 and narrow.itemsize == 2
    operand = narrow if halves else total.dtype
    g, a = g.to(operand), a.to(operand)
    if offsets is None:
        _add_by_scratch(total, g, a)
        return
    for start, end in itertools.pairwise(offsets.tolist()):
        _add_by_scratch(total, g[None, start:end], a[None, start:end])


def _add_by_scratch(total: Tensor, g: Tensor, a: Tensor) -> None:
    size = SCRATCH.get(total.device.type, GPU_SCRATCH)
    if total.numel() <= SHARED.get(total.device.type, GPU_SHARED):
        together = max(1, size // total.numel())
        for gradients, inputs in zip(g.split(together), a.split(together), strict=True):
            if g.dtype == total.dtype:
                products = torch.bmm(gradients.mT, inputs)
            else:
                products = torch.bmm(gradients.mT, inputs, out_dtype=total.dtype)
            total += products.square_().sum(0)
        return
    rows = max(1, size // total.shape[1])
    for part, columns in zip(total.split(rows), g.split(rows, dim=2), strict=True):
        scratch = torch.empty_like(part)
        for gradient, inputs in zip(columns, a, strict=True):
            if g.dtype == total.dtype:
                torch.mm(gradient.mT, inputs, out=scratch)
            else:
                torch.mm(gradient.mT, inputs, out_dtype=total.dtype, out=scratch)
            part.addcmul_(scratch, scratch)


def _check_products(total: Tensor, g: Tensor, a: Tensor, offsets: Tensor | None) -> None:
    dimensions = 3 if offsets is None else 2
    if (
        g.ndim != dimensions
        or a.ndim != dimensions
        or g.shape[:-1] != a.shape[:-1]
        or total.shape != (g.shape[-1], a.shape[-1])
    ):
        expected = "(N, T, p), (N, T, d)" if offsets is None else "(rows, p), (rows, d)"
        raise ValueError(
            f"g {tuple(g.shape)}, a {tuple(a.shape)} and total {tuple(total.shape)} do not fit; "
            f"expected {expected} and (p, d)"
        )
    if offsets is not None and (
        offsets.ndim != 1 or len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(g)
        or (offsets.diff() < 0).any()
    ):  # fmt: skip
        raise ValueError(
            f"offsets must rise from 0 to the {len(g)} rows, got shape {tuple(offsets.shape)}"
        )


# Contributions by parameter name, from the module, its input and its output's gradient, both with
# the samples in front: (N, ...).
Rule = Callable[[nn.Module, Tensor, Tensor], dict[str, Contribution]]


def to_samples(tensor: Tensor, dim: int, samples: int) -> Tensor:
    """Bring the samples to the front: (..., N * s, ...) with ``dim`` N * s becomes (N, s, ...)."""
    moved = tensor.movedim(dim, 0)
    return moved.reshape(samples, moved.shape[0] // samples, *moved.shape[1:])


def _full(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor.dtype))


def _linear(module: nn.Linear, x: Tensor, g: Tensor) -> dict[str, Contribution]:
    x, g = x.flatten(1, -2), g.flatten(1, -2)  # (N, T, d), (N, T, p)
    return {"weight": Outer(g, x), "bias": Sums(_full(g).sum(1))}


def _transposed_linear(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Contribution]:
    x, g = x.flatten(1, -2), g.flatten(1, -2)  # (N, T, d), (N, T, p); the weight is (d, p)
    return {"weight": Outer(x, g), "bias": Sums(_full(g).sum(1))}


def _embedding(module: nn.Embedding, ids: Tensor, g: Tensor) -> dict[str, Contribution]:
    if module.padding_idx is not None:
        g = g * (ids != module.padding_idx)[..., None]
    return {"weight": Rows(ids.flatten(1).long(), g.flatten(1, -2))}


def patches_of(module: Convolution, images: Tensor) -> Tensor:
    """Return what a convolution multiplies its kernel with, one column for each output pixel.

    Args:
        module: The convolution.
        images: What it read, (B, C, pixels...).

    Returns:
        Shape (B, C * kernel elements, output pixels), in the order of ``weight.flatten(1)``.
    """
    patches = _padded(module, images)
    sizes = zip(module.kernel_size, module.dilation, module.stride, strict=True)
    for i, (kernel, dilation, stride) in enumerate(sizes):
        patches = patches.unfold(2 + i, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    # (B, C, pixels..., kernel...) -> (B, C, kernel..., pixels...)
    pixels = range(2, images.ndim)
    patches = patches.movedim(tuple(pixels), tuple(range(-len(pixels), 0)))
    return patches.reshape(len(images), images.shape[1] * math.prod(module.kernel_size), -1)


def _padded(module: Convolution, images: Tensor) -> Tensor:
    padding = module._reversed_padding_repeated_twice  # as torch.nn.functional.pad takes it
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return functional.pad(images, padding, mode=mode)


def _grouped_conv(module: Convolution, x: Tensor, g: Tensor) -> Contribution:
    """The weight's gradients by torch's own kernel, samples as further groups of channels.

    Single groups are too small for products: those of 256 channels took 10 times as long.
    """
    shape = module.weight.shape

    def gradients(part: slice) -> Tensor:
        # (n, s, C, ...) -> (s, n C, ...): the kernel sums over s.
        images, outputs = (_full(t[part]).transpose(0, 1).flatten(1, 2) for t in (x, g))
        samples = len(x[part])
        like = outputs.new_empty(samples * shape[0], *shape[1:])
        nothing = [0] * len(module.kernel_size)
        found: Tensor = torch.ops.aten.convolution_backward(
            outputs, _padded(module, images), like, None, list(module.stride), nothing,
            list(module.dilation), False, nothing, samples * module.groups, [False, True, False],
        )[1]  # fmt: skip
        return found.view(samples, *shape)

    elements = max(x[0].numel(), g[0].numel(), module.weight.numel())
    return Pieces(len(x), max(1, PATCHES // elements), gradients)


def _conv(module: Convolution, x: Tensor, g: Tensor) -> dict[str, Contribution]:
    # Samples (N, s, C, ...).
    def outer(part: slice) -> Outer:
        patches = patches_of(module, x[part].flatten(0, 1)).mT  # (N s, L, C k)
        gradients = g[part].flatten(0, 1).flatten(2).mT  # (N s, L, p)
        split = (len(x[part]), -1)  # (N s, L, C k) -> (N, s L, C k)
        return Outer(gradients.reshape(*split, gradients.shape[2]),
                     patches.reshape(*split, patches.shape[2]))  # fmt: skip

    unfolded = g[0, :, 0].numel() * x.shape[2] * math.prod(module.kernel_size)  # elements a sample
    weight: Contribution = Patches(len(x), max(1, PATCHES // unfolded), outer)
    if module.groups > 1:
        weight = _grouped_conv(module, x, g)
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


_GPT2_LINEAR = "transformers.pytorch_utils.Conv1D.forward"
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
    if is_transposed(module):
        return _transposed_linear, True
    return _RULES.get(type(module).forward)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is GPT-2's linear layer, Conv1D, whose weight is (d, p): y = x W + b.

    Args:
        module: Any module.
    """
    forward = type(module).forward
    name = f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', '')}"
    return "forward" not in vars(module) and name == _GPT2_LINEAR  # without importing it


# They mix samples, write to their weights, or do not map one tensor to one.
_NEVER_ALONE = (
    nn.modules.batchnorm._NormBase, nn.MultiheadAttention, nn.RNNBase, nn.Transformer,
)  # fmt: skip


def is_known_to_mix(module: nn.Module) -> bool:
    """Whether what a module does with its parameters cannot be followed sample by sample.

    Args:
        module: Any module.
    """
    return "forward" in vars(module) or isinstance(module, (*_NEVER_ALONE, nn.Embedding))


def can_be_differentiated(module: nn.Module, trained: Collection[Tensor]) -> bool:
    """Return whether a module without a rule may be differentiated by itself.

    Args:
        module: In evaluation mode.
        trained: The parameters to differentiate by.
    """
    if "forward" in vars(module) or isinstance(module, _NEVER_ALONE):
        return False
    if isinstance(module, nn.Embedding) and (module.scale_grad_by_freq or module.max_norm):
        return False
    below = (p for child in module.children() for p in child.parameters())
    return not any(p in trained for p in below)


def differentiated(
    module: nn.Module,
    own: dict[str, nn.Parameter],
    call: Callable[..., Tensor],
    others: Sequence[Tensor] = (),
) -> Rule:
    """Return the rule of a module that is differentiated by itself, in full precision.

    Args:
        module: Maps tensors, (rows, ...), to one.
        own: Its trained parameters by their names in it.
        call: Its ``forward`` by what it reads.
        others: What it reads beside its input, (N, rows, ...) each.
    """

    def gradients(name: str, g: Tensor, *read: Tensor) -> Tensor:
        full = accumulation_dtype(own[name].dtype)

        def of_one(g: Tensor, *read: Tensor) -> Tensor:
            def forward(leaf: Tensor) -> Tensor:
                module._parameters[name] = leaf  # type: ignore[assignment]
                return call(*read)

            output, pull_back, *_ = vjp(forward, own[name].detach().to(full))
            found: Tensor = pull_back(g.to(output.dtype))[0]
            return found

        before = dict(module._parameters)
        for other, p in before.items():
            module._parameters[other] = None if p is None else p.detach().to(full)  # type: ignore[assignment]
        try:
            wide = [_full(t) if t.is_floating_point() else t for t in read]
            found: Tensor = vmap(of_one)(_full(g), *wide)
            return found
        finally:
            module._parameters.update(before)

    def pieces_of(name: str, x: Tensor, g: Tensor) -> Pieces:
        size = max(1, PATCHES // max(1, own[name].numel()))
        read = (x, *others)
        return Pieces(len(x), size, lambda part: gradients(name, g[part], *(t[part] for t in read)))

    return lambda _, x, g: {name: pieces_of(name, x, g) for name in own}
