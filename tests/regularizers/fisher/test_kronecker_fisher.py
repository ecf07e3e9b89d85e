"""Kronecker factors against the whole Fisher matrix and their definitions in loops; their sums."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ars.regularizers import KroneckerFisher
from ars.regularizers.fisher.kronecker import KroneckerFactors, nearest_product

Batch = tuple[Tensor, Tensor]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)).double()


def data(n: int) -> Batch:
    return torch.randn(n, 4, dtype=torch.float64), torch.arange(n) % 3


def scores(model: nn.Module, x: Tensor, leaves: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """sqrt(p_c) times the gradient of log p_c, for every position and class of one sample."""
    log_p = model.eval()(x[None])[0].log_softmax(-1).reshape(-1)
    return [
        tuple((lp / 2).exp().detach() * g for g in torch.autograd.grad(lp, leaves, retain_graph=1))
        for lp in log_p
    ]


def test_one_sample_is_the_whole_fisher() -> None:
    model, (x, y) = mlp(), data(1)
    factors = KroneckerFisher(model, "exact").fit([(x, y)]).factors
    assert list(factors) == ["0.weight", "2.weight"]
    first = [
        torch.cat([w, b[:, None]], 1) for w, b in scores(model, x[0], list(model[0].parameters()))
    ]
    second = [w for (w,) in scores(model, x[0], [model[2].weight])]
    for name, gradients in (("0.weight", first), ("2.weight", second)):
        columns = torch.stack([g.flatten() for g in gradients])
        a, g = factors[name]
        torch.testing.assert_close(torch.kron(g, a), columns.T @ columns, rtol=1e-10, atol=1e-13)


def test_samples_are_averaged_each_by_itself() -> None:
    model, (x, y) = mlp(), data(7)
    whole = KroneckerFisher(model, "exact").fit([(x, y)])
    ones = [KroneckerFisher(model, "exact").fit([(x[i : i + 1], y[i : i + 1])]) for i in range(7)]
    assert whole.n_samples == 7
    for name, factors in whole.factors.items():
        for i, factor in enumerate(factors):
            mean = torch.stack([one.factors[name][i] for one in ones]).mean(0)
            torch.testing.assert_close(factor, mean, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("estimator", ["sketch", "mc", "exact", "empirical"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_the_batch_size_does_not_matter(estimator: str, sharing: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(9, 2, 4, dtype=torch.float64), torch.arange(18).view(9, 2) % 3
    y[3, 1] = y[5, 0] = y[5, 1] = -100
    found = []
    for size in (1, 4, 9):
        fisher = KroneckerFisher(
            model, estimator, sharing=sharing, generator=torch.Generator().manual_seed(3)
        ).fit(zip(x.split(size), y.split(size), strict=True))
        found.append(fisher.factors)
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found[2], found[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("estimator", ["sketch", "mc"])
def test_random_estimators_are_unbiased(estimator: str) -> None:
    model, (x, y) = mlp(), data(3)
    exact = KroneckerFisher(model, "exact").fit([(x, y)]).factors
    copies = 3000
    many = x.repeat(copies, 1), y.repeat(copies)
    fisher = KroneckerFisher(model, estimator, generator=torch.Generator().manual_seed(0))
    for name, (a, g) in fisher.fit([many]).factors.items():
        torch.testing.assert_close(a, exact[name].inputs, rtol=1e-10, atol=1e-13)
        scale = exact[name].outputs.diagonal().max().item()
        error = (g - exact[name].outputs).abs().max().item()
        assert error < 6 / math.sqrt(copies) * scale  # a standard error is below this over 3


def test_the_empirical_factors_are_those_of_the_targets() -> None:
    model, (x, y) = mlp(), data(5)
    g = KroneckerFisher(model, "empirical").fit([(x, y)]).factors["2.weight"].outputs
    errors = (model(x).softmax(-1) - nn.functional.one_hot(y, 3)).detach()
    torch.testing.assert_close(g, errors.T @ errors / 5)


class Sequences(nn.Module):
    """Two linear layers on every position, then each position's logits or those of the mean."""

    def __init__(self, pool: bool) -> None:
        super().__init__()
        self.first, self.second, self.pool = nn.Linear(3, 4), nn.Linear(4, 3), pool
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        return x.mean(1) if self.pool else x


