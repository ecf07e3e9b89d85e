"""momentum_buffer after growth: SGD, Muon, Muon beside AdamW, each also behind ARSOptimizer."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from growth_cases import (
    kinds,
    loss_of,
    new_coordinates,
    old_block,
    randomized,
    seeded,
    sizes,
    tokens_of,
)
from torch import Tensor

from ars import ARSAdamW, ARSConfig, ARSOptimizer
from ars.models import GPT, Growth, grow

SMALL, LARGE, DEEPER = sizes(2, 2), sizes(3, 3), sizes(3, 2)
LR = 1e-2
Make = Callable[[GPT], torch.optim.Optimizer]


def matrices(model: GPT) -> list[Tensor]:
    return list(model.blocks.parameters())


def others(model: GPT) -> list[Tensor]:
    return [model.wte.weight, model.lm_head.weight]


def muon(model: GPT) -> torch.optim.Optimizer:
    return torch.optim.Muon(matrices(model), lr=LR, weight_decay=0.0)


def gated_muon(model: GPT) -> torch.optim.Optimizer:
    return ARSOptimizer(muon(model), ARSConfig())


def sgd(model: GPT) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)


def nesterov(model: GPT) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, nesterov=True)


def plain(model: GPT) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR)


makes = pytest.mark.parametrize(
    "make", [muon, gated_muon, sgd, nesterov], ids=["muon", "gated muon", "sgd", "nesterov"]
)


def step(model: GPT, optimizer: torch.optim.Optimizer) -> None:
    model.zero_grad()
    loss = loss_of(model, tokens_of(SMALL))
    loss.backward()
    optimizer.step(**({"loss": loss} if isinstance(optimizer, ARSOptimizer) else {}))


def trained(make: Make, steps: int = 3) -> tuple[GPT, torch.optim.Optimizer]:
    model = randomized(SMALL)
    optimizer = make(model)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def grown(
    make: Make, blocks: str = "appended", config: Any = LARGE
) -> tuple[Growth, torch.optim.Optimizer, torch.optim.Optimizer]:
    parent, old = trained(make)
    growth = grow(parent, config, seeded(1), blocks=blocks)
    new = make(growth.model)
    new.load_state_dict(growth.optimizer_state(old, new))
    return growth, old, new


def moves(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    step(model, optimizer)
    return {name: weight.detach() - before[name] for name, weight in model.named_parameters()}


@makes
@kinds
def test_momentum_scales_by_one_over_c_and_is_0_on_new_coordinates(make, blocks):
    growth, old, new = grown(make, blocks)
    held = 0
    for name, parameter in growth.parent.named_parameters():
        if parameter not in old.state:  # the optimizer's part of the model ends here
            continue
        before = old.state[parameter]["momentum_buffer"]
        after = new.state[growth.model.get_parameter(growth.names[name])]["momentum_buffer"]
        expected = before / growth.scales[name]
        assert expected.abs().max() > 1e-5
        torch.testing.assert_close(old_block(after, before), expected, rtol=1e-12, atol=0)
        assert not new_coordinates(after, before).any()
        held += 1
    assert held == len(new.state) == (12 if make in (muon, gated_muon) else 14)


@makes
@kinds
def test_the_next_momentum_is_the_parents_over_c(make, blocks):
    """Buffer and gradient transform alike, so they do after a step, with whatever else it does."""
    growth, old, new = grown(make, blocks)
    step(growth.parent, old)
    step(growth.model, new)
    for name, parameter in growth.parent.named_parameters():
        if parameter in old.state:
            before = old.state[parameter]["momentum_buffer"]
            after = new.state[growth.model.get_parameter(growth.names[name])]["momentum_buffer"]
            expected = before / growth.scales[name]
            torch.testing.assert_close(old_block(after, before), expected, rtol=0, atol=1e-12)
    assert len(new.state) == sum(len(group["params"]) for group in new.param_groups)


@pytest.mark.parametrize("make", [sgd, nesterov])
@kinds
def test_a_step_of_sgd_moves_an_old_block_one_over_c_times_as_far(make, blocks):
    growth, old, new = grown(make, blocks)
    before, after = moves(growth.parent, old), moves(growth.model, new)
    for name, moved in before.items():
        expected = moved / growth.scales[name]
        assert expected.abs().max() > 1e-5
        block = old_block(after[growth.names[name]], moved)
        torch.testing.assert_close(block, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [muon, gated_muon])
@pytest.mark.parametrize("config", [DEEPER, LARGE], ids=["deeper", "wider"])
@kinds
def test_a_step_of_muon_moves_an_old_block_as_far_as_in_the_parent(make, config, blocks):
    """It divides by the norm, so c cancels.

    In a wider model that is so where the new coordinates have no gradient yet: orthogonalizing
    [[M, 0], [0, 0]] is orthogonalizing M. New writes have one at once, and share the norm with it.
    """
    growth, old, new = grown(make, blocks, config)
    before, after = moves(growth.parent, old), moves(growth.model, new)
    for parameter in matrices(growth.parent):
        (name,) = (n for n, w in growth.parent.named_parameters() if w is parameter)
        if config is LARGE and name.endswith("proj.weight"):
            continue
        moved, block = before[name], old_block(after[growth.names[name]], before[name])
        assert moved.norm() > 0.5 * LR
        # The iterations are in bfloat16, whose products are rounded in another order.
        torch.testing.assert_close(block, moved, rtol=0, atol=0.02 * moved.abs().max().item())


def test_without_momentum_there_is_nothing_to_map():
    growth, _, new = grown(plain)
    assert not any(value is not None for state in new.state.values() for value in state.values())
    found = moves(growth.model, new)
    assert all(found[name].any() for name in growth.names.values())


@kinds
def test_muon_and_adamw_of_one_model_are_mapped_each_by_itself(blocks):
    """As the trainer splits a model: Muon for the blocks, AdamW for the embedding and the head."""
    parent = randomized(SMALL)
    old = [gated_muon(parent), ARSAdamW(others(parent), lr=LR, ars=ARSConfig())]

    def step_both(model, optimizers):
        model.zero_grad()
        loss = loss_of(model, tokens_of(SMALL))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step(loss=loss)
        return loss.item()

    for _ in range(3):
        step_both(parent, old)
    growth = grow(parent, LARGE, seeded(1), blocks=blocks)
    model = growth.model
    new = [gated_muon(model), ARSAdamW(others(model), lr=LR, ars=ARSConfig())]
    before = deepcopy([optimizer.state_dict()["state"] for optimizer in old])
    for mine, parents in zip(new, old, strict=True):
        mine.load_state_dict(growth.optimizer_state(parents, mine))
    after = [optimizer.state_dict()["state"] for optimizer in old]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert set(new[0].state) == {model.get_parameter(growth.names[name]) for name in growth.names
                                 if name.startswith("blocks.")}  # fmt: skip
    assert set(new[1].state) == set(others(model))
    for mine, parents in zip(new, old, strict=True):  # what the controllers have seen, too
        seen = parents.controller.state_dict()
        assert seen["counts"].any()
        torch.testing.assert_close(mine.controller.state_dict(), seen, rtol=0, atol=0)
    losses = [step_both(model, new) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert set(new[0].state) == set(matrices(model))


def test_an_optimizer_of_another_part_is_refused():
    parent, old = trained(muon)
    growth = grow(parent, LARGE, seeded(1), blocks="inserted")
    new = torch.optim.AdamW(others(growth.model))
    with pytest.raises(ValueError, match=r"new_optimizer does not hold 'blocks.0.attn.q.weight'"):
        growth.optimizer_state(old, new)
    partly = torch.optim.Muon(list(growth.model.blocks[:2].parameters()))
    with pytest.raises(ValueError, match=r"new_optimizer does not hold 'blocks.2.attn.q.weight'"):
        growth.optimizer_state(old, partly)


def test_momentum_keeps_its_dtype():
    parent = randomized(SMALL, torch.bfloat16)
    old = muon(parent)
    step(parent, old)
    growth = grow(parent, LARGE, seeded(1))
    new = muon(growth.model)
    new.load_state_dict(growth.optimizer_state(old, new))
    assert {state["momentum_buffer"].dtype for state in new.state.values()} == {torch.bfloat16}
    step(growth.model, new)
