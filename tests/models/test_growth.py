"""Growth keeps the function and the EWC penalty, and gives every new coordinate a signal."""

import dataclasses
import math

import pytest
import torch
from growth_cases import (
    gradients,
    kinds,
    loss_of,
    new_coordinates,
    old_block,
    pairs,
    randomized,
    seeded,
    sizes,
    small_pairs,
    tokens_of,
)
from torch import Tensor

from ars.models import GPT, Growth, grow, miniseries_config


@pairs
@kinds
@pytest.mark.parametrize("norm_eps", [0.0, 1e-6, 0.3])
def test_logits_do_not_change(pair, blocks, norm_eps):
    small, large = (dataclasses.replace(config, norm_eps=norm_eps) for config in pair)
    parent, tokens = randomized(small), tokens_of(small)
    before = parent(tokens)
    grown = grow(parent, large, seeded(1), blocks=blocks).model
    assert before.std() > 0.1
    torch.testing.assert_close(grown(tokens), before, rtol=0, atol=1e-12)


@pairs
@kinds
def test_logits_do_not_change_in_float32(pair, blocks):
    small, large = pair
    parent, tokens = randomized(small, torch.float32), tokens_of(small)
    grown = grow(parent, large, seeded(1), blocks=blocks).model
    assert grown.wte.weight.dtype == torch.float32
    torch.testing.assert_close(grown(tokens), parent(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("recompute", [True, False])
def test_how_the_parent_runs_is_kept(recompute):
    parent = randomized(sizes(2, 2))
    parent.recompute = recompute
    parent.eval()
    grown = grow(parent, sizes(3, 3), seeded(1)).model
    assert grown.recompute is recompute
    assert not grown.training


def test_zero_padding_without_scales_changes_the_logits():
    small, large = miniseries_config(3, sequence_len=80), miniseries_config(4, sequence_len=80)
    parent, tokens = randomized(small), tokens_of(small)
    result = grow(parent, large, seeded(1))
    with torch.no_grad():
        for name, scale in result.scales.items():
            old = parent.get_parameter(name)
            block = old_block(result.model.get_parameter(name), old)
            torch.testing.assert_close(block, scale * old)
            block.copy_(old)
    assert (result.model(tokens) - parent(tokens)).abs().max() > 0.01


def test_a_fixed_eps_in_the_embedding_norm_would_not_be_exact(monkeypatch):
    """What the width-dependent eps is for: the same growth of a model without it is off."""
    small, large = sizes(2, 2), sizes(3, 3)
    parent, tokens = randomized(small), tokens_of(small)
    grown = grow(parent, large, seeded(1)).model
    norm = torch.nn.functional.rms_norm
    monkeypatch.setattr(
        torch.nn.functional, "rms_norm", lambda x, shape, eps: norm(x, shape, eps=small.norm_eps)
    )
    assert (grown(tokens) - parent(tokens)).abs().max() > 1e-8


def test_growing_grown_models_stays_exact():
    configs = [miniseries_config(depth, sequence_len=80) for depth in (1, 2, 3)]
    first = model = randomized(configs[0])
    tokens = tokens_of(configs[0])
    for i, config in enumerate(configs[1:]):
        model = grow(model, config, seeded(i)).model
    torch.testing.assert_close(model(tokens), first(tokens), rtol=0, atol=1e-12)
    assert model.config == configs[-1]


@small_pairs
@kinds
def test_scales(pair, blocks):
    small, large = pair
    parent = randomized(small)
    stretch = math.sqrt(large.n_embd / small.n_embd)
    scales = grow(parent, large, blocks=blocks).scales
    assert list(scales) == [name for name, _ in parent.named_parameters()]
    for name, scale in scales.items():
        shrinks = name == "lm_head.weight" or name.endswith("mlp.proj.weight")
        assert scale == pytest.approx(1 / stretch if shrinks else 1.0, rel=1e-15)


@small_pairs
@kinds
def test_gradients_scale_by_one_over_c(pair, blocks):
    small, large = pair
    parent, tokens = randomized(small), tokens_of(small)
    result = grow(parent, large, seeded(1), blocks=blocks)
    before, after = gradients(parent, tokens), gradients(result.model, tokens)
    for name, old in before.items():
        assert old.abs().max() > 1e-4
        expected = old / result.scales[name]
        block = old_block(after[result.names[name]], old)
        torch.testing.assert_close(block, expected, rtol=0, atol=1e-10)


@small_pairs
@kinds
def test_every_new_coordinate_receives_a_gradient(pair, blocks):
    small, large = pair
    tokens = tokens_of(small)
    result = grow(randomized(small), large, seeded(1), blocks=blocks)
    model = result.model
    first = gradients(model, tokens)
    writes = 0
    for name, weight in model.named_parameters():
        zero = weight.detach().eq(0)
        writes += int(zero.sum())
        assert first[name][zero].ne(0).all(), f"{name}: a new write has no gradient"
    assert writes > 0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.sub_(first[name], alpha=0.1)
    second = gradients(model, tokens)
    for name, weight in model.named_parameters():
        # One hidden unit of relu^2 may be off for every token, as in any model: a whole row or
        # column without gradient is allowed only there.
        if name.endswith("mlp.fc.weight"):
            alive = second[name].ne(0).all(dim=1)
            assert alive.float().mean() > 0.95, name
            assert (second[name].ne(0).any(dim=1) == alive).all(), name
        elif name.endswith("mlp.proj.weight"):
            assert second[name].ne(0).all(dim=0).float().mean() > 0.95, name
        else:
            assert second[name].ne(0).all(), name
        assert weight.detach().ne(0).all(), name


def test_new_entries_follow_the_law_of_the_large_model():
    small, large = miniseries_config(2), miniseries_config(4)
    result = grow(randomized(small), large, seeded(1))
    for name, weight in result.model.named_parameters():
        new = weight.detach()
        if name in result.scales:
            new = new_coordinates(new, result.parent.get_parameter(name))
        if name == "wte.weight" or name.endswith("proj.weight"):
            assert new.eq(0).all(), name
            continue
        std = 0.001 if name == "lm_head.weight" else 1 / math.sqrt(256)
        # At least 32768 draws: the standard error of their deviation is below 0.4 %.
        assert new.std().item() == pytest.approx(std, rel=0.02), name
        if name != "lm_head.weight":
            assert new.abs().max() <= math.sqrt(3 / 256) * (1 + 1e-6), name


def test_generator_fixes_the_new_weights_and_spares_the_global_state():
    parent, large = randomized(sizes(2, 2)), sizes(3, 3)
    state = torch.get_rng_state()
    a, b, other = (grow(parent, large, seeded(seed)).model for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.blocks[2].attn.q.weight, other.blocks[2].attn.q.weight)


def test_parent_is_not_modified():
    parent, tokens = randomized(sizes(2, 2)), tokens_of(sizes(2, 2))
    before = {name: weight.clone() for name, weight in parent.state_dict().items()}
    result = grow(parent, sizes(3, 3), seeded(1))
    assert result.parent is parent
    loss_of(result.model, tokens).backward()
    torch.optim.SGD(result.model.parameters(), lr=1.0).step()
    for name, weight in parent.named_parameters():
        assert torch.equal(weight, before[name])
        assert weight.grad is None


def test_mode_and_frozen_parameters_are_kept():
    parent = randomized(sizes(1, 1)).eval()
    parent.wte.weight.requires_grad_(False)
    model = grow(parent, sizes(2, 2)).model
    assert not model.training
    assert [n for n, w in model.named_parameters() if not w.requires_grad] == ["wte.weight"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (sizes(1, 2), "n_layer shrinks from 2 to 1"),
        (sizes(2, 1), "n_head shrinks from 2 to 1"),
        (sizes(2, 2, 4), "n_embd shrinks from 16 to 8"),
        (sizes(2, 2, sequence_len=11), "sequence_len shrinks from 12 to 11"),
        (sizes(2, 2, 16), "head_dim = n_embd / n_head changes from 8 to 16"),
        (sizes(2, 4, 4), "head_dim = n_embd / n_head changes from 8 to 4"),
        (sizes(3, 3, vocab_size=30), "vocab_size changes from 29 to 30"),
        (sizes(3, 3, norm_eps=1e-5), "norm_eps changes from 1e-06 to 1e-05"),
        (sizes(3, 3, rope_base=1e5), "rope_base changes from 10000.0 to 100000.0"),
    ],
)
def test_grow_rejects(config, message):
    with pytest.raises(ValueError, match=message):
        grow(GPT(sizes(2, 2)), config)


def test_grow_rejects_other_types():
    with pytest.raises(TypeError, match=r"model must be a GPT itself.*Sequential"):
        grow(torch.nn.Sequential(), sizes(2, 2))
    with pytest.raises(TypeError, match="config must be a GPTConfig, got int"):
        grow(GPT(sizes(2, 2)), 3)


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
@kinds
def test_ewc_penalty_does_not_change(pair, blocks):
    small, large = pair
    parent = randomized(small)
    theta = {name: weight.detach().clone() for name, weight in parent.named_parameters()}
    anchor = perturbed(theta, seed=5)
    omega = {name: value.square() for name, value in perturbed(theta, seed=6).items()}
    before = penalty(theta, anchor, omega)

    result = grow(parent, large, seeded(1), blocks=blocks)
    grown_theta = {
        name: weight.detach().clone() for name, weight in result.model.named_parameters()
    }
    grown_anchor, grown_omega = result.anchor(anchor), result.importance(omega)
    assert penalty(grown_theta, grown_anchor, grown_omega) == pytest.approx(before, rel=1e-12)

    # Moving on from there, by delta in the parent and by c delta in the grown model.
    moved = perturbed(theta, seed=7)
    assert penalty(moved, anchor, omega) != pytest.approx(before, rel=0.1)
    for name, scale in result.scales.items():
        block = old_block(grown_theta[result.names[name]], theta[name])
        block.add_(scale * (moved[name] - theta[name]))
    expected = penalty(moved, anchor, omega)
    assert penalty(grown_theta, grown_anchor, grown_omega) == pytest.approx(expected, rel=1e-12)

    # New coordinates are free.
    sources = {grown: name for name, grown in result.names.items()}
    for name, value in perturbed(grown_theta, seed=8).items():
        kept = theta[sources[name]] if name in sources else value[:0]
        block = old_block(grown_theta[name], kept).clone()
        grown_theta[name] = value
        old_block(value, kept).copy_(block)
    assert penalty(grown_theta, grown_anchor, grown_omega) == pytest.approx(expected, rel=1e-12)


@kinds
def test_anchor_of_the_parent_is_the_grown_model_at_growth(blocks):
    parent = randomized(sizes(2, 2))
    result = grow(parent, sizes(3, 3), seeded(1), blocks=blocks)
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
    new = "blocks.2.attn.q.weight" if blocks == "appended" else "blocks.1.attn.q.weight"
    assert result.anchor({}).keys() == at_growth.keys() - result.names.values()
    assert result.anchor({})[new].ne(0).any()


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
