"""What ``fit`` of all three promises: which samples it takes, its precision, what it leaves."""

import pytest
import torch
from torch import nn

from ars.regularizers import ActivationCovariance, DiagonalFisher, KroneckerFisher

RESULTS = {
    "diagonal": (lambda m: DiagonalFisher(m, "exact", chunk_size=3), lambda f: f.importance),
    "kronecker": (lambda m: KroneckerFisher(m, "exact"), lambda f: f.factors),
    "covariance": (ActivationCovariance, lambda f: f.augmented),
}
every = pytest.mark.parametrize(("make", "result"), RESULTS.values(), ids=RESULTS)


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()


def data(n):
    return torch.randn(n, 4, dtype=torch.float64), torch.arange(n) % 3


@every
def test_n_samples_stops_within_a_batch_and_a_second_fit_starts_afresh(make, result):
    model, (x, y) = mlp(), data(12)
    taken = []

    def batches():
        for i in range(0, 12, 4):
            taken.append(i)
            yield x[i : i + 4], y[i : i + 4]

    fisher = make(model).fit([data(3)])
    fisher.fit(batches(), n_samples=6)
    assert fisher.n_samples == 6
    assert taken == [0, 4]
    expected = result(make(model).fit([(x[:6], y[:6])]))
    torch.testing.assert_close(result(fisher), expected, rtol=1e-12, atol=1e-14)
    fisher.fit(batches(), n_samples=4)
    assert taken == [0, 4, 0]  # a batch that is not needed is not fetched


@every
def test_too_few_samples_and_wrong_numbers_of_them(make, result):
    fisher = make(mlp())
    with pytest.raises(ValueError, match=r"n_samples=7, but batches held only 6"):
        fisher.fit([data(6)], n_samples=7)
    with pytest.raises(RuntimeError, match="call fit"):
        result(fisher)
    assert fisher.n_samples == 0
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="n_samples must be a positive integer"):
            fisher.fit([data(6)], n_samples=wrong)


@every
@pytest.mark.parametrize("size", [1, 5])
def test_the_batch_size_does_not_matter(make, result, size):
    model, (x, y) = mlp(), data(12)
    whole = make(model).fit([(x, y)])
    split = make(model).fit(zip(x.split(size), y.split(size), strict=True))
    torch.testing.assert_close(result(split), result(whole), rtol=1e-12, atol=1e-14)


@every
def test_the_model_is_left_as_it_was(make, result):
    model, batch = mlp(), data(4)
    model[2].eval()
    with torch.no_grad():  # the caller's mode does not matter
        first = result(make(model).fit([batch]))
    assert [module.training for module in model] == [True, True, False]
    assert all(p.grad is None for p in model.parameters())
    again = result(make(model).fit([batch]))  # without dropout
    torch.testing.assert_close(again, first, rtol=0, atol=0)


WAYS_OF_HALF = {
    **{
        method: (
            lambda m, method=method: DiagonalFisher(m, "empirical", method=method),
            lambda f: (f.importance["weight"][0, 0], f.importance["bias"][0]),
        )
        for method in ("loop", "vmap", "hooks")
    },
    "kronecker": (
        lambda m: KroneckerFisher(m, "exact"),
        lambda f: (f.factors["weight"].inputs[0, 0] / 4, f.factors["weight"].outputs[0, 0]),
    ),
    "covariance": (
        ActivationCovariance,
        lambda f: (f.augmented["weight"][0, 0] / 4, f.augmented["weight"][1, 1] / 4),
    ),
}


@pytest.mark.parametrize(("make", "entries"), WAYS_OF_HALF.values(), ids=WAYS_OF_HALF)
def test_half_precision_is_summed_in_float32(make, entries):
    """A bfloat16 running sum of equal terms stops growing at 256 of them."""
    model = nn.Linear(1, 2, dtype=torch.bfloat16)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    x, y = torch.full((600, 1), 0.03125, dtype=torch.bfloat16), torch.zeros(600).long()
    fisher = make(model).fit(zip(x.split(70), y.split(70), strict=True))
    weight, bias = entries(fisher)
    assert weight.dtype == bias.dtype == torch.float32
    # p (1 - p) x^2 and p (1 - p), but for sqrt(1/2) in bfloat16.
    torch.testing.assert_close(weight, torch.tensor(0.03125**2 / 4), rtol=2**-6, atol=0)
    torch.testing.assert_close(bias, torch.tensor(0.25), rtol=2**-6, atol=0)
