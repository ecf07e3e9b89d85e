"""Where the subspace comes from: weights, activations, coordinates."""

import math

import pytest
import torch
from torch import nn

from ars.regularizers import ActivationCovariance, SubspacePenalty


def low_rank(rows, columns, values):
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, columns, generator=generator).double()).Q
    k = len(values)
    return left[:, :k] * torch.tensor(values).double() @ right[:, :k].T, left, right


def span_distance(basis, expected):
    return float((basis @ basis.T - expected @ expected.T).abs().max())


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize(
    ("options", "k"),
    # Squares 16, 9, 4, 1 of 30: fractions 0.533, 0.833, 0.967, 1.
    [
        ({"energy": 0.5}, 1),
        ({"energy": 0.84}, 3),
        ({"energy": 0.83}, 2),
        ({"energy": 1.0}, 4),
        ({"rank": 2}, 2),
        ({"rank": 99}, 4),
    ],
)
def test_weights_give_their_leading_singular_vectors(side, options, k):
    model = nn.Linear(7, 5).double()
    weight, left, right = low_rank(5, 7, [4.0, 3.0, 2.0, 1.0])
    with torch.no_grad():
        model.weight.copy_(weight)
    penalty = SubspacePenalty.from_weights(model, 2.0, side=side, **options)
    assert penalty.strength == 2.0
    assert list(penalty.bases) == ["weight"]
    expected = (left if side == "output" else right)[:, :k]
    assert penalty.bases["weight"].shape == expected.shape
    assert span_distance(penalty.bases["weight"], expected) < 1e-12


def test_small_singular_values_of_a_float32_weight_are_not_noise():
    model = nn.Linear(300, 200)
    weight, _, right = low_rank(200, 300, [1.0, 1e-3, 1e-4])
    with torch.no_grad():
        model.weight.copy_(weight)
    basis = SubspacePenalty.from_weights(model, rank=9).bases["weight"]
    assert basis.shape == (300, 3)
    assert span_distance(basis.double(), right[:, :3]) < 0.02


def test_a_long_flat_tail_of_activations_is_not_noise():
    model = nn.Linear(1000, 2)
    variances = torch.full((1000,), 5e-5)
    variances[3] = 1.0
    penalty = SubspacePenalty.from_activations(model, {"weight": variances.diag()}, energy=0.99)
    # The sum is 1.04995, 0.99 of it 1.0394505: the first and 0.0394505 / 5e-5 = 789.01 of the tail.
    assert penalty.bases["weight"].shape == (1000, 791)


def test_rounding_errors_are_no_directions():
    model = nn.Linear(64, 2)
    inputs = torch.randn(5, 64)
    penalty = SubspacePenalty.from_activations(model, [inputs], energy=1.0)
    assert penalty.bases["weight"].shape == (64, 5)


def test_weights_that_are_frozen_are_left_alone_unless_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    assert list(SubspacePenalty.from_weights(model, rank=1).bases) == ["1.weight"]
    named = SubspacePenalty.from_weights(model, rank=1, names=["0.weight"])
    assert list(named.bases) == ["0.weight"]


def test_activations_may_come_as_a_mapping_by_either_name():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    inputs = torch.randn(2, 3).double()
    fitted = ActivationCovariance(model).fit([inputs])
    covariances = fitted.covariance
    by_batches = SubspacePenalty.from_activations(model, [inputs], rank=2)
    for renamed in (
        fitted,
        covariances,
        {n.removesuffix(".weight"): c for n, c in covariances.items()},
    ):
        by_mapping = SubspacePenalty.from_activations(model, renamed, rank=2)
        assert list(by_mapping.bases) == ["0.weight", "1.weight"]
        for name, basis in by_mapping.bases.items():
            assert torch.equal(basis, by_batches.bases[name])
    expected = torch.linalg.qr(inputs.T).Q
    assert span_distance(by_batches.bases["0.weight"], expected) < 1e-10
    only = SubspacePenalty.from_activations(model, covariances, rank=1, names=["1.weight"])
    assert list(only.bases) == ["1.weight"]


