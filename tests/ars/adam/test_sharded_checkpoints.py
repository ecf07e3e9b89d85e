"""torch.distributed.checkpoint: saved by two processes, loaded by one, two and three."""

import functools

import pytest
import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ars import ARSAdamW, ARSConfig
from ars.regularizers import EWC
from ranks import placed, run_ranks, whole

# Saved just after an alarm: Phi is far below 1 for some steps more.
ALARMED = ARSConfig(window=12, threshold=6.0, first_release=3, release=9)
CONFIGS = {"alarm": ALARMED, "paper": ARSConfig.paper(window=5)}
STEPS, MORE = 16, 6


def build(config, storage="full", seed=0, **settings):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 1))
    fully_shard(model[0], mesh=(mesh := init_device_mesh("cpu", (distributed.get_world_size(),))))
    fully_shard(model, mesh=mesh)
    importance = {name: torch.ones(p.shape) for name, p in model.named_parameters()}
    penalty = EWC(model, importance, strength=0.1, storage=storage)
    optimizer = ARSAdamW(model.parameters(), lr=0.01, ars=config, penalty=penalty, **settings)
    return model, optimizer, penalty


def train(model, optimizer, steps, first=0):
    """Take steps on gradients that are the same for any number of processes."""
    phis = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            gradient = torch.randn(param.shape, generator=generator)
            how = param.placements if isinstance(param, DTensor) else None
            mesh = None if how is None else param.device_mesh
            (param.grad,) = placed([gradient], mesh, [how])
        noise = 0.1 * torch.rand((), generator=generator) + 2.0 * (step == STEPS - 1)
        given = {"loss": 3.0 + noise} if isinstance(optimizer, ARSAdamW) else {}
        optimizer.step(**given)
        optimizer.zero_grad()
        if given:
            phis.append(float(optimizer.diagnostics["phi"]))
    return phis


def summary(model, optimizer, phis):
    states = [optimizer.state[p] for p in model.parameters()]
    tensors = [whole(p) for p in model.parameters()]
    return tensors + [whole(s[k]) for s in states for k in sorted(s)], phis


def states_of(model, optimizer, penalty):
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state, "penalty": penalty.state_dict()}


def save(rank, folder):
    found = {}
    for name, config in CONFIGS.items():
        model, optimizer, penalty = build(config)
        phis = train(model, optimizer, STEPS)
        checkpoint.save(states_of(model, optimizer, penalty), checkpoint_id=f"{folder}/{name}")
        phis += train(model, optimizer, MORE, STEPS)
        found[name] = summary(model, optimizer, phis)
    model, _, penalty = build(None)
    theirs = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, theirs, 3)
    checkpoint.save(states_of(model, theirs, penalty), checkpoint_id=f"{folder}/adamw")
    plain = ARSAdamW(model.parameters(), lr=0.01, ars=None)
    plain.load_state_dict(theirs.state_dict())
    checkpoint.save(states_of(model, plain, penalty), checkpoint_id=f"{folder}/plain")
    return found


def load(rank, folder):
    found = {}
    for name, config in CONFIGS.items():
        model, optimizer, penalty = build(config, seed=1)
        before = [whole(p) for p in model.parameters()]
        states = states_of(model, optimizer, penalty)
        unmoved = all(map(torch.equal, map(whole, model.parameters()), before))
        checkpoint.load(states, checkpoint_id=f"{folder}/{name}")
        set_state_dict(
            model,
            optimizer,
            model_state_dict=states["model"],
            optim_state_dict=states["optimizer"],
        )
        penalty.load_state_dict(states["penalty"])
        window = optimizer.controller.window.tolist()
        phis = train(model, optimizer, MORE, STEPS)
        found[name] = (*summary(model, optimizer, phis), unmoved, window)
    for name in ("adamw", "plain"):
        model, optimizer, penalty = build(CONFIGS["paper"], seed=1)
        states = states_of(model, optimizer, penalty)
        checkpoint.load(
            states,
            checkpoint_id=f"{folder}/{name}",
            planner=DefaultLoadPlanner(allow_partial_load=True),
        )
        set_state_dict(
            model,
            optimizer,
            model_state_dict=states["model"],
            optim_state_dict=states["optimizer"],
        )
        steps = [float(optimizer.state[p]["step"]) for p in model.parameters()]
        train(model, optimizer, 1)
        products = [optimizer.state[p]["beta_products"].tolist() for p in model.parameters()]
        found[name] = steps, products, optimizer.controller.counts.tolist()
    return found


