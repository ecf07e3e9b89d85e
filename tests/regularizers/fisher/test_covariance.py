"""The second moments of layer inputs against the matrices of all inputs."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ars.regularizers import ActivationCovariance


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)).double()


def inputs(n: int = 10) -> Tensor:
    return torch.randn(n, 4, dtype=torch.float64)


def test_every_layer_against_its_inputs() -> None:
    model, x = mlp(), inputs()
    activations = ActivationCovariance(model).fit([x])
    hidden = model[:2](x).detach()
    assert list(activations.covariance) == ["0.weight", "2.weight"]
    for name, rows in (("0.weight", x), ("2.weight", hidden)):
        torch.testing.assert_close(activations.covariance[name], rows.T @ rows / 10)
        torch.testing.assert_close(activations.mean[name], rows.mean(0))
        ones = torch.cat([rows, torch.ones(10, 1, dtype=torch.float64)], 1)
        torch.testing.assert_close(activations.augmented[name], ones.T @ ones / 10)
    assert activations.n_samples == 10


def test_merging_is_fitting_on_both() -> None:
    model, x = mlp(), inputs()
    parts = [ActivationCovariance(model).fit([part]) for part in x.split([1, 2, 7])]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    whole = ActivationCovariance(model).fit([x])
    assert merged.n_samples == 10
    for name, expected in whole.augmented.items():
        torch.testing.assert_close(merged.augmented[name], expected, rtol=1e-12, atol=1e-14)
    alone = ActivationCovariance(model).fit([x[:1]]).augmented
    assert torch.equal(parts[0].augmented["0.weight"], alone["0.weight"])


def test_patches_of_a_convolution_and_uses_of_a_tied_weight() -> None:
    conv = nn.Conv2d(2, 3, 3, padding=1).double()
    x = torch.randn(4, 2, 5, 6, dtype=torch.float64)
    patches = nn.functional.unfold(x, 3, padding=1).mT.reshape(-1, 18)
    found = ActivationCovariance(nn.Sequential(conv)).fit(x.split(3)).covariance["0.weight"]
    torch.testing.assert_close(found, patches.T @ patches / len(patches))

    layer = nn.Linear(4, 4).double()
    x = inputs()
    model = nn.Sequential(layer, layer)
    rows = torch.cat([x, layer(x).detach()])
    found = ActivationCovariance(model).fit([x]).covariance["0.weight"]
    torch.testing.assert_close(found, rows.T @ rows / 20)


def test_masked_positions_do_not_count(
    tied_gpt: Callable[..., nn.Module], tokens: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    model = tied_gpt(torch.float64)
    x, y = tokens(5)
    with pytest.warns(UserWarning, match=re.escape("wpe.weight, blocks.0.norm1.weight")):
        masked = ActivationCovariance(model).fit([(x, y)])
    rows = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(args[0].detach()))
    model.eval()(x)
    handle.remove()
    kept = rows[0][y != -100]
    torch.testing.assert_close(masked.covariance["wte.weight"], kept.T @ kept / len(kept))
    assert 0 < len(kept) < y.numel()

    model = nn.Sequential(nn.Conv1d(2, 2, 3), nn.Flatten(), nn.Linear(4, 3)).double()
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    some = ActivationCovariance(model).fit([(x, torch.tensor([0, -100, 2]))])
    rest = ActivationCovariance(model).fit([x[[0, 2]]])
    torch.testing.assert_close(some.augmented, rest.augmented)


def test_what_is_refused() -> None:
    model, x = mlp(), inputs()
    fitted = ActivationCovariance(model).fit([x])
    before = fitted.augmented
    for batches, n, says in (
        ([], None, "batches is empty"),
        ([x], 11, "n_samples=11, but batches held only 10"),
        ([x], 0, "n_samples must be a positive integer"),
        ([x[:0]], None, "batch 0 is empty"),
        ([(x, torch.full((10,), -100))], None, "every position of '0.weight' is masked"),
        ([x * torch.nan], None, "the inputs of '0.weight' are not finite"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            fitted.fit(batches, n)
    with pytest.raises(TypeError, match="must be a pair"):
        fitted.fit([[x, x, x]])
    assert all(torch.equal(before[n], m) for n, m in fitted.augmented.items())

    with pytest.raises(TypeError, match="model must be a"):
        ActivationCovariance(x)
    with pytest.raises(RuntimeError, match="not fitted"):
        _ = ActivationCovariance(model).covariance
    with pytest.raises(RuntimeError, match="not fitted"):
        fitted.merge(ActivationCovariance(model))
    with pytest.raises(TypeError, match="other must be"):
        fitted.merge(before)
    with pytest.raises(
        ValueError, match=r"has '2.weight', which is no layer of this one's Sequent"
    ):
        ActivationCovariance(model[:1]).fit([x]).merge(fitted)
    wide = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    another = ActivationCovariance(wide).fit([torch.ones(1, 5, dtype=torch.float64)])
    with pytest.raises(ValueError, match=r"'0.weight' has 5 inputs in the other, 4 here"):
        fitted.merge(another)
    with pytest.raises(ValueError, match="no trained linear"):
        ActivationCovariance(nn.LayerNorm(4).double()).fit([x])
