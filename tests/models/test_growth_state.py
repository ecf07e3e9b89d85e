"""Optimizer state after growth: moments by 1/c and 1/c^2, steps and extra entries kept."""

import math
from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ars import ARSAdamW
from ars.models import GPT, GPTConfig, Growth, grow
from ars.reference import join_master, split_master

SMALL = GPTConfig(vocab_size=29, sequence_len=12, n_layer=2, n_head=2, n_embd=16)
LARGE = GPTConfig(vocab_size=29, sequence_len=12, n_layer=3, n_head=3, n_embd=24)
LR = 1e-3


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(seed: int) -> Tensor:
    order = torch.randperm(29 * 12, generator=seeded(seed)) % 29
    return order.view(29, 12)


def backward(model: GPT, tokens: Tensor) -> None:
    model.zero_grad()
    cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()


def trained(dtype: torch.dtype = torch.float64, **options) -> tuple[GPT, torch.optim.AdamW]:
    """A parent after ten steps, so that no moment is zero by accident."""
    model = GPT(SMALL, seeded(0)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, **options)
    for step in range(10):
        backward(model, batch(step))
        optimizer.step()
    return model, optimizer


def grown(
    blocks: str = "appended", **options
) -> tuple[Growth, torch.optim.AdamW, torch.optim.AdamW]:
    parent, old = trained(**options)
    growth = grow(parent, LARGE, seeded(1), blocks=blocks)
    new = torch.optim.AdamW(growth.model.parameters(), lr=LR, **options)
    new.load_state_dict(growth.optimizer_state(old, new))
    return growth, old, new


def old_block(tensor: Tensor, old: Tensor) -> Tensor:
    return tensor[: old.size(0), : old.size(1)]


def new_mask(tensor: Tensor, old: Tensor) -> Tensor:
    mask = torch.ones_like(tensor, dtype=torch.bool)
    old_block(mask, old).fill_(False)
    return mask


@pytest.mark.parametrize(
    ("amsgrad", "blocks"), [(False, "appended"), (True, "appended"), (False, "inserted")]
)
def test_moments_scale_by_one_over_c_and_c_squared(amsgrad, blocks):
    growth, old, new = grown(blocks, amsgrad=amsgrad)
    stretch = math.sqrt(24 / 16)
    powers = {"exp_avg": 1, "exp_avg_sq": 2} | ({"max_exp_avg_sq": 2} if amsgrad else {})
    for name, parameter in growth.parent.named_parameters():
        grown_parameter = growth.model.get_parameter(growth.names[name])
        before, after = old.state[parameter], new.state[grown_parameter]
        assert after.keys() == before.keys() == powers.keys() | {"step"}
        assert after["step"].item() == 10
        shrinks = name == "lm_head.weight" or name.endswith("mlp.proj.weight")
        factor = stretch if shrinks else 1.0  # 1 / c
        for key, power in powers.items():
            expected = before[key] * factor**power
            assert expected.ne(0).any()
            block = old_block(after[key], before[key])
            torch.testing.assert_close(block, expected, rtol=1e-12, atol=0)
            new_entries = new_mask(after[key], before[key]).nonzero().tolist()
            for row, column in new_entries:
                seeds = [0.0]
                if power == 2:
                    seeds = [expected.mean().item()]
                    seeds += [expected[row].mean().item()] if row < len(expected) else []
                    seeds += [expected[:, column].mean().item()] if column < len(expected.T) else []
                seed = pytest.approx(max(seeds), rel=1e-12, abs=0.0)
                assert after[key][row, column].item() == seed


@pytest.mark.parametrize(("blocks", "block"), [("appended", 2), ("inserted", 1)])
def test_new_parameters_start_without_state(blocks, block):
    growth, _, new = grown(blocks)
    for name, parameter in growth.model.named_parameters():
        assert (parameter not in new.state) == name.startswith(f"blocks.{block}.")
    backward(growth.model, batch(20))
    new.step()
    fresh = growth.model.get_parameter(f"blocks.{block}.mlp.fc.weight")
    assert new.state[fresh]["step"].item() == 1
    assert new.state[growth.model.wte.weight]["step"].item() == 11


