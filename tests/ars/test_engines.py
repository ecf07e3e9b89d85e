"""Optimizers under torch's engines of data parallelism: fully_shard, FSDP1 and ZeRO.

Their weights and gates are those of one process whose loss is the mean of all.
"""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ars import ARSAdamW, ARSConfig, ARSOptimizer
from ars.regularizers import EWC
from ranks import run_ranks, whole

RANKS = 2
STEPS = 5
PAPER = ARSConfig.paper(window=3)
GATES = {gate: ARSConfig.paper(window=3, gate=(gate,)) for gate in ("lr", "betas", "grad")}
RATE = GATES["lr"]  # its state is that of AdamW, all that FSDP1 knows how to gather
WRAPPED = [(gate, group, watched) for gate in GATES for group in (None, False)
           for watched in ("loss", "norm")]  # fmt: skip
FSDP1 = {"FSDP1": False, "FSDP1, original parameters": True}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 1))


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.05)


def train(model, optimizer, *, rank=0.5, loss=True, clip=None, first=0):
    """Take steps on the data of all ranks, on losses that differ; 0.5 is the mean of their ranks.

    Returns:
        The Phi of each step.
    """
    data = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    phis = []
    for step in range(first, first + STEPS):
        value = (model(data) - 0.3 * step).square().mean()
        value.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step(**{"loss": value.detach() * (1 + step + rank)} if loss else {})
        optimizer.zero_grad()
        inner = getattr(optimizer, "optim", optimizer)
        phis.append(float(inner.diagnostics["phi"]))
    return phis


def wrapped(rank, case):
    """Step torch's AdamW inside an ARSOptimizer, on shards."""
    gate, group, watched = case
    model = network() if rank is None else fully_shard(network())
    optimizer = ARSOptimizer(adamw(model), GATES[gate], process_group=group)
    phis = train(model, optimizer, rank=0.5 if rank is None else rank, loss=watched == "loss")
    return phis, [whole(p) for p in model.parameters()]


def wrapper_state(rank):
    """Say whether torch's functions keep the controller of an ARSOptimizer."""
    model, other = fully_shard(network()), fully_shard(network())
    first, second = (ARSOptimizer(adamw(m), PAPER) for m in (model, other))
    train(model, first, rank=rank)
    weights, state = get_state_dict(model, first)
    set_state_dict(other, second, model_state_dict=weights, optim_state_dict=state)
    pairs = zip(*(o.controller.state_dict().values() for o in (first, second)), strict=True)
    found = [all(torch.equal(*pair) for pair in pairs)]
    found.append(all("controller" not in group for group in second.param_groups))
    later = [train(m, o, rank=rank, first=5) for m, o in ((model, first), (other, second))]
    return [*found, later[0] == pytest.approx(later[1], rel=1e-6)]


def clipped(rank):
    """Clip by torch's function before the step, or in the step."""
    found = []
    for outside in (True, False):
        model = fully_shard(network())
        optimizer = ARSAdamW(model.parameters(), lr=0.05, max_grad_norm=None if outside else 0.1)
        train(model, optimizer, rank=rank, clip=0.1 if outside else None)
        found.append([whole(p) for p in model.parameters()])
    return found


def refusal(call):
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


def refusals(build):
    """Return what is said of steps that would need more than a share."""
    found = {}
    for name, settings, loss in (
        ("norm", {}, False),
        ("clipping", {"max_grad_norm": 1.0}, True),
        ("alone", {}, True),
    ):
        model, optimizer = build(**settings)
        if name == "alone":
            getattr(optimizer, "optim", optimizer).process_group = False
        before = [p.detach().clone() for p in model.parameters()]
        found[name] = refusal(lambda m=model, o=optimizer, loss=loss: train(m, o, loss=loss))
        if not all(map(torch.equal, before, model.parameters())):
            raise AssertionError(f"{name} has moved something")
    return found


def fsdp1(rank, original):
    def build(**settings):
        model = FullyShardedDataParallel(
            network(), device_id=torch.device("cpu"), use_orig_params=original
        )
        return model, ARSAdamW(model.parameters(), lr=0.05, **{"ars": RATE, **settings})

    model, optimizer = build()
    phis = train(model, optimizer, rank=rank)
    with FullyShardedDataParallel.summon_full_params(model):
        weights = [p.detach().clone().flatten() for p in model.parameters()]
    weights_here, state = get_state_dict(model, optimizer)
    other, second = build()
    set_state_dict(other, second, model_state_dict=weights_here, optim_state_dict=state)
    again = [train(m, o, rank=rank, first=5) for m, o in ((model, optimizer), (other, second))]
    said = refusals(build)
    model, optimizer = build(ars=None)
    names = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    optimizer.penalty = EWC(model, names)
    said["penalty"] = refusal(lambda: train(model, optimizer))
    return phis, torch.cat(weights), again[0] == again[1], said


def zero(rank):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # its import warns

    def build(**settings):
        model = DistributedDataParallel(network())
        given = {"lr": 0.05, "ars": RATE, **settings}
        return model, ZeroRedundancyOptimizer(model.parameters(), ARSAdamW, **given)

    model, optimizer = build()
    phis = train(model, optimizer, rank=rank)
    return phis, torch.cat([p.detach().flatten() for p in model.parameters()]), refusals(build)


def work(rank):
    results = {case: wrapped(rank, case) for case in WRAPPED}
    results |= {name: fsdp1(rank, original) for name, original in FSDP1.items()}
    results |= {
        "state": wrapper_state(rank),
        "clipped": clipped(rank),
        "zero": zero(rank),
    }
    distributed.barrier()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(work, RANKS, tmp_path_factory.mktemp("engines"))


@pytest.mark.parametrize("case", WRAPPED, ids=str)
def test_a_wrapped_optimizer_of_shards_is_that_of_the_whole(results, case):
    phis, weights = wrapped(None, case)
    assert min(phis) < 0.99
    for result in results:
        found, mine = result[case]
        assert found == results[0][case][0] == pytest.approx(phis, rel=1e-5)
        for a, b in zip(mine, weights, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_torchs_functions_keep_the_controller_of_a_wrapped_optimizer(results):
    assert [result["state"] for result in results] == [[True, True, True]] * RANKS


def test_clipping_before_the_step_and_in_it(results):
    for result in results:
        for mine, theirs in zip(*result["clipped"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def of_one_process():
    model = network()
    optimizer = ARSAdamW(model.parameters(), lr=0.05, ars=RATE)
    return train(model, optimizer), torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", [*FSDP1, "zero"])
def test_older_engines_gate_by_the_mean_loss_and_refuse_what_a_share_cannot_have(results, name):
    phis, weights = of_one_process()
    for result in results:
        found, mine, *others, said = result[name]
        assert found == results[0][name][0] == pytest.approx(phis, rel=1e-5)
        torch.testing.assert_close(mine, weights, rtol=1e-5, atol=1e-6)
        assert all(others)
        for case, message in said.items():
            assert "this optimizer holds a share of the parameters" in message, case
        assert "norm of the gradients: pass step(loss=loss)" in said["norm"]
        assert "norm of the gradients" in said["clipping"]
        assert "leave process_group None" in said["alone"]