def exchange(rank):
    """States go from one optimizer to another by torch's functions alone, whole ones too."""
    found = {}
    for kind, options in {
        "parts": StateDictOptions(),
        "whole": StateDictOptions(full_state_dict=True),
        "from one": StateDictOptions(full_state_dict=True, cpu_offload=True),
    }.items():
        one = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        loading = one if kind == "from one" else options
        for name in ("adamw", "plain", "alarm"):
            model, first, _ = build(CONFIGS.get(name))
            if name == "adamw":
                first = torch.optim.AdamW(model.parameters(), lr=0.01)
            train(model, first, STEPS)
            state = get_optimizer_state_dict(model, first, options=options)
            other, second, _ = build(ALARMED if name == "alarm" else CONFIGS["paper"], seed=1)
            set_optimizer_state_dict(other, second, state, options=loading)
            pairs = zip(model.parameters(), other.parameters(), strict=True)
            same = all(
                torch.equal(whole(first.state[a][key]), whole(second.state[b][key]))
                for a, b in pairs
                for key in ("exp_avg", "exp_avg_sq", "step")
            )
            parts = all(isinstance(second.state[p]["exp_avg"], DTensor) for p in other.parameters())
            phi = float(second.controller.gate_state[0])
            train(other, second, 1)
            found[kind, name] = same, parts, phi
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    model, first, _ = build(ALARMED)
    train(model, first, STEPS)
    state = get_optimizer_state_dict(model, first, options=flat)
    other, second, _ = build(CONFIGS["paper"], seed=1)
    set_optimizer_state_dict(other, second, state, options=flat)
    train(other, second, 1)
    found["flat"] = [float(second.state[p]["step"]) for p in other.parameters()]
    # The whole state of one process, and parts into one process without DTensors.
    alone = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 1))
    single = ARSAdamW(alone.parameters(), ars=ALARMED, process_group=False)
    train(alone, single, 2)
    model, divided, _ = build(ALARMED)
    divided.load_state_dict(single.state_dict())
    back = ARSAdamW(alone.parameters(), ars=ALARMED, process_group=False)
    back.load_state_dict(divided.state_dict())
    followed = all(isinstance(divided.state[p]["exp_avg"], DTensor) for p in model.parameters())
    moments = [
        torch.equal(single.state[p]["exp_avg"], back.state[p]["exp_avg"])
        for p in alone.parameters()
    ]
    found["one process"] = all(moments), followed
    return found


def compact(rank, folder):
    """The importances of a compact penalty are those that were saved, however it is divided."""
    model, _, penalty = build(None, "compact")
    states = {"penalty": penalty.state_dict()}
    if distributed.get_world_size() == 2:
        importance = {n: torch.full(p.shape, 0.25) for n, p in model.named_parameters()}
        penalty.consolidate(importance)
        checkpoint.save({"penalty": penalty.state_dict()}, checkpoint_id=f"{folder}/compact")
    else:
        checkpoint.load(states, checkpoint_id=f"{folder}/compact")
        penalty.load_state_dict(states["penalty"])
    return [whole(omega) for omega in penalty.importance.values()]


def save_all(rank, folder):
    return save(rank, folder), exchange(rank), compact(rank, folder)


def load_all(rank, folder):
    return load(rank, folder), compact(rank, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def saved(folder):
    (folder / "2").mkdir()
    return run_ranks(functools.partial(save_all, folder=str(folder)), 2, folder / "2")


@pytest.fixture(scope="module", params=[1, 2, 3])
def loaded(request, folder, saved):
    where = folder / f"loaded by {request.param}"
    where.mkdir()
    return run_ranks(functools.partial(load_all, folder=str(folder)), request.param, where)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_goes_on_with_other_processes(saved, loaded, name):
    tensors, phis = saved[0][0][name]
    for result, _ in loaded:
        found, later, unmoved, window = result[name]
        assert unmoved
        assert max(window) > 0
        assert later == pytest.approx(phis[STEPS:], rel=1e-6)
        for mine, theirs in zip(found, tensors, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    if name == "alarm":
        assert phis[STEPS] < 0.5


def test_states_without_a_controller_load(loaded):
    for result, _ in loaded:
        for name in ("adamw", "plain"):
            steps, products, counts = result[name]
            assert steps == [3.0] * 4
            assert counts == [1, 1]
            # Three steps without a gate, and one with it.
            for first, second in products:
                assert 0.9**3 * 0.09 * 0.999 < first <= 0.9**4 + 1e-12
                assert 0 < second < 1


def test_a_compact_penalty_is_divided_anew(saved, loaded):
    for result in (*(r[2] for r in saved), *(r[1] for r in loaded)):
        for omega in result:
            torch.testing.assert_close(omega, torch.full(omega.shape, 1.25), rtol=0.01, atol=0.01)


def test_states_go_both_ways(saved):
    for _, found, _ in saved:
        for kind in ("parts", "whole", "from one"):
            for name in ("adamw", "plain", "alarm"):
                same, parts, phi = found[kind, name]
                assert same
                assert parts
                assert (phi < 0.5) == (name == "alarm")
        assert found["flat"] == [STEPS + 1.0] * 4
        assert found["one process"] == (True, True)