def test_a_convolution_does_not_change_on_inputs_that_were_seen():
    model = nn.Conv2d(2, 5, (3, 2), stride=2, padding=1).double()
    inputs = torch.randn(1, 2, 4, 3).double()
    outputs = model(inputs).detach()
    penalty = SubspacePenalty.from_activations(model, [inputs], energy=1.0)
    assert penalty.bases["weight"].shape[1] < 12
    with torch.no_grad():
        model.weight += torch.randn_like(model.weight)
    penalty.project_()
    assert (model.weight - penalty.anchor["weight"]).abs().max() > 0.1
    torch.testing.assert_close(model(inputs), outputs, rtol=1e-10, atol=1e-10)


def test_coordinates_restrain_what_is_new():
    model = nn.Linear(4, 3, bias=False).double()
    penalty = SubspacePenalty.from_coordinates(model, {"weight": 3}, strength=2.0)
    assert (penalty.side, penalty.protect) == ("input", "outside")
    with torch.no_grad():
        model.weight[:, :3] += 5.0
        assert penalty.value().item() == 0.0
        model.weight[:, 3] += 1.0
    assert penalty.value().item() == pytest.approx(6.0)
    rows = SubspacePenalty.from_coordinates(
        model, {"weight": torch.tensor([0, 2])}, side="output", protect="inside"
    )
    with torch.no_grad():
        model.weight[1] += 5.0
        assert rows.value().item() == 0.0
        model.weight[2] += 1.0
    assert rows.value().item() == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "either energy or rank, got energy=None and rank=None"),
        ({"energy": 0.5, "rank": 1}, "either energy or rank"),
        ({"energy": 0.0}, r"energy must be in \(0, 1\]"),
        ({"energy": 1.5}, r"energy must be in \(0, 1\]"),
        ({"energy": math.nan}, r"energy must be in \(0, 1\]"),
        ({"rank": 0}, "rank must be an integer >= 1"),
        ({"rank": True}, "rank must be an integer >= 1"),
        ({"rank": 1.0}, "rank must be an integer >= 1"),
    ],
)
def test_refuses_wrong_sizes(options, match):
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=match):
        SubspacePenalty.from_weights(model, **options)
    with pytest.raises(ValueError, match=match):
        SubspacePenalty.from_activations(model, [torch.randn(2, 3)], **options)


def test_refuses_wrong_weights():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="names names 'bais', which is not a parameter"):
        SubspacePenalty.from_weights(model, rank=1, names=["bais"])
    with pytest.raises(ValueError, match=r"'bias' has shape \(2,\): no singular vectors"):
        SubspacePenalty.from_weights(model, rank=1, names=["bias"])
    with torch.no_grad():
        model.weight.zero_()
    with pytest.raises(ValueError, match="'weight' is zero or not finite"):
        SubspacePenalty.from_weights(model, rank=1)


@pytest.mark.parametrize(
    ("activations", "error", "match"),
    [
        ([], ValueError, "batches is empty"),
        ({"fc": torch.eye(3)}, ValueError, "activations names 'fc.weight', which is not a param"),
        ({"weight": torch.ones(3, 2)}, ValueError, r"shape \(3, 2\), expected \(d, d\)"),
        ({"weight": torch.eye(4)}, ValueError, r"shape \(4, 1\), expected \(3, k\)"),
        ({"weight": torch.eye(3).long()}, TypeError, "floating-point tensor .*got torch.int64"),
        ({"weight": torch.eye(3) * math.nan}, ValueError, "covariance of 'weight' is not finite"),
        ({"weight": torch.ones(3, 3).triu()}, ValueError, "not symmetric"),
        ({"weight": torch.zeros(3, 3)}, ValueError, "'weight' is zero or not finite"),
    ],
)
def test_refuses_wrong_activations(activations, error, match):
    with pytest.raises(error, match=match):
        SubspacePenalty.from_activations(nn.Linear(3, 2), activations, rank=1)


def test_refuses_names_without_a_covariance():
    with pytest.raises(ValueError, match=r"lack 'x\.weight', which names asks for; they have \['w"):
        SubspacePenalty.from_activations(
            nn.Linear(3, 2), {"weight": torch.eye(3)}, rank=1, names=["x.weight"]
        )


@pytest.mark.parametrize("count", [0, -1])
def test_no_coordinates_are_refused_by_name(count):
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"basis of 'weight' is indices, so of shape \(k,\)"):
        SubspacePenalty.from_coordinates(model, {"weight": count})
