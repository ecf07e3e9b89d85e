"""Kronecker factors of layers that hold their matrices in another way, against the dense Fisher.

Whatever the layout, the penalty is 1/2 d^T F d for a change d of the stored parameters. For one
sample of one position F is a Kronecker product, so the two are equal.
"""

import copy
import re
import warnings

import pytest
import torch
from fisher_models import randomised
from torch import nn

from ars import ARSAdamW
from ars.regularizers import (
    ActivationCovariance,
    KroneckerFisher,
    KroneckerPenalty,
    SubspacePenalty,
    load_penalty,
    save_penalty,
)


class Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight is (d, p)."""

    def __init__(self, width, out, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, out))
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None

    def forward(self, x):
        x = x @ self.weight
        return x if self.bias is None else x + self.bias


Conv1D.forward.__module__ = "transformers.pytorch_utils"
Conv1D.forward.__qualname__ = "Conv1D.forward"


def transposed(bias=True):
    return nn.Sequential(Conv1D(4, 5, bias), nn.Tanh(), Conv1D(5, 3, bias))


KINDS = {
    "conv1d": transposed,
    "conv1d without bias": lambda: transposed(bias=False),
}


def data(n, length=None):
    shape = (n,) if length is None else (n, length)
    return torch.randn(*shape, 4, dtype=torch.float64), torch.arange(n * (length or 1)).view(
        shape
    ) % 3


def dense_form(model, x, change):
    """d^T F d of every parameter that has factors together, by the scores of single samples."""
    names, leaves = zip(*[(n, p) for n, p in model.named_parameters() if n in change], strict=True)
    total = 0.0
    for sample in x:
        for lp in model(sample[None]).log_softmax(-1).flatten():
            found = torch.autograd.grad(lp, leaves, retain_graph=True, materialize_grads=True)
            for group in groups_of(names):
                dot = sum(
                    (g * change[n]).sum() for n, g in zip(names, found, strict=True) if n in group
                )
                total += lp.exp().detach() * dot**2 / len(x)
    return total


def groups_of(names):
    """A weight and its bias are one block."""
    return [
        [n for n in names if n in (name, re.sub(r"weight$", "bias", name))]
        for name in names
        if not name.endswith("bias")
    ]


def fitted(model, x, y, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return KroneckerFisher(model, "exact", **options).fit([(x, y)])


@pytest.mark.parametrize("kind", KINDS)
def test_of_one_position_the_penalty_is_the_dense_form(kind):
    model, (x, y) = randomised(KINDS[kind]()), data(1)
    penalty = KroneckerPenalty(model, fitted(model, x, y), strength=2.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p)
    change = {n: p.detach() - before[n] for n, p in penalty.named_parameters()}
    assert change.keys() == before.keys()
    value = penalty.value()
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(before[n])
    torch.testing.assert_close(value.detach(), dense_form(model, x, change), rtol=1e-9, atol=0.0)


def twin(model):
    """The same network of nn.Linear."""
    return nn.Sequential(*(
        copy.deepcopy(m) if not isinstance(m, Conv1D) else linear_of(m) for m in model
    ))  # fmt: skip


def linear_of(module):
    layer = nn.Linear(*module.weight.shape, bias=module.bias is not None).double()
    with torch.no_grad():
        layer.weight.copy_(module.weight.T)
        if module.bias is not None:
            layer.bias.copy_(module.bias)
    return layer


@pytest.mark.parametrize("measure", ["expand", "reduce", "activations"])
def test_conv1d_is_as_the_linear_layer_that_it_is(measure, tmp_path):
    model, (x, y) = randomised(transposed()), data(6, 3)
    y[2, 1:] = -100
    same = twin(model)

    def penalty_of(net):
        if measure == "activations":
            return KroneckerPenalty(net, ActivationCovariance(net).fit([(x, y)]), 3.0)
        return KroneckerPenalty(net, fitted(net, x, y, sharing=measure), 3.0)

    penalties = penalty_of(model), penalty_of(same)
    for factors, expected in zip(*(p.factors.values() for p in penalties), strict=True):
        torch.testing.assert_close(factors, expected)
    optimizers = [
        ARSAdamW(net.parameters(), lr=0.1, ars=None, penalty=penalty)
        for net, penalty in zip((model, same), penalties, strict=True)
    ]
    for _ in range(3):
        for net, optimizer in zip((model, same), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x).mT, y).backward()
            optimizer.step()
    for module, layer in zip(model, same, strict=True):
        if isinstance(module, Conv1D):
            torch.testing.assert_close(module.weight.T, layer.weight)
            torch.testing.assert_close(module.bias, layer.bias)
    values = [penalty.value() for penalty in penalties]
    torch.testing.assert_close(*values)
    assert values[0] > 0
    assert penalties[0].anchor["0.weight"].shape == model[0].weight.shape
    save_penalty(penalties[0], tmp_path / "penalty")
    again = penalty_of(model)
    load_penalty(again, tmp_path / "penalty")
    assert again.value() == values[0]


def test_a_weight_that_is_stored_both_ways_is_refused():
    model = randomised(nn.Sequential(Conv1D(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)))
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    with pytest.raises(
        ValueError, match=r"share the weight '0\.weight', but one of them has it tr"
    ):
        KroneckerFisher(model).fit([data(4)])


def test_a_subspace_of_inputs_leaves_it_out_by_name():
    model, (x, _) = randomised(transposed()), data(6)
    model.append(nn.Linear(3, 3).double())
    activations = ActivationCovariance(model).fit([x])
    with pytest.warns(UserWarning, match=r"'0\.weight', '2\.weight' is stored transposed"):
        penalty = SubspacePenalty.from_activations(model, activations, rank=1)
    assert [name for name, _ in penalty.named_parameters()] == ["3.weight"]
    with pytest.raises(ValueError, match=r"'2\.weight' is stored transposed"):
        SubspacePenalty.from_activations(model, activations, rank=1, names=["2.weight"])
