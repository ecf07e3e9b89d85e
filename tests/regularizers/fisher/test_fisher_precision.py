"""What holds in half precision and under autocast."""

import pytest
import torch
from fisher_models import randomised, sequences
from torch import nn

from ars.regularizers import DiagonalFisher
from ars.regularizers.fisher import rules

HALVES = pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True)],
    ids=["bf16", "fp16", "autocast"],
)


def test_autocast(tied_gpt, tokens):
    x, y = tokens(16)
    model = tied_gpt()
    full = DiagonalFisher(model, "empirical").fit([(x, y)]).importance
    with torch.autocast("cpu", torch.bfloat16):
        loop = DiagonalFisher(model, "empirical", method="loop").fit([(x, y)]).importance
        hooks = DiagonalFisher(model, "empirical", method="hooks").fit([(x, y)]).importance
    for name, tensor in full.items():
        assert hooks[name].dtype == torch.float32
        if name.endswith("qkv.bias"):
            tensor = tensor[:8]  # a key's bias has no gradient but for rounding
        size = len(tensor)
        assert (loop[name][:size] - tensor).norm() < 0.1 * tensor.norm()
        assert (hooks[name][:size] - tensor).norm() < 0.1 * tensor.norm()


@HALVES
def test_half_precision_hardly_depends_on_batch_size(tied_gpt, tokens, way, dtype, autocast):
    """A single sample takes the way of all others; kernels may round a larger batch otherwise."""
    x, y = tokens(15)
    model = tied_gpt(dtype)
    results = []
    for b in (1, 7, 15):
        pairs = zip(x.split(b), y.split(b), strict=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(DiagonalFisher(model, "empirical", **way).fit(pairs).importance)
    for name, alone in results[0].items():
        for other in results[1:]:
            assert (other[name] - alone).norm() < 5e-4 * alone.norm(), name


@pytest.fixture
def wrong_rule(monkeypatch):
    """Make the rule of linear layers without a bias wrong by half."""
    rule = rules._RULES[nn.Linear.forward][0]

    def wrong(module, x, g):
        return rule(module, x, g * 1.5 if module.bias is None else g)

    return lambda: monkeypatch.setitem(rules._RULES, nn.Linear.forward, (wrong, True))


@HALVES
@pytest.mark.parametrize("n", [1, 5])
def test_small_gradients_are_compared_in_half_precision_too(dtype, autocast, n, wrong_rule):
    """Those of the layer below a small head are far below the head's own."""
    model = nn.ModuleDict({"layer": nn.Linear(4, 4, bias=False), "head": nn.Linear(4, 3)})
    model.forward = lambda x: model.head(model.layer(x).tanh())
    model, (x, y) = randomised(model, dtype), sequences(n, dtype=dtype)
    with torch.no_grad():
        model.head.weight *= 0.1
    stored = [p.data_ptr() for p in model.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loop = DiagonalFisher(model, "empirical", method="loop").fit([(x, y)]).importance
        DiagonalFisher(model, "empirical", method="hooks").fit([(x, y)])
        wrong_rule()
        with pytest.raises(RuntimeError, match=r"gives 'layer\.weight' another gradient"):
            DiagonalFisher(model, "empirical", method="hooks").fit([(x, y)])
    assert loop["layer.weight"].max() < 0.0625 * loop["head.bias"].max()
    assert all(p.dtype == dtype for p in model.parameters())
    assert [p.data_ptr() for p in model.parameters()] == stored


def test_rounding_in_bfloat16_is_not_taken_for_a_mistake(relative_error):
    """Plain autograd adds the gradient of a norm's bias in bfloat16 on a CPU: off by half."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.Linear(16, 3)).bfloat16()
    x, y = torch.randn(2, 4096, 4).bfloat16(), torch.randint(3, (2, 4096))
    hooks = DiagonalFisher(model, "empirical", method="hooks").fit([(x, y)]).importance
    exact = DiagonalFisher(model.float(), "empirical").fit([(x.float(), y)]).importance
    assert relative_error(hooks, exact) < 0.02


class Casting(nn.Module):
    """Runs in bfloat16 only."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x.bfloat16()).tanh())


def test_a_model_that_casts_by_itself_is_compared_as_it_is(wrong_rule):
    model, batch = randomised(Casting(), torch.bfloat16), sequences(dtype=torch.float32)
    with torch.no_grad():
        model.head.weight *= 5.0
    DiagonalFisher(model, "empirical", method="hooks").fit([batch])
    wrong_rule()
    with pytest.raises(RuntimeError, match=r"gives 'layer\.weight' another gradient"):
        DiagonalFisher(model, "empirical", method="hooks").fit([batch])
