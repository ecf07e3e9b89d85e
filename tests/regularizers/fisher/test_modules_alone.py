"""Modules without a rule, such as somebody's norm, in the one pass for all samples."""

import warnings
from typing import NamedTuple

import pytest
import torch
from fisher_models import randomised
from torch import nn

from ars.regularizers import DiagonalFisher
from ars.regularizers.fisher import rules

TOLERANCE = 1e-11  # plain autograd's own rounding in float64
VOCABULARY, WIDTH, LENGTH = 11, 6, 5


class RMSNorm(nn.Module):
    """As the Llama family has it: without a class of torch's, named by its argument."""

    def __init__(self, offset=0.0):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.ones(WIDTH)), offset

    def forward(self, hidden_states):
        wide = hidden_states.float() if hidden_states.dtype != torch.float64 else hidden_states
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (self.offset + self.weight) * wide.to(hidden_states.dtype)


class ScaledEmbedding(nn.Embedding):
    """As Gemma and BART have it."""

    def forward(self, ids):
        return 3.0 * super().forward(ids)


class Positions(nn.Embedding):
    """As OPT has it: by a mask, and where the text begins."""

    def forward(self, mask, start=0):
        return super().forward((mask.cumsum(1) * mask).long()[:, start:])


class Conv1D(nn.Module):
    """The linear layer of GPT-2: y = x W + b."""

    def __init__(self, width, out):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.zeros(width, out)),
            nn.Parameter(torch.zeros(out)),
        )

    def forward(self, x):
        return x @ self.weight + self.bias


class KnownConv1D(Conv1D):
    def forward(self, x):
        return super().forward(x)


KnownConv1D.forward.__module__ = "transformers.pytorch_utils"
KnownConv1D.forward.__qualname__ = "Conv1D.forward"


class Gate(nn.Module):
    """Two parameters of its own, and a module below it that has none."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(1))
        self.activation = nn.GELU()

    def forward(self, x):
        return x + self.scale * self.activation(x + self.shift)


class Model(nn.Module):
    def __init__(self, norm=RMSNorm, embedding=ScaledEmbedding, linear=Conv1D, uses=1):
        super().__init__()
        self.embedding, self.positions = embedding(VOCABULARY, WIDTH), Positions(LENGTH + 1, WIDTH)
        self.norm, self.gate, self.linear = norm(), Gate(), linear(WIDTH, WIDTH)
        self.head, self.uses = nn.Linear(WIDTH, VOCABULARY), uses

    def forward(self, ids):
        x = self.embedding(ids) + self.positions((ids > 0).to(ids.dtype), start=0)
        for _ in range(self.uses):
            x = x + self.linear(self.norm(hidden_states=x)).tanh()
        return self.head(self.gate(x))


def batch(n=7):
    return torch.randint(VOCABULARY, (n, LENGTH)), torch.randint(VOCABULARY, (n, LENGTH))


def fitted(model, batches, method="auto", estimator="exact", **options):
    return DiagonalFisher(model, estimator, method=method, **options).fit(batches).importance


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize("linear", [Conv1D, KnownConv1D])
def test_they_are_taken_at_once(uses, linear, estimator, relative_error):
    model, batches = randomised(Model(linear=linear, uses=uses)), [batch(), batch(3)]
    loop = fitted(model, batches, "loop", estimator)
    assert relative_error(fitted(model, batches, "hooks", estimator), loop) < TOLERANCE


def test_a_norm_that_adds_one_to_its_weight(relative_error):
    model, batches = randomised(Model(norm=lambda: RMSNorm(offset=1.0))), [batch()]
    loop = fitted(model, batches, "loop")
    assert relative_error(fitted(model, batches, "hooks"), loop) < TOLERANCE


def test_gradients_are_formed_for_some_samples_at_a_time(monkeypatch, relative_error):
    model, batches = randomised(Model()), [batch()]
    loop = fitted(model, batches, "loop")
    monkeypatch.setattr(rules, "PATCHES", 2 * WIDTH)
    assert relative_error(fitted(model, batches, "hooks"), loop) < TOLERANCE


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_that_of_the_loop(autocast, relative_error):
    model = randomised(Model(), torch.float32 if autocast else torch.bfloat16)
    batches = [batch()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loop = fitted(model, batches, "loop")
        assert relative_error(fitted(model, batches, "hooks"), loop) < 0.1


def test_parameters_and_flags_are_as_before():
    model = randomised(Model()).train()
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    fitted(model, [batch()], "hooks")
    for name, p in model.named_parameters():
        assert p is before[name][0]
        assert torch.equal(p, before[name][1])
    assert model.training


class Centred(RMSNorm):
    """Mixes the samples."""

    def forward(self, hidden_states):
        return super().forward(hidden_states - hidden_states.mean(0, keepdim=True))


class Conditional(RMSNorm):
    """Looks at a value, which vmap cannot."""

    def forward(self, hidden_states):
        return super().forward(hidden_states if hidden_states.sum() > 1e6 else 2 * hidden_states)


class Pair(RMSNorm):
    """Reads two tensors, of which the second may hold anything."""

    def forward(self, hidden_states, residual=None):
        return super().forward(hidden_states + residual)


class PairModel(Model):
    """The second tensor is made of the ids, or is something else of theirs."""

    def __init__(self, second=lambda x: 2 * x):
        super().__init__(norm=Pair)
        self.second = second

    def forward(self, ids):
        x = self.embedding(ids)
        return self.head(self.norm(x, residual=self.second(x)))


class Table(nn.Embedding):
    """As OPT and BART have it: of positions, each sample's own or one row for all of them."""

    def forward(self, ids, start=0, position_ids=None):
        return super().forward(position_ids if position_ids.ndim > 1 else position_ids[None])


