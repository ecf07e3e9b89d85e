"""What is the same for all samples until it meets them, in the one pass and by itself."""

import re

import pytest
import torch
from fisher_models import randomised
from torch import nn
from torch.nn import functional

from ars.regularizers import DiagonalFisher
from ars.regularizers.fisher import hooks
from ars.regularizers.fisher.shared import Shared

TOLERANCE = 1e-11  # plain autograd's own rounding in float64
N, LENGTH, WIDTH = 5, 6, 4


class Net(nn.Module):
    """A model around one part."""

    def __init__(self, part):
        super().__init__()
        self.first, self.part, self.head = nn.Linear(WIDTH, WIDTH), part, nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(self.part(self.first(x).tanh()))


class Scale(nn.Module):
    """Parameters of its own, of no, one and two dimensions, above a layer that is trained."""

    def __init__(self):
        super().__init__()
        self.whole, self.each = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(WIDTH))
        self.matrix, self.layer = nn.Parameter(torch.ones(WIDTH, WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        first, second = (self.whole * self.matrix.exp()).chunk(2, 1)
        x = self.layer(self.each.neg() * x) @ torch.cat((second, first), 1)
        return x * self.each[None, None, :] + self.matrix.shape[0]


class Uncalled(nn.Module):
    """Reads the weights of layers that it does not call, as Mamba does."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH)
        self.layer, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        kernel = self.conv.weight.squeeze(1)
        x = functional.conv1d(x.mT, kernel.unsqueeze(1), self.conv.bias, padding=1, groups=WIDTH)
        x = self.layer.weight @ x.tanh() + self.layer.bias[:, None]
        return self.out(x.mT)


class RelativeBias(nn.Module):
    """Attention with a bias of relative positions, (1, H, T, T), as T5 has it."""

    def __init__(self):
        super().__init__()
        self.bias, self.qkv = nn.Embedding(4, 2), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        t = torch.arange(x.shape[1])
        bias = self.bias((t[:, None] - t).abs().clamp(max=3)).permute([2, 0, 1]).unsqueeze(0)
        q, k, v = self.qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return y.transpose(1, 2).flatten(2)


class Tied(nn.Module):
    """A second name of a layer's bias, as BERT's head has it, used by the layer alone."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.bias = self.layer.bias

    def forward(self, x):
        return self.layer(x).tanh()


class Twice(Scale):
    """A parameter of its own beside the same parameter in a layer."""

    def __init__(self):
        super().__init__()
        self.layer.weight = self.matrix


PARTS = {"scale": Scale, "uncalled": Uncalled, "relative": RelativeBias, "tied": Tied}


def batch(n=N, length=LENGTH):
    return torch.randn(n, length, WIDTH, dtype=torch.float64), torch.randint(3, (n, length))


def fitted(model, batches, method, estimator="exact", **options):
    return DiagonalFisher(model, estimator, method=method, **options).fit(batches).importance


@pytest.mark.parametrize(
    ("part", "estimator"), [*((part, "empirical") for part in PARTS), ("scale", "exact")]
)
def test_they_are_taken_at_once(part, estimator, relative_error):
    model = randomised(Net(PARTS[part]()))
    # As many samples as positions, and as channels.
    batches = [batch(), batch(LENGTH), batch(3)]
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    loop = fitted(model, batches, "loop", estimator)
    assert relative_error(fitted(model, batches, "hooks", estimator), loop) < TOLERANCE
    assert relative_error(fitted(model, batches, "hooks", estimator, chunk_size=2), loop) < 1e-11
    for name, p in model.named_parameters():
        assert p is before[name][0]
        assert torch.equal(p, before[name][1])


def test_a_parameter_that_a_layer_has_too_is_refused_where_its_gradient_would_be_another():
    with pytest.raises(RuntimeError, match="cannot be differentiated in one pass"):
        fitted(randomised(Net(Twice())), [batch()], "hooks")


def test_copies_that_are_too_large_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(hooks, "LOOSE", 2 * WIDTH * WIDTH)
    model = randomised(Net(Scale()))
    with pytest.raises(RuntimeError, match=r"Scale uses 'part\.matrix' by itself, .*chunk_size"):
        fitted(model, [batch()], "hooks")
    fitted(model, [batch()], "hooks", chunk_size=2)


def shared(*shape, constants=()):
    copies = torch.randn(*shape).expand(N, *shape).clone().requires_grad_()
    return copies, Shared.of(copies, constants)


def test_alone_it_is_what_the_model_sees_and_what_is_behind():
    copies, seen = shared(2, 3)
    assert seen.shape == (2, 3)
    assert len(seen) == 2
    first, second = seen.mT.mul(2).split([1, 2])
    assert isinstance(second, Shared)
    torch.testing.assert_close(second.each, 2 * copies.mT.mT.transpose(1, 2)[:, 1:])
    assert first.shape == (1, 2)


def test_it_meets_each_sample_by_itself():
    copies, seen = shared(2, 3)
    x = torch.randn(N, 4, 2)
    found = x @ seen
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, x @ copies)
    (gradient,) = torch.autograd.grad(found.sum(), copies)
    torch.testing.assert_close(gradient, x.sum(1)[..., None].expand(N, 2, 3))


def test_what_is_known_to_hold_no_samples_stays_beside_it():
    weight = torch.randn(N, 3)
    copies, seen = shared(2, 3, constants={weight.untyped_storage().data_ptr()})
    found = functional.linear(seen, weight)
    assert isinstance(found, Shared)
    torch.testing.assert_close(found.each, copies @ weight.T)


@pytest.mark.parametrize(
    ("action", "says"),
    [
        (lambda seen: seen.add_(1), "add_ writes to a tensor that all samples share"),
        (lambda seen: seen.__setitem__(0, 1.0), "__setitem__ writes"),
        (lambda seen: (torch.ones(N, 2) @ seen).sum(), None),
        (lambda seen: torch.tensordot(torch.ones(N, 4, 2), seen, ([2], [0])).sum(), None),
        (lambda seen: torch.einsum("nt,td->d", torch.ones(N, 2), seen), "one sample became (3,)"),
    ],
)
def test_what_cannot_be_followed_is_refused(action, says):
    seen = shared(2, 3)[1]
    if says is None:
        assert action(seen).ndim == 0
        return
    with pytest.raises(RuntimeError, match=re.escape(says)):
        action(seen)
