"""torch.distributed.checkpoint: saved by two processes, loaded by one, two, three and four."""

import functools
import threading

import pytest
import torch
from divided import (
    ALARMED,
    PAPER,
    STEPS,
    build,
    divide,
    memory,
    network,
    set_states,
    states_of,
    summary,
    train,
)  # fmt: skip
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

from ars import ARSAdamW
from ars.regularizers import EWC, KroneckerPenalty, SubspacePenalty
from ranks import placed, run_worlds, whole

CONFIGS = {"alarm": ALARMED, "paper": PAPER, "flat": ALARMED}
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
MORE = 6
PENALTIES = ("compact", "kronecker", "subspace")


class SlowWriter(checkpoint.FileSystemWriter):
    """Writes nothing before it is told to."""

    def __init__(self, path):
        super().__init__(path)
        self.may_write = threading.Event()

    def write_data(self, plan, planner):
        assert self.may_write.wait(60)
        return super().write_data(plan, planner)


def options_of(name):
    return FLAT if name.startswith("flat") else StateDictOptions()


def save(folder):
    """Return the run that a loaded one must equal: what it was when saved, and how it went on."""
    found = {}
    alone = distributed.new_group(backend="gloo")  # messages of the writer's, between the steps'
    for name, config in CONFIGS.items():
        model, optimizer, penalty = build(config)
        phis = train(model, optimizer, STEPS)
        states = states_of(model, optimizer, penalty, options_of(name))
        if name == "paper":
            writer = SlowWriter(f"{folder}/{name}")
            future = checkpoint.async_save(states, storage_writer=writer, process_group=alone)
        else:
            checkpoint.save(states, checkpoint_id=f"{folder}/{name}")
        remembered = memory(optimizer)
        phis += train(model, optimizer, MORE, STEPS)
        if name == "paper":
            penalty.consolidate({n: torch.ones(p.shape) for n, p in model.named_parameters()})
            writer.may_write.set()
            future.result()
        found[name] = summary(model, optimizer), phis, remembered
    return found


def save_others(folder):
    """Save states of torch's AdamW and of ARSAdamW without a controller, nested and flat."""
    model, _, penalty = build(None)
    theirs = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, theirs, 3)
    plain = ARSAdamW(model.parameters(), lr=0.01, ars=None)
    plain.load_state_dict(theirs.state_dict())
    for name, optimizer in {"adamw": theirs, "plain": plain, "flat adamw": theirs}.items():
        states = states_of(model, optimizer, penalty, options_of(name))
        checkpoint.save(states, checkpoint_id=f"{folder}/{name}")


def load(folder):
    found = {}
    for name, config in CONFIGS.items():
        model, optimizer, penalty = build(config, seed=1)
        before = [whole(p) for p in model.parameters()]
        states = states_of(model, optimizer, penalty, options_of(name))
        unmoved = all(map(torch.equal, map(whole, model.parameters()), before))
        checkpoint.load(states, checkpoint_id=f"{folder}/{name}")
        set_states(model, optimizer, penalty, states, options_of(name))
        remembered = memory(optimizer)
        phis = train(model, optimizer, MORE, STEPS)
        found[name] = summary(model, optimizer), phis, remembered, unmoved
    return found


def load_others(folder):
    """Load what lacks a controller, as far as it goes; and say what is refused."""
    found = {}
    for name in ("adamw", "plain", "flat adamw"):
        model, optimizer, penalty = build(PAPER, seed=1)
        states = states_of(model, optimizer, penalty)
        partly = DefaultLoadPlanner(allow_partial_load=True)
        checkpoint.load(states, checkpoint_id=f"{folder}/{name}", planner=partly)
        set_states(model, optimizer, penalty, states)
        steps = [float(optimizer.state[p]["step"]) for p in model.parameters()]
        train(model, optimizer, 1)
        products = [optimizer.state[p]["beta_products"].tolist() for p in model.parameters()]
        found[name] = steps, products, optimizer.controller.counts.tolist()
    try:
        checkpoint.load(states_of(model, optimizer, penalty), checkpoint_id=f"{folder}/adamw")
    except checkpoint.CheckpointException as error:
        found["refused"] = str(error)
    return found


