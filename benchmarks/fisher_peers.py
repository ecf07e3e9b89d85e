"""The diagonal empirical Fisher of a model, as other libraries and plain torch compute it.

Each function takes a model, a list of batches (inputs, targets) and returns the mean over samples
of the squared gradient of a sample's summed loss, by parameter name. Libraries that are not
installed (extra ``peers``) are left out, by name. Not here: curvlinops 3.0, whose diagonals are
estimated with random vectors, and, on sequences, nngeometry 0.4, whose linear layers take one
position.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from ars.regularizers import DiagonalFisher

Batches = list[tuple[Tensor, Tensor]]
Result = dict[str, Tensor]


def sample_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum the loss over each sample's positions, shape (B,)."""
    rows = functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return rows.view(len(targets), -1).sum(1)


def zeros(model: nn.Module) -> Result:
    """Return one tensor of zeros a parameter."""
    return {name: torch.zeros_like(p) for name, p in model.named_parameters()}


def finished(total: Result, batches: Batches) -> Result:
    """Divide by the number of samples."""
    samples = sum(len(targets) for _, targets in batches)
    return {name: tensor / samples for name, tensor in total.items()}


def forward_backward(model: nn.Module, batches: Batches) -> None:
    """One ordinary gradient a batch: what a Fisher pass is measured against."""
    for inputs, targets in batches:
        loss = sample_losses(model(inputs), targets).sum()
        torch.autograd.grad(loss, list(model.parameters()))


def hooks(model: nn.Module, batches: Batches) -> Result:
    """Ours, with its comparison on two samples."""
    return DiagonalFisher(model, "empirical", method="hooks").fit(batches).importance


def one_by_one(model: nn.Module, batches: Batches) -> Result:
    """A backward pass a sample, as most EWC code that is correct does it."""
    total = zeros(model)
    parameters = list(model.parameters())
    for inputs, targets in batches:
        for x, y in zip(inputs.split(1), targets.split(1), strict=True):
            gradients = torch.autograd.grad(sample_losses(model(x), y).sum(), parameters)
            for squares, gradient in zip(total.values(), gradients, strict=True):
                squares += gradient.square()
    return finished(total, batches)


def vmap_grad(model: nn.Module, batches: Batches) -> Result:
    """``torch.func.vmap(grad)`` over whole batches."""
    total = zeros(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: Result, x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, parameters, (x[None],))
        return sample_losses(logits, y[None]).sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    for inputs, targets in batches:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            for name, gradients in per_sample(parameters, inputs, targets).items():
                total[name] += gradients.square().sum(0)
    return finished(total, batches)


def opacus(model: nn.Module, batches: Batches) -> Result:
    """Opacus' per-sample gradients, squared."""
    from opacus import GradSampleModule

    # In training mode, which it needs; these models compute the same in both.
    wrapped = GradSampleModule(copy.deepcopy(model).train(), loss_reduction="sum")
    total = zeros(model)
    for inputs, targets in batches:
        sample_losses(wrapped(inputs), targets).sum().backward()
        for name, p in wrapped._module.named_parameters():
            total[name] += p.grad_sample.square().sum(0)
            p.grad = p.grad_sample = None
    return finished(total, batches)


def backpack(model: nn.Module, batches: Batches) -> Result:
    """BackPACK's sum of squared gradients."""
    from backpack import backpack as extensions
    from backpack import extend
    from backpack.extensions import SumGradSquared

    extended = extend(copy.deepcopy(model))
    total = zeros(model)
    for inputs, targets in batches:
        loss = sample_losses(extended(inputs), targets).sum()
        with extensions(SumGradSquared()):
            loss.backward()
        for name, p in extended.named_parameters():
            total[name] += p.sum_grad_squared
            p.grad = None
    return finished(total, batches)


def nngeometry(model: nn.Module, batches: Batches) -> Result:
    """Take nngeometry's diagonal of the Fisher of one output, the loss."""
    from nngeometry.layercollection import LayerCollection
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDiag

    device = batches[0][0].device
    layers = LayerCollection.from_model(model)
    data = TensorDataset(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    diagonal = FIM(
        model,
        DataLoader(data, batch_size=len(batches[0][0])),
        PMatDiag,
        variant="regression",
        device=device,
        function=lambda x, y: sample_losses(model(x), y)[:, None],
        layer_collection=layers,
    ).get_diag()
    result, start = {}, 0
    for name, p in model.named_parameters():
        result[name] = diagonal[start : start + p.numel()].view_as(p)
        start += p.numel()
    return result


PLAIN: dict[str, Callable[[nn.Module, Batches], Result]] = {
    "DiagonalFisher": hooks,
    "one by one": one_by_one,
    "vmap(grad)": vmap_grad,
}
PEERS: dict[str, Callable[[nn.Module, Batches], Result]] = {
    "opacus": opacus,
    "backpack": backpack,
    "nngeometry": nngeometry,
}
