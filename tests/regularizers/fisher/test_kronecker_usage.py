"""How KroneckerFisher treats models, precisions and bad input."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ars.regularizers import ActivationCovariance, KroneckerFisher
from ars.regularizers.fisher.layers import matrix_layers


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)).double()


def data(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, dtype=torch.float64), torch.arange(n) % 3


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = mlp(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def test_activation_checkpointing_counts_every_layer_once() -> None:
    model, batch = Checkpointed(reentrant=False), data(5)
    found = KroneckerFisher(model, "exact").fit([batch]).factors
    plain = KroneckerFisher(model.inner, "exact").fit([batch]).factors
    torch.testing.assert_close({n.removeprefix("inner."): f for n, f in found.items()}, plain)


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.body(x)
        return self.head(x)


def test_a_layer_outside_autograd_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"layer of 'body.weight' ran without a graph"):
        KroneckerFisher(Detached()).fit([data(2)])


def test_a_layer_whose_output_is_not_used_has_no_information() -> None:
    model = Detached()
    model.forward = lambda x: model.head(x + 0 * model.body(x).detach())
    factors = KroneckerFisher(model).fit([data(2)]).factors
    assert not factors["body.weight"].outputs.any()
    assert factors["head.weight"].outputs.any()


def test_autocast_does_not_reach_the_sums() -> None:
    model = nn.Linear(4, 3)
    x, y = torch.randn(50, 4), torch.arange(50) % 3
    with torch.autocast("cpu", torch.bfloat16):
        a, g = KroneckerFisher(model, "exact").fit([(x, y)]).factors["weight"]
    expected = KroneckerFisher(model, "exact").fit([(x, y)]).factors["weight"]
    torch.testing.assert_close(a, expected.inputs)
    torch.testing.assert_close(g, expected.outputs, rtol=0.02, atol=0.002)  # of bfloat16 logits


def test_draws_are_averaged() -> None:
    model, (x, y) = mlp(), data(3)
    exact = KroneckerFisher(model, "exact").fit([(x, y)]).factors["2.weight"].outputs
    fisher = KroneckerFisher(model, draws=2000, generator=torch.Generator().manual_seed(0))
    many = fisher.fit([(x, y)]).factors["2.weight"].outputs
    assert (many - exact).abs().max() < 0.1 * exact.max()


def test_what_is_refused() -> None:
    model, (x, y) = mlp(), data(4)
    fitted = KroneckerFisher(model, "exact").fit([(x, y)])
    before = fitted.factors
    for batches, n, says in (
        ([], None, "batches is empty"),
        ([(x, y)], 5, "n_samples=5, but batches held only 4"),
        ([(x, y)], True, "n_samples must be a positive integer"),
        ([(x, y + 1)], None, "contain 3, outside [0, 3)"),
        ([(x[:, None], y)], None, "do not fit targets"),
        ([(x * torch.inf, y)], None, "a factor of '0.weight' is not finite"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            fitted.fit(batches, n)
    with pytest.raises(TypeError, match="must be a pair"):
        fitted.fit([x])
    assert fitted.factors is before

    mixed = nn.Sequential(nn.Linear(4, 3)).double()
    mixed.forward = lambda x: mixed[0](x[:1]).expand(len(x), -1)
    with pytest.raises(ValueError, match=r"'0.weight' has 1 positions for 4 samples"):
        KroneckerFisher(mixed).fit([(x, y)])
    with pytest.raises(ValueError, match="no trained linear"):
        KroneckerFisher(nn.Sequential(nn.LayerNorm(4)).double()).fit([(x, y)])
    with pytest.raises(RuntimeError, match="not fitted"):
        _ = KroneckerFisher(model).factors
    with pytest.raises(TypeError, match="model must be a"):
        KroneckerFisher(x)
    with pytest.raises(TypeError, match="generator must be a"):
        KroneckerFisher(model, generator=0)
    with pytest.raises(ValueError, match="unknown estimator 'kfac'"):
        KroneckerFisher(model, "kfac")
    with pytest.raises(ValueError, match="unknown estimator 'batched'"):
        KroneckerFisher(model, "batched")
    with pytest.raises(ValueError, match="draws must be a positive integer, got 0"):
        KroneckerFisher(model, draws=0)
    with pytest.raises(ValueError, match="estimator='exact' draws nothing"):
        KroneckerFisher(model, "exact", draws=2)
    long = torch.zeros(1, 1400, 4, dtype=torch.float64), torch.zeros(1, 1400, dtype=torch.int64)
    with pytest.raises(ValueError, match="1400 \\* 3 = 4200 backward passes"):
        KroneckerFisher(model, "exact").fit([long])
    with pytest.raises(ValueError, match="unknown sharing 'none'"):
        KroneckerFisher(model, sharing="none")


class Uncalled(nn.Module):
    """Multiplies by its only layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.layer.weight


def test_a_model_that_calls_no_matrix_layer_is_refused() -> None:
    model, says = Uncalled(), "Uncalled calls no trained linear or ungrouped convolution layer"
    assert list(matrix_layers(model)) == ["layer.weight"]
    x, y = torch.randn(3, 5, 4), torch.randint(4, (3, 5))
    with pytest.raises(ValueError, match=says):
        KroneckerFisher(model).fit([(x, y)])
    with pytest.raises(ValueError, match=says):
        ActivationCovariance(model).fit([x])


class SharedPositions(nn.Module):
    """A layer that is run once for all samples, on as many rows as there are positions."""

    def __init__(self) -> None:
        super().__init__()
        self.pos, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.pos(torch.eye(4, dtype=x.dtype)))


def test_a_layer_that_all_samples_share_needs_batches_of_one() -> None:
    model = SharedPositions()
    x, y = torch.randn(4, 4, 4, dtype=torch.float64), torch.randint(3, (4, 4))
    says = r"'pos\.weight' has 4 positions for 2 samples, but 4 for one: .*batches of one sample"
    for batches in ([(x[:2], y[:2])], [(x[:1], y[:1]), (x[:2], y[:2])]):
        with pytest.raises(ValueError, match=says):
            KroneckerFisher(model).fit(batches)
        with pytest.raises(ValueError, match=says):
            ActivationCovariance(model).fit(batches)
    rows = []
    for inputs, targets in zip(x.split(1), y.split(1), strict=True):
        p = model(inputs)[0].softmax(-1)
        scores = p - nn.functional.one_hot(targets[0], 3)
        rows.append(scores.detach() @ model.head.weight.detach())  # at each position
    expected = torch.stack([g.T @ g for g in rows]).mean(0)
    pairs = zip(x.split(1), y.split(1), strict=True)
    fisher = KroneckerFisher(model, "empirical").fit(pairs)
    torch.testing.assert_close(fisher.factors["pos.weight"].outputs, expected)


def test_a_layer_with_a_forward_of_its_own_is_not_taken_for_its_base() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(4, 5), nn.Linear(5, 3)).double()
    with pytest.warns(UserWarning, match=r"nothing is known of 0\.weight, 0\.bias"):
        fisher = KroneckerFisher(model, "exact").fit([data(4)])
    assert list(fisher.factors) == ["1.weight"]


def test_warns_of_an_embedding_tied_to_the_head() -> None:
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 3, bias=False))
    model[1].weight = model[0].weight
    ids = torch.arange(3)
    with pytest.warns(UserWarning, match=r"nothing is known of 0\.weight as used by '0': protect"):
        KroneckerFisher(model, "exact").fit([(ids, ids)])
