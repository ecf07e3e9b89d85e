"""A model that two processes have trained and saved grows in one or in three, as in one process."""

import functools

import pytest
import torch
from growth_cases import randomized, seeded
from test_sharded_growth import (
    LARGE,
    SETTINGS,
    SMALL,
    distribute,
    shard,
    states,
    train,
    trained,
)  # fmt: skip
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ars import ARSAdamW
from ars.models import grow
from ars.regularizers import EWC
from ranks import run_worlds, whole

WORLDS = (1, 3)


def importances(model):
    return {name: whole(p).square() for name, p in model.named_parameters()}


def parent(*, divided):
    """A trained parent with an EWC of its own; divided, of the same numbers as in one process."""
    model = randomized(SMALL)
    optimizer = trained(model)
    if not divided:
        return model, optimizer, EWC(model, importances(model))
    parts = shard(randomized(SMALL))
    for part, weight in zip(parts.parameters(), model.parameters(), strict=True):
        distribute(weight, part)
    mine = ARSAdamW(parts.parameters(), **SETTINGS)
    mine.load_state_dict(optimizer.state_dict())
    return parts, mine, EWC(parts, importances(model))


def states_of(model, optimizer, penalty):
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state, "penalty": penalty.state_dict()}


def grown(model, optimizer, penalty, how):
    """Grow everything there is, and train on."""
    growth = grow(model, LARGE, seeded(7), blocks="inserted", shard=how)
    ewc = EWC(growth.model, growth.importance(penalty.importance), strength=10.0)
    after = ARSAdamW(growth.model.parameters(), **SETTINGS, penalty=ewc)
    after.load_state_dict(growth.optimizer_state(optimizer, after))
    found = {
        **dict(growth.model.named_parameters()),
        **states(after, growth.model),
        **{f"{name} importance": value for name, value in ewc.importance.items()},
        **{f"the controller's {k}": v for k, v in after.controller.state_dict().items()},
    }
    found = {name: whole(value).clone() for name, value in found.items()}
    train(growth.model, after, 3)
    return found, {name: whole(p) for name, p in growth.model.named_parameters()}


def save(rank, folder):
    checkpoint.save(states_of(*parent(divided=True)), checkpoint_id=folder)


def load_and_grow(rank, folder):
    model = shard(randomized(SMALL, seed=3))
    optimizer = ARSAdamW(model.parameters(), **SETTINGS)
    penalty = EWC(model, {n: torch.ones(p.shape) for n, p in model.named_parameters()})
    content = states_of(model, optimizer, penalty)
    checkpoint.load(content, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=content["model"],
        optim_state_dict=content["optimizer"],
    )
    penalty.load_state_dict(content["penalty"])
    return grown(model, optimizer, penalty, shard)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("growth")
    call = functools.partial(load_and_grow, folder=str(folder / "saved"))
    works = [(2, functools.partial(save, folder=str(folder / "saved")))]
    _, *loaded = run_worlds([*works, *((world, call) for world in WORLDS)], folder)
    return dict(zip(WORLDS, loaded, strict=True))


@pytest.fixture(scope="module")
def expected():
    return grown(*parent(divided=False), None)


@pytest.mark.parametrize("world", WORLDS)
def test_what_two_have_saved_grows_as_in_one_process(results, expected, world):
    begun, trained_on = expected
    for found, weights in results[world]:
        assert found.keys() == begun.keys()
        for name, value in begun.items():
            assert torch.equal(found[name], value), name
        for name, value in trained_on.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-9, msg=name)