@pytest.mark.parametrize("pool", [False, True])
def test_the_right_sharing_is_exact_for_a_linear_network(pool: bool) -> None:
    model = Sequences(pool)
    with torch.no_grad():
        model.second.weight.mul_(0.0)  # one p everywhere, so that A and G are independent
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    y = torch.zeros(4, dtype=torch.int64) if pool else torch.zeros(4, 6, dtype=torch.int64)
    leaves = [model.second.weight, model.second.bias]
    fisher = torch.zeros(15, 15, dtype=torch.float64)
    for sample in x:
        for w, b in scores(model, sample, leaves):
            row = torch.cat([w, b[:, None]], 1).flatten()
            fisher += torch.outer(row, row) / 4
    for sharing in ("expand", "reduce"):
        a, g = (
            KroneckerFisher(model, "exact", sharing=sharing).fit([(x, y)]).factors["second.weight"]
        )
        error = (torch.kron(g, a) - fisher).abs().max() / fisher.abs().max()
        assert (error < 1e-10) == (sharing == ("reduce" if pool else "expand"))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_convolutions_and_tied_uses_by_their_definition(sharing: str) -> None:
    """Empirical factors of a convolution that is used twice, with a sample that is masked."""
    torch.manual_seed(0)
    conv = nn.Conv1d(2, 2, 3, padding=1).double()
    head = nn.Linear(2, 3).double()
    model = nn.Sequential(conv, nn.Tanh(), conv, nn.AdaptiveAvgPool1d(1), nn.Flatten(), head)
    x, y = torch.randn(4, 2, 5, dtype=torch.float64), torch.tensor([0, 2, -100, 1])
    a, g = KroneckerFisher(model, "empirical", sharing=sharing).fit([(x, y)]).factors["0.weight"]
    a_sum, g_sum, rows = 0.0, 0.0, 0
    for sample, label in zip(x, y, strict=True):
        if label == -100:
            continue
        u = conv(sample[None])
        v = conv(u.tanh())
        loss = nn.functional.cross_entropy(head(v.mean(-1)), label[None])
        parts = []
        for read, out in ((sample[None], u), (u.tanh(), v)):
            (gradient,) = torch.autograd.grad(loss, out, retain_graph=True)
            patches = nn.functional.pad(read, (1, 1)).unfold(2, 3, 1)[0]  # (C, T, 3)
            patches = patches.permute(1, 0, 2).reshape(5, 6).detach()
            parts.append((torch.cat([patches, torch.ones(5, 1).double()], 1), gradient[0].T))
        inputs, gradients = (torch.cat(p) for p in zip(*parts, strict=True))  # 10 positions
        if sharing == "reduce":
            inputs, gradients = inputs.mean(0, keepdim=True), gradients.sum(0, keepdim=True)
        a_sum, g_sum, rows = (
            a_sum + inputs.T @ inputs,
            g_sum + gradients.T @ gradients,
            rows + len(inputs),
        )
    torch.testing.assert_close(a, a_sum / rows)
    torch.testing.assert_close(g, g_sum / 4)  # a masked sample counts, with gradient 0


def test_padding_changes_neither_factor(
    tied_gpt: Callable[..., nn.Module], tokens: Callable[..., Batch]
) -> None:
    model = tied_gpt(torch.float64)
    x, y = tokens(6, masked=False)
    short = x[:, :4], y[:, :4]
    padded = y.clone()
    padded[:, 4:] = -100  # causal: positions before 4 do not see what follows
    with pytest.warns(UserWarning, match="nothing is known of wte.weight as used by 'wte', wpe"):
        a = KroneckerFisher(model, "exact").fit([short]).factors
    with pytest.warns(UserWarning, match="KroneckerFisher covers linear"):
        b = KroneckerFisher(model, "exact").fit([(x, padded)]).factors
    assert list(a) == list(b)
    assert {"wte.weight", "blocks.0.qkv.weight", "blocks.1.mlp.2.weight"} <= set(a)
    torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)


