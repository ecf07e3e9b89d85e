"""States through torch's functions: what its own tests of them check, and from one kind to another.

``torch.distributed.checkpoint.state_dict`` names states by parameter, gathers and divides them.
"""

import pytest
import torch
from divided import ALARMED, PAPER, STEPS, build, divide, memory, network, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from ars import ARSAdamW
from ranks import run_ranks, whole

RANKS = 2
CONFIGS = {"alarm": ALARMED, "paper": PAPER}
WHOLE = StateDictOptions(full_state_dict=True)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
KINDS = {  # of options: to save with, and to load with
    "parts": (StateDictOptions(), StateDictOptions()),
    "whole": (WHOLE, WHOLE),
    "from one": (
        StateDictOptions(full_state_dict=True, cpu_offload=True),
        StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    ),
    "flat": (FLAT, FLAT),
}
EXCHANGED = [(kind, name) for kind in KINDS for name in ("adamw", "plain", "alarm")]
for lacking in ("adamw", "plain"):
    EXCHANGED.remove(("flat", lacking))  # what the groups of a gated optimizer hold: refused


class Tied(nn.Module):
    """Two layers of one weight, and a frozen parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)


def groups_of(model):
    """Two groups, with other rates."""
    params = list(model.parameters())
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.02, "penalty_strength": 1.0}]


MODELS = {
    "one group": (network, lambda model: list(model.parameters())),
    "two groups": (network, groups_of),
    "tied": (Tied, lambda model: [p for p in model.parameters() if p.requires_grad]),
}


def stepped(model, params, config, steps=3):
    optimizer = ARSAdamW(params, lr=0.01, ars=config, process_group=False)
    owned = nn.ParameterList([p for group in optimizer.param_groups for p in group["params"]])
    train(owned, optimizer, steps)
    return optimizer


def as_torch_verifies():
    """Compare the states of a sharded and a whole model as torch's tests do."""
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.common_utils import TestCase
    from torch.testing._internal.distributed.common_state_dict import VerifyStateDictMixin

    class Verify(VerifyStateDictMixin, TestCase):
        pass

    verify = Verify()
    for make, params_of in MODELS.values():
        for config in CONFIGS.values():
            single = make()
            model = fully_shard(make()) if make is Tied else divide(make())
            optimizer = stepped(single, params_of(single), config)
            mine = stepped(model, params_of(model), config)
            weights, state = get_state_dict(model, mine)
            verify._verify_msd(single.state_dict(), weights)
            if make is not Tied:  # it takes one name for each parameter
                verify._verify_osd(single, optimizer, optimizer.state_dict(), state)
                other = ARSAdamW(params_of(single), lr=0.5, ars=config, process_group=False)
                verify._verify_osd_by_load(single, optimizer, other, state)
            elif set(state["state"]) != {"first.weight", "first.bias"}:
                raise AssertionError(f"the tied model has states of {set(state['state'])}")
    return "verified"


def exchange():
    """Load a state of one optimizer into another, and take a step."""
    found = {}
    for kind, name in EXCHANGED:
        saving, loading = KINDS[kind]
        model, first, _ = build(CONFIGS.get(name))
        if name == "adamw":
            first = torch.optim.AdamW(model.parameters(), lr=0.01)
        train(model, first, STEPS)
        state = get_optimizer_state_dict(model, first, options=saving)
        other, second, _ = build(ALARMED if name == "alarm" else PAPER, seed=1)
        set_optimizer_state_dict(other, second, state, options=loading)
        pairs = zip(model.parameters(), other.parameters(), strict=True)
        same = all(
            torch.equal(whole(first.state[a][key]), whole(second.state[b][key]))
            for a, b in pairs
            for key in ("exp_avg", "exp_avg_sq", "step")
        )
        parts = all(isinstance(second.state[p]["exp_avg"], DTensor) for p in other.parameters())
        remembered = memory(second)
        if name == "alarm":
            same = same and all(torch.equal(v, remembered[k]) for k, v in memory(first).items())
        train(other, second, 1)
        found[kind, name] = same, parts, float(remembered["gate_state"][0])
    return found


def flat_states():
    """Exchange flat states with torch's AdamW: what is loaded there, and what is refused here."""
    model, ours, _ = build(ALARMED)
    theirs = torch.optim.AdamW(model.parameters())
    train(model, ours, STEPS)
    state = get_optimizer_state_dict(model, ours, options=FLAT)
    set_optimizer_state_dict(model, theirs, state, options=FLAT)
    counts = [float(theirs.state[p]["step"]) for p in model.parameters()]
    flat = get_optimizer_state_dict(model, theirs, options=FLAT)
    refused = []
    for config in (None, ALARMED):
        new = ARSAdamW(model.parameters(), ars=config)
        try:
            set_optimizer_state_dict(model, new, flat, options=FLAT)
        except KeyError as error:
            moved = any(float(state["step"]) for state in new.state.values())
            refused.append((str(error), moved))
    return counts, refused


def two_optimizers():
    """One call for the two optimizers of a model's halves."""
    models, results = (divide(network()), divide(network(seed=1))), []
    for model in models:
        halves = [ARSAdamW(model[i].parameters(), lr=0.01, ars=ALARMED) for i in (0, 2)]
        results.append(halves)
    for index, optimizer in zip((0, 2), results[0], strict=True):
        train(models[0][index], optimizer, STEPS - index)
    weights, state = get_state_dict(models[0], results[0])
    set_state_dict(models[1], results[1], model_state_dict=weights, optim_state_dict=state)
    return [
        all(torch.equal(value, memory(b)[key]) for key, value in memory(a).items())
        for a, b in zip(*results, strict=True)
    ]


def with_one_process():
    """Load the whole state of one process into parts, and parts into one process."""
    alone = network()
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
    return all(moments), followed


def work(rank):
    try:
        verified = as_torch_verifies()
    except ImportError as error:
        verified = f"torch's own tests cannot be had: {error}"
    return {
        "verified": verified,
        "exchange": exchange(),
        "flat": flat_states(),
        "two optimizers": two_optimizers(),
        "one process": with_one_process(),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(work, RANKS, tmp_path_factory.mktemp("exchange"))


def test_states_are_what_torchs_tests_expect(results):
    for result in results:
        if result["verified"] != "verified":
            pytest.skip(result["verified"])


@pytest.mark.parametrize("case", EXCHANGED, ids=", ".join)
def test_states_go_from_one_optimizer_to_another(results, case):
    for result in results:
        same, parts, phi = result["exchange"][case]
        assert same
        assert parts
        assert (phi < 0.5) == (case[1] == "alarm")


def test_flat_states_lack_what_torchs_groups_do_not_hold(results):
    for result in results:
        counts, refused = result["flat"]
        assert counts == [STEPS] * 4
        assert refused == [("'param_groups.0.weight.penalty_strength'", False)] * 2


def test_two_optimizers_of_one_model_keep_their_controllers(results):
    assert [result["two optimizers"] for result in results] == [[True, True]] * RANKS


def test_whole_states_and_parts_are_exchanged_with_one_process(results):
    assert [result["one process"] for result in results] == [(True, True)] * RANKS