class TableModel(Model):
    def __init__(self, shared):
        super().__init__()
        self.positions, self.shared = Table(LENGTH + 1, WIDTH), shared

    def forward(self, ids):
        kept = (ids > 0).to(ids.dtype)
        places = torch.arange(ids.shape[1]) if self.shared else kept.cumsum(1) * kept
        return self.head(self.embedding(ids) + self.positions(kept, 0, position_ids=places))


SECOND = {
    "each sample's own": lambda: PairModel(),
    "the same for all": lambda: PairModel(lambda x: torch.arange(WIDTH, dtype=x.dtype)),
    "of every position": lambda: PairModel(lambda x: x.detach().sum(-1, keepdim=True)),
    "places": lambda: TableModel(shared=False),
    "places of all samples": lambda: TableModel(shared=True),
}


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_a_module_may_read_a_second_tensor(second, estimator, relative_error):
    model, batches = randomised(SECOND[second]()), [batch(), batch(3)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is 0 throughout")  # layers that are not used
        loop = fitted(model, batches, "loop", estimator)
        found = fitted(model, batches, "hooks", estimator)
    used = {name: value for name, value in loop.items() if value.any()}
    assert len(used) >= 3
    assert relative_error({name: found[name] for name in used}, used) < TOLERANCE


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (Model(norm=Centred), "gives '.*' another gradient|influence one another"),
        (Model(norm=Conditional), "vmap"),
        (PairModel(lambda x: x.roll(1, 0)), "influence one another|another gradient|other samples"),
        (PairModel(lambda x: x.mean((0, 1)).expand(2 * len(x) - 1, 1, WIDTH)[:1]),
         "influence one another|another gradient|other samples"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_alone_is_refused_by_name(model, match, relative_error):
    model, batches = randomised(model), [batch()]
    with pytest.raises(RuntimeError, match=match):
        fitted(model, batches, "hooks")
    loop = fitted(model, batches, "loop")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert relative_error(fitted(model, batches), loop) < TOLERANCE


class Output(NamedTuple):
    """As Hugging Face's models have it."""

    logits: torch.Tensor
    past: None = None


class Wrapped(Model):
    def forward(self, ids):
        return Output(super().forward(ids))


@pytest.mark.parametrize("method", ["hooks", "vmap", "loop"])
def test_logits_may_be_part_of_what_a_model_returns(method, relative_error):
    batches = [batch()]
    plain = fitted(randomised(Model()), batches, "loop")
    assert relative_error(fitted(randomised(Wrapped()), batches, method), plain) < TOLERANCE


def test_what_has_no_logits_is_refused():
    class Tuples(Model):
        def forward(self, ids):
            return (super().forward(ids),)

    with pytest.raises(TypeError, match=r"object with them in \.logits, got tuple"):
        fitted(randomised(Tuples()), [batch()])