def test_a_masked_position_does_not_count_where_layers_have_as_many_positions() -> None:
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    y = torch.tensor([[0, -100], [-100, -100]])
    layer = nn.Linear(3, 3, bias=False).double()
    half = nn.Sequential(layer)
    half.forward = lambda x: layer(x)[:, ::2]  # 4 positions in the layer, 2 targets
    a = KroneckerFisher(half).fit([(x, y)]).factors["0.weight"].inputs
    torch.testing.assert_close(a, x[0].T @ x[0] / 4)

    y = torch.tensor([[0, -100, 2, -100], [-100, -100, -100, -100]])
    a = KroneckerFisher(layer).fit([(x, y)]).factors["weight"].inputs
    torch.testing.assert_close(a, x[0, ::2].T @ x[0, ::2] / 2)
    a = KroneckerFisher(layer, sharing="reduce").fit([(x, y)]).factors["weight"].inputs
    mean = x[0, ::2].mean(0)
    torch.testing.assert_close(a, torch.outer(mean, mean))


def moment(size: int, rank: int) -> Tensor:
    rows = torch.randn(size, rank, dtype=torch.float64)
    return rows @ rows.T


def kron(factors: KroneckerFactors) -> Tensor:
    return torch.kron(factors.outputs, factors.inputs)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_it_is_the_leading_singular_term(scale: float) -> None:
    first = KroneckerFactors(moment(4, 4), moment(3, 2))
    second = KroneckerFactors(moment(4, 2), scale * moment(3, 3))
    rearranged = torch.outer(first.outputs.flatten(), first.inputs.flatten())
    rearranged += torch.outer(second.outputs.flatten(), second.inputs.flatten())
    u, s, v = torch.linalg.svd(rearranged)
    best = s[0] * torch.outer(u[:, 0], v[0])
    found = nearest_product(first, second)
    actual = torch.outer(found.outputs.flatten(), found.inputs.flatten())
    torch.testing.assert_close(actual, best, rtol=1e-8, atol=1e-12 * best.abs().max().item())
    for factor in found:
        assert torch.linalg.eigvalsh(factor)[0] > -1e-12 * factor.abs().max()


def test_it_is_exact_where_one_factor_is_shared() -> None:
    shared = moment(3, 3)
    a, b = moment(4, 2), moment(4, 3)
    found = nearest_product(KroneckerFactors(a, shared), KroneckerFactors(b, 2 * shared))
    torch.testing.assert_close(kron(found), torch.kron(shared, a + 2 * b))
    found = nearest_product(KroneckerFactors(shared, a), KroneckerFactors(3 * shared, b))
    torch.testing.assert_close(kron(found), torch.kron(a + 3 * b, shared))


def test_orthogonal_products_of_one_size_leave_one_of_them_or_a_mixture() -> None:
    one, two = torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))
    found = nearest_product(KroneckerFactors(one, one), KroneckerFactors(two, two))
    error = kron(found) - torch.kron(one, one) - torch.kron(two, two)
    assert error.square().sum() == pytest.approx(1.0, abs=1e-6)  # that of keeping either


def test_a_product_that_is_zero_changes_nothing() -> None:
    zero = torch.zeros(3, 3, dtype=torch.float64)
    some = KroneckerFactors(moment(3, 3), moment(3, 3))
    for nothing in (KroneckerFactors(zero, zero), KroneckerFactors(zero, some.outputs)):
        torch.testing.assert_close(kron(nearest_product(some, nothing)), kron(some))
        torch.testing.assert_close(kron(nearest_product(nothing, some)), kron(some))
        assert not kron(nearest_product(nothing, nothing)).any()


def test_small_float32_factors_keep_their_precision() -> None:
    """Gradients of a trained model square to 1e-20, and their inner products to 1e-40."""
    first = KroneckerFactors(moment(4, 4).float(), 1e-20 * moment(3, 3).float())
    second = KroneckerFactors(moment(4, 4).float(), 1e-20 * moment(3, 3).float())
    found = nearest_product(first, second)
    wide = [KroneckerFactors(f.inputs.double(), f.outputs.double()) for f in (first, second)]
    torch.testing.assert_close(
        kron(found).double(), kron(nearest_product(*wide)), rtol=1e-4, atol=1e-27
    )
    assert found.inputs.dtype == found.outputs.dtype == torch.float32