@pytest.mark.parametrize(
    ("amsgrad", "blocks"), [(False, "appended"), (True, "appended"), (False, "inserted")]
)
def test_a_step_moves_the_old_block_as_far_as_in_the_parent(amsgrad, blocks):
    """Adam divides by sqrt(v), so c cancels: equal steps, and not c times the parent's."""
    # eps would be added to sqrt(v) / c; 1e-30 keeps it from mattering and 0 / 0 from happening.
    growth, old, new = grown(blocks, amsgrad=amsgrad, eps=1e-30, weight_decay=0.0)
    before = {name: weight.detach().clone() for name, weight in growth.model.named_parameters()}
    parent_before = {name: w.detach().clone() for name, w in growth.parent.named_parameters()}
    for model, optimizer in ((growth.parent, old), (growth.model, new)):
        backward(model, batch(20))
        optimizer.step()
    for name, parameter in growth.parent.named_parameters():
        moved = parameter.detach() - parent_before[name]
        name = growth.names[name]
        block = old_block(growth.model.get_parameter(name).detach() - before[name], moved)
        assert moved.abs().max() > 0.1 * LR
        torch.testing.assert_close(block, moved, rtol=0, atol=1e-9 * LR)


def first_step_of_new_coordinates(growth: Growth, optimizer: torch.optim.Optimizer) -> float:
    """Largest move of a coordinate that an old tensor gained, in units of the learning rate."""
    before = {name: weight.detach().clone() for name, weight in growth.model.named_parameters()}
    backward(growth.model, batch(20))
    optimizer.step()
    largest = 0.0
    for name, old in growth.parent.named_parameters():
        moved = (growth.model.get_parameter(name).detach() - before[name]).abs()
        largest = max(largest, moved[new_mask(moved, old)].max().item())
    return largest / LR


def test_first_step_of_new_coordinates_is_at_most_lr():
    growth, _, new = grown(weight_decay=0.0)
    assert 0.1 < first_step_of_new_coordinates(growth, new) <= 1.0


def test_zero_second_moments_would_make_the_first_step_larger_than_lr():
    growth, _, new = grown(weight_decay=0.0)
    # Late in training, where the bias corrections have gone: (1 - beta1) / sqrt(1 - beta2).
    for name, old in growth.parent.named_parameters():
        state = new.state[growth.model.get_parameter(name)]
        state["exp_avg_sq"][new_mask(state["exp_avg_sq"], old)] = 0.0
        state["step"].fill_(1e5)
    expected = 0.1 / math.sqrt(0.001)
    assert first_step_of_new_coordinates(growth, new) == pytest.approx(expected, rel=0.01)


def test_empty_state_maps_to_empty_state():
    parent = GPT(SMALL, seeded(0))
    growth = grow(parent, LARGE)
    new = torch.optim.AdamW(growth.model.parameters())
    state = growth.optimizer_state(torch.optim.AdamW(parent.parameters()), new)
    assert state["state"] == {}
    new.load_state_dict(state)
    assert not new.state


def test_groups_and_hyperparameters_are_the_new_optimizers():
    """Parameters are matched by identity: other groups in another order change nothing."""
    parent, old = trained()
    growth = grow(parent, LARGE, seeded(1))
    parameters = list(growth.model.parameters())[::-1]
    new = torch.optim.AdamW(
        [{"params": parameters[:3], "lr": 0.5}, {"params": parameters[3:], "betas": (0.8, 0.9)}]
    )
    new.load_state_dict(growth.optimizer_state(old, new))
    assert [group["lr"] for group in new.param_groups] == [0.5, 1e-3]
    assert [group["betas"] for group in new.param_groups] == [(0.9, 0.999), (0.8, 0.9)]
    for name, weight in parent.named_parameters():
        block = old_block(new.state[growth.model.get_parameter(name)]["exp_avg"], weight)
        expected = old.state[weight]["exp_avg"] / growth.scales[name]
        torch.testing.assert_close(block, expected, rtol=1e-12, atol=0)


def test_one_optimizer_of_several_is_enough():
    """Say AdamW for the embedding and the head, another optimizer for the matrices."""
    parent = GPT(SMALL, seeded(0))
    old = torch.optim.AdamW([parent.lm_head.weight, parent.wte.weight])
    backward(parent, batch(0))
    old.step()
    growth = grow(parent, LARGE)
    new = torch.optim.AdamW([growth.model.wte.weight, growth.model.lm_head.weight])
    new.load_state_dict(growth.optimizer_state(old, new))
    assert new.state[growth.model.wte.weight]["exp_avg"].shape == (29, 24)
    assert new.state.keys() == {growth.model.wte.weight, growth.model.lm_head.weight}