def load_into_torchs(folder):
    """Return the step counts of torch's AdamW that has loaded a state of ARSAdamW."""
    counts = []
    for name in ("alarm", "flat"):
        model, _, penalty = build(None, seed=1)
        theirs = torch.optim.AdamW(model.parameters())
        states = states_of(model, theirs, penalty, options_of(name))
        checkpoint.load(states, checkpoint_id=f"{folder}/{name}")
        set_state_dict(
            model,
            theirs,
            model_state_dict=states["model"],
            optim_state_dict=states["optimizer"],
            options=options_of(name),
        )
        train(model, theirs, 1)
        counts += [float(theirs.state[p]["step"]) for p in model.parameters()]
    return counts


def penalty_of(kind, model, *, other):
    """Return a penalty; the other one has other numbers everywhere."""
    scale = 3.0 if other else 1.25
    if kind == "compact":
        importance = {n: torch.full(p.shape, scale) for n, p in model.named_parameters()}
        return EWC(model, importance, scale, storage="compact")
    if kind == "kronecker":
        return KroneckerPenalty(model, {"0.weight": (scale * torch.eye(5), torch.eye(7))}, scale)
    basis = torch.eye(4)[:, 2:] if other else torch.eye(4)[:, :2]
    return SubspacePenalty(model, {"0.weight": basis}, scale)


def penalties(folder, *, saves):
    """Return the values of penalties away from their anchors, as they were saved or loaded."""
    values = []
    for kind in PENALTIES:
        model = divide(network(seed=0 if saves else 1))
        penalty = penalty_of(kind, model, other=not saves)
        states = {"penalty": penalty.state_dict()}
        if saves:
            checkpoint.save(states, checkpoint_id=f"{folder}/{kind}")
        else:
            checkpoint.load(states, checkpoint_id=f"{folder}/{kind}")
            penalty.load_state_dict(states["penalty"])
        with torch.no_grad():
            for param, target in zip(model.parameters(), network(seed=2).parameters(), strict=True):
                param.copy_(*placed([target], param.device_mesh, [param.placements]))
        values.append(float(penalty.value().detach()))
    return values


def load_all(rank, folder):
    return (
        load(folder),
        load_others(folder),
        load_into_torchs(folder),
        penalties(folder, saves=False),
    )


def save_all(rank, folder):
    saved = save(folder), penalties(folder, saves=True)
    save_others(folder)
    return saved, load_all(rank, folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The saved runs, and what each number of processes has loaded."""
    folder = tmp_path_factory.mktemp("checkpoints")
    works = {2: save_all, 1: load_all, 3: load_all, 4: load_all}
    calls = [(n, functools.partial(work, folder=str(folder))) for n, work in works.items()]
    loaded = dict(zip(works, run_worlds(calls, folder), strict=True))
    saved = [first for first, _ in loaded[2]]
    loaded[2] = [second for _, second in loaded[2]]
    return saved, loaded


worlds = pytest.mark.parametrize("world", [1, 2, 3, 4])


@worlds
@pytest.mark.parametrize("name", CONFIGS)
def test_training_goes_on_with_other_processes(runs, name, world):
    saved, loaded = runs
    tensors, phis, remembered = saved[0][0][name]
    for result in loaded[world]:
        found, later, window, unmoved = result[0][name]
        assert unmoved
        for key, value in remembered.items():
            assert torch.equal(window[key], value), key
        assert later == pytest.approx(phis[STEPS:], rel=1e-6)
        for mine, theirs in zip(found, tensors, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    if CONFIGS[name] is ALARMED:
        assert phis[STEPS] < 0.5


@worlds
def test_states_without_a_controller_load(runs, world):
    for _, result, _, _ in runs[1][world]:
        for name in ("adamw", "plain", "flat adamw"):
            steps, products, counts = result[name]
            assert steps == [3.0] * 4
            assert counts == [1, 1]
            # Three steps without a gate, and one with it.
            for first, second in products:
                assert 0.9**3 * 0.09 * 0.999 < first <= 0.9**4 + 1e-12
                assert 0 < second < 1
        assert "Missing key in checkpoint state_dict: optimizer." in result["refused"]


@worlds
def test_states_of_ours_load_into_torchs(runs, world):
    for _, _, counts, _ in runs[1][world]:
        assert counts == [STEPS + 1.0] * 8


@worlds
def test_penalties_are_divided_anew(runs, world):
    saved, loaded = runs
    for result in loaded[world]:
        assert min(result[3]) > 0.01
        assert result[3] == pytest.approx(saved[0][1], rel=1e-5)
