"""Importance and anchor after growth: the EWC penalty keeps its value."""

import pytest
import torch
from growth_cases import old_block, randomized, seeded, sizes, small_pairs
from torch import Tensor

from ars.models import Growth, grow


def perturbed(tensors: dict[str, Tensor], seed: int, size: float = 0.1) -> dict[str, Tensor]:
    generator = seeded(seed)
    return {
        name: value + size * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in tensors.items()
    }


def penalty(theta: dict[str, Tensor], anchor: dict[str, Tensor], omega: dict[str, Tensor]) -> float:
    assert theta.keys() == anchor.keys() == omega.keys()
    return sum(
        0.5 * (omega[name] * (theta[name] - anchor[name]).square()).sum().item() for name in theta
    )


@small_pairs
def test_ewc_penalty_does_not_change(pair):
    small, large = pair
    parent = randomized(small)
    theta = {name: weight.detach().clone() for name, weight in parent.named_parameters()}
    anchor = perturbed(theta, seed=5)
    omega = {name: value.square() for name, value in perturbed(theta, seed=6).items()}
    before = penalty(theta, anchor, omega)

    result = grow(parent, large, seeded(1))
    grown_theta = {
        name: weight.detach().clone() for name, weight in result.model.named_parameters()
    }
    grown_anchor, grown_omega = result.anchor(anchor), result.importance(omega)
    assert penalty(grown_theta, grown_anchor, grown_omega) == pytest.approx(before, rel=1e-12)

    # Moving on from there, by delta in the parent and by c delta in the grown model.
    moved = perturbed(theta, seed=7)
    assert penalty(moved, anchor, omega) != pytest.approx(before, rel=0.1)
    for name, scale in result.scales.items():
        old_block(grown_theta[name], theta[name]).add_(scale * (moved[name] - theta[name]))
    expected = penalty(moved, anchor, omega)
    assert penalty(grown_theta, grown_anchor, grown_omega) == pytest.approx(expected, rel=1e-12)

    # New coordinates are free.
    for name, value in perturbed(grown_theta, seed=8).items():
        kept = theta[name] if name in theta else value[:0]
        block = old_block(grown_theta[name], kept).clone()
        grown_theta[name] = value
        old_block(value, kept).copy_(block)
    assert penalty(grown_theta, grown_anchor, grown_omega) == pytest.approx(expected, rel=1e-12)


def test_anchor_of_the_parent_is_the_grown_model_at_growth():
    parent = randomized(sizes(2, 2))
    result = grow(parent, sizes(3, 3), seeded(1))
    at_growth = {name: weight.detach().clone() for name, weight in result.model.named_parameters()}
    with torch.no_grad():
        for weight in result.model.parameters():
            weight.add_(1.0)
    anchor = result.anchor(dict(parent.named_parameters()))
    assert anchor.keys() == at_growth.keys()
    for name, value in anchor.items():
        torch.testing.assert_close(value, at_growth[name], rtol=1e-14, atol=0)
        assert not value.requires_grad
        value.zero_()
    assert result.anchor({})["blocks.2.attn.q.weight"].ne(0).any()


def test_maps_keep_dtype_and_omissions():
    parent = randomized(sizes(1, 1))
    result = grow(parent, sizes(2, 2), seeded(1))
    appended = {name for name in result.initial if name.startswith("blocks.1.")}
    omega = result.importance({"lm_head.weight": torch.ones(29, 8)})
    assert omega.keys() == appended | {"lm_head.weight"}
    assert {value.dtype for value in omega.values()} == {torch.float32}
    assert omega["lm_head.weight"][:, :8].eq(2.0).all()  # 1 / c^2 = D'/D
    assert omega["lm_head.weight"][:, 8:].eq(0).all()
    anchor = result.anchor({"wte.weight": torch.ones(29, 8, dtype=torch.bfloat16)})
    assert anchor.keys() == appended | {"wte.weight"}
    assert anchor["wte.weight"].dtype == torch.bfloat16
    assert anchor["blocks.1.attn.q.weight"].dtype == torch.float64


@pytest.mark.parametrize("method", [Growth.importance, Growth.anchor])
def test_maps_reject_what_is_not_the_parents(method):
    result = grow(randomized(sizes(1, 1)), sizes(2, 2))
    with pytest.raises(ValueError, match=r"'blocks.1.attn.q.weight' is not a parameter"):
        method(result, {"blocks.1.attn.q.weight": torch.ones(16, 16)})
    with pytest.raises(ValueError, match=r"'wte.weight' has shape \(29, 16\).*\(29, 8\)"):
        method(result, {"wte.weight": torch.ones(29, 16)})