def test_neither_optimizer_nor_the_result_share_memory():
    parent, old = trained()
    growth = grow(parent, SMALL)  # equal shapes: the easiest to alias
    new = torch.optim.AdamW(growth.model.parameters())
    before = deepcopy(old.state_dict())
    state = growth.optimizer_state(old, new)
    for entry in state["state"].values():
        for value in entry.values():
            value.fill_(7.0)
    torch.testing.assert_close(old.state_dict(), before, rtol=0, atol=0)
    assert not new.state


class WithController(torch.optim.AdamW):
    """AdamW with what a self-tuning optimizer keeps: products per tensor, a controller on top."""

    controller: Tensor

    def step(self, closure=None):
        result = super().step(closure)
        for state in self.state.values():
            state["beta_products"] = torch.tensor([0.9, 0.999], dtype=torch.float64)
            state["calls"] = 3
        return result

    def state_dict(self):
        return {**super().state_dict(), "controller": {"history": self.controller}}

    def load_state_dict(self, state_dict):
        self.controller = state_dict["controller"]["history"]
        super().load_state_dict(
            {key: value for key, value in state_dict.items() if key != "controller"}
        )


def test_per_tensor_entries_and_extra_state_are_carried_over():
    parent = GPT(SMALL, seeded(0))
    old = WithController(parent.parameters())
    old.controller = torch.arange(5.0)
    backward(parent, batch(0))
    old.step()
    growth = grow(parent, LARGE)
    new = WithController(growth.model.parameters())
    new.controller = torch.zeros(5)
    state = growth.optimizer_state(old, new)
    assert torch.equal(state["controller"]["history"], torch.arange(5.0))
    old.controller.zero_()
    new.load_state_dict(state)
    assert torch.equal(new.controller, torch.arange(5.0))
    for entry in new.state.values():
        assert entry["calls"] == 3
        assert entry["beta_products"].tolist() == pytest.approx([0.9, 0.999], rel=1e-6)


def test_extra_state_that_only_the_new_optimizer_has_is_kept():
    parent, old = trained()
    growth = grow(parent, LARGE)
    new = WithController(growth.model.parameters())
    new.controller = torch.ones(5)
    assert torch.equal(growth.optimizer_state(old, new)["controller"]["history"], torch.ones(5))


def test_bfloat16_state_keeps_its_dtype():
    parent, old = trained(torch.bfloat16)
    growth = grow(parent, LARGE)
    new = torch.optim.AdamW(growth.model.parameters())
    state = growth.optimizer_state(old, new)["state"][0]
    moments = old.state[parent.wte.weight]["exp_avg_sq"]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
    row = int(moments.double().mean(1).argmin())  # one that the mean of the table exceeds
    assert state["exp_avg_sq"][row, -1].item() == pytest.approx(
        moments.double().mean().item(), rel=4e-3
    )


def with_master_weights() -> tuple[GPT, ARSAdamW, GPT]:
    """A bfloat16 parent with master weights, and a float32 copy of these."""
    parent = GPT(SMALL, seeded(0)).bfloat16()
    old = ARSAdamW(parent.parameters(), lr=LR, master_weights=True)
    for step in range(3):
        backward(parent, batch(step))
        old.step()
    masters = GPT(SMALL)
    with torch.no_grad():
        for weight, master in zip(parent.parameters(), masters.parameters(), strict=True):
            master.copy_(join_master(weight, old.state[weight]["param_remainder"]))
    return parent, old, masters


@pytest.mark.parametrize(
    ("config", "blocks"),
    [(LARGE, "appended"), (LARGE, "inserted"), (SMALL, "appended")],
    ids=["larger", "inserted", "as large"],
)
def test_master_weights_grow_as_the_float32_model_does(config, blocks):
    """c times the 32-bit weight, bit for bit; c times its upper half alone can be a unit off."""
    parent, old, masters = with_master_weights()
    growth = grow(parent, config, seeded(1), blocks=blocks)
    expected = grow(masters, config, seeded(1), blocks=blocks).model
    new = ARSAdamW(growth.model.parameters(), lr=LR, master_weights=True)
    left_by_grow = {name: weight.detach().clone() for name, weight in growth.initial.items()}
    for _ in range(2):  # taking the state once more changes nothing
        new.load_state_dict(growth.optimizer_state(old, new))
    moved = 0
    sources = {name: source for source, name in growth.names.items()}
    for name, weight in growth.model.named_parameters():
        wanted = expected.get_parameter(name).detach()
        if name not in sources:
            assert weight not in new.state
            continue
        remainder = new.state[weight]["param_remainder"]
        block = parent.get_parameter(sources[name])
        upper, lower = split_master(old_block(wanted, block))
        assert torch.equal(old_block(weight.detach(), block), upper)
        assert torch.equal(old_block(remainder, block), lower)
        assert torch.equal(weight.detach(), growth.initial[name])
        fresh = new_mask(weight, block)  # the numbers that grow drew, which have no lower half
        assert torch.equal(weight.detach()[fresh], left_by_grow[name][fresh])
        assert not remainder[fresh].any()
        moved += int(weight.detach().ne(left_by_grow[name]).sum())
    assert (moved > 0) == (config is LARGE)  # where c is 1 the upper halves are right already


def test_an_optimizer_without_master_weights_gets_the_nearest_bfloat16():
    parent, old, masters = with_master_weights()
    growth = grow(parent, LARGE, seeded(1))
    new = ARSAdamW(growth.model.parameters(), lr=LR)
    new.load_state_dict(growth.optimizer_state(old, new))
    name = "lm_head.weight"
    expected = grow(masters, LARGE, seeded(1)).model.get_parameter(name).detach()
    block = parent.get_parameter(name)
    weight = growth.model.get_parameter(name)
    assert torch.equal(
        old_block(weight.detach(), block), split_master(old_block(expected, block))[0]
    )
    assert "param_remainder" not in new.state[weight]


@pytest.mark.parametrize("changed", ["parent", "child", "dtype"])
def test_master_weights_of_changed_models_are_refused_before_anything_changes(changed):
    parent, old, _ = with_master_weights()
    growth = grow(parent, LARGE, seeded(1))
    model = parent if changed == "parent" else growth.model
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1.0
    if changed == "dtype":
        growth.model.float()
    before = deepcopy(growth.model.state_dict())
    new = ARSAdamW(growth.model.parameters(), lr=LR)
    with pytest.raises(ValueError, match=r"weight' of the parent or of the grown .* before that"):
        growth.optimizer_state(old, new)
    torch.testing.assert_close(growth.model.state_dict(), before, rtol=0, atol=0)


def test_rejects_unknown_matrix_state():
    parent = GPT(SMALL, seeded(0))
    old = torch.optim.RMSprop(parent.parameters())
    backward(parent, batch(0))
    old.step()
    growth = grow(parent, LARGE)
    new = torch.optim.RMSprop(growth.model.parameters())
    with pytest.raises(ValueError, match=r"'square_avg' of 'wte.weight' has shape \(29, 16\)"):
        growth.optimizer_state(old, new)


def test_rejects_state_of_another_shape():
    parent, old = trained()
    old.state[parent.wte.weight]["exp_avg"] = torch.zeros(29, 15)
    growth = grow(parent, LARGE)
    new = torch.optim.AdamW(growth.model.parameters())
    with pytest.raises(ValueError, match=r"'wte.weight' has shape \(29, 15\).*\(29, 16\)"):
        growth.optimizer_state(old, new)


def test_rejects_optimizers_of_other_models():
    parent, old = trained()
    growth = grow(parent, LARGE)
    new = torch.optim.AdamW(growth.model.parameters())
    with pytest.raises(ValueError, match="old_optimizer holds a parameter of shape"):
        growth.optimizer_state(new, new)
    with pytest.raises(ValueError, match="new_optimizer holds a parameter of shape"):
        growth.optimizer_state(old, old)
    partial = torch.optim.AdamW([growth.model.wte.weight])
    with pytest.raises(ValueError, match=r"new_optimizer does not hold 'blocks.0.attn.q.weight'"):
        growth.optimizer_state(old, partial)
