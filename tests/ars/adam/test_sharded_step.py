"""Steps on the parts of DTensors: those of one process on the whole, and one decision for all."""

import copy

import pytest
import torch
from optimizers import IMPLEMENTATIONS, Pull, gradients, make, parameters
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from ars import ARSAdamW, ARSConfig, GradientRelease
from ranks import placed, run_ranks, whole

RANKS = 2
STEPS = 4
PAPER = ARSConfig.paper(window=3)
# Uneven, empty on a rank, empty on all, columns, repeated, and one that is no DTensor.
SHAPES = ((3,), (1, 4), (17, 5), (0,), (5, 3), (), (7,), (4, 6))
PLACEMENTS = (
    *([Shard(0)], [Shard(0)], [Shard(0)], [Shard(0)], [Shard(1)], [Replicate()], [Replicate()]),
    None,
)
SETTINGS = {
    "norm": {},
    "loss": {"watched": "loss"},
    "plain": {"ars": None},
    "clipped": {"max_grad_norm": 0.7, "ars": None},
    "paper": {"max_grad_norm": 0.7, "ars": PAPER, "amsgrad": True},
    "coupled": {"max_grad_norm": 0.7, "mode": "coupled"},
    "proximal": {"mode": "proximal"},
    "unused": {"mode": "coupled", "unused": (0, 5)},
    "unused, proximal": {"mode": "proximal", "unused": (0, 5, 7)},
    "scaled": {"max_grad_norm": 0.7, "scale": 4.0, "mode": "coupled"},
}
CASES = [(name, how) for name in SETTINGS for how in IMPLEMENTATIONS] + [
    (name, "fused") for name in ("bfloat16", "float64", "mixed")
]
DTYPES = {
    "bfloat16": [torch.bfloat16] * len(SHAPES),
    "float64": [torch.float64] * len(SHAPES),
    "mixed": [torch.float32, torch.float64, torch.bfloat16, torch.float32] * 2,
}


def loss_of(step, rank):
    return torch.tensor(3.0 + 0.5 * step + rank)


def train(case, place=lambda tensors: tensors, losses=None):
    """Return parameters, moments and diagnostics of a few steps; ``losses`` are of all ranks."""
    name, how = case
    settings = {"mode": None, "watched": None, "unused": (), "scale": None}
    settings |= SETTINGS.get(name, {"max_grad_norm": 0.7, "mode": "coupled"})
    mode, watched, unused, scale = (settings.pop(k) for k in ("mode", "watched", "unused", "scale"))
    dtypes = DTYPES.get(name, [torch.float32] * len(SHAPES))
    start = [p.detach().to(d) for p, d in zip(parameters(shapes=SHAPES), dtypes, strict=True)]
    params = [torch.nn.Parameter(p) for p in place(start)]
    penalty = None
    if mode is not None:  # in whole tensors
        penalty = Pull(start, strength=5.0, mode=mode)
        rows = zip(params, penalty.rows, strict=True)
        penalty.rows = [(param, *row[1:]) for param, row in rows]
    optimizer = make(how, params, lr=0.05, penalty=penalty, **settings)
    trace = []
    for step in range(STEPS):
        gradients(start, step)
        for index, (param, grad) in enumerate(
            zip(params, place([p.grad for p in start]), strict=True)
        ):
            param.grad = None if step and index in unused else grad.clone()
        if scale is not None:
            optimizer.grad_scale = torch.tensor([scale])
            optimizer.found_inf = torch.tensor([float(step == 2)])
        optimizer.step(**{"loss": losses(step)} if watched else {})
        trace.append({key: float(value) for key, value in optimizer.diagnostics.items()})
    states = [optimizer.state[param] for param in params]
    moments = [whole(s[k]) for s in states for k in ("exp_avg", "exp_avg_sq", "step") if k in s]
    return [whole(param) for param in params] + moments, trace


class NoDTensor(TorchDispatchMode):
    """Counts the operations on DTensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += any(issubclass(kind, DTensor) for kind in types)
        return func(*args, **kwargs or {})


def operations(mesh):
    """Return what one step does with DTensors, and how many numbers it sends."""
    params = [torch.nn.Parameter(p) for p in placed(parameters(shapes=SHAPES), mesh, PLACEMENTS)]
    optimizer = ARSAdamW(params, max_grad_norm=1.0)
    sent, real = [], distributed.all_reduce

    def counting(tensor, *args, **kwargs):
        sent.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        sent.clear()
        distributed.all_reduce = counting
        try:
            with NoDTensor() as mode:
                optimizer.step(loss=1.0)
        finally:
            distributed.all_reduce = real
    return mode.count, sent, optimizer._implementation


def fully_sharded(rank):
    """Train a model under FSDP2 on data of the rank's own; return what all ranks must share."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1))
    models = [model, copy.deepcopy(model), copy.deepcopy(model)]
    for sharded in models[1:]:
        for layer in (sharded[0], sharded):
            fully_shard(layer)
    config = ARSConfig(window=12, threshold=6.0, first_release=3, release=9)
    results = []
    for found, group in zip(models, (False, None, False), strict=True):
        optimizer = ARSAdamW(found.parameters(), lr=0.01, process_group=group, ars=config)
        phis = []
        for step in range(30):
            data = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
            targets = data.sum(1, keepdim=True) + torch.tensor([[0], [0], [0], [60 * (step > 23)]])
            if found is not model:
                data, targets = data.chunk(RANKS)[rank], targets.chunk(RANKS)[rank]
            loss = (found(data) - targets).square().mean()
            loss.backward()
            optimizer.step(loss=loss)
            optimizer.zero_grad()
            phis.append(float(optimizer.diagnostics["phi"]))
        results.append(([whole(p) for p in found.parameters()], phis))
    return results


def re_sharded(mesh):
    """A parameter gets other placements, and data of the meta device, under the optimizer."""
    expected, params = parameters(shapes=((6, 3),)), parameters(shapes=((6, 3),))
    alone = ARSAdamW(expected, lr=0.1)
    (start,) = placed([params[0].detach()], mesh, [[Shard(0)]])
    params = [torch.nn.Parameter(start)]
    optimizer = ARSAdamW(params, lr=0.1)
    found = []
    for step, how in enumerate(([Shard(0)], [Shard(1)], [Replicate()], [Shard(0)])):
        if step:
            moved = torch.nn.Parameter(params[0].detach().redistribute(placements=how))
            torch.utils.swap_tensors(params[0], moved)
        gradients(expected, step)
        params[0].grad = placed([expected[0].grad], mesh, [how])[0]
        alone.step(loss=1.0)
        optimizer.step(loss=1.0)
        found.append(optimizer.state[params[0]]["exp_avg"].placements == tuple(how))
    # A gradient that is placed in another way, or a sum that has not been taken yet.
    gradients(expected, 9)
    gradient = placed([expected[0].grad], mesh, [[Shard(1)]])[0]
    params[0].grad = gradient
    alone.step(loss=1.0)
    optimizer.step(loss=1.0)
    return [whole(expected[0]), whole(params[0])], found


def from_meta(rank):
    torch.manual_seed(0)
    alone = torch.nn.Linear(5, 3)
    with torch.device("meta"):
        model = torch.nn.Linear(5, 3)
    fully_shard(model)
    optimizer = ARSAdamW(model.parameters(), lr=0.1, max_grad_norm=0.1)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            mine.copy_(placed([theirs], mine.device_mesh, [mine.placements])[0])
    expected = ARSAdamW(alone.parameters(), lr=0.1, max_grad_norm=0.1)
    data = torch.randn(4, 5)
    for _ in range(3):
        for found, step in ((alone, expected), (model, optimizer)):
            loss = found(data).square().mean()
            loss.backward()
            step.step(loss=loss)
            step.zero_grad()
    return [whole(p) for p in alone.parameters()], [whole(p) for p in model.parameters()]


def rounded(mesh):
    """Return each rank's bits after stochastic rounding of equal numbers."""
    values = torch.full((64, 8), 1.0, dtype=torch.bfloat16)
    found = {}
    for name, how in (("shards", [Shard(0)]), ("replicas", [Replicate()])):
        (param,) = (torch.nn.Parameter(p) for p in placed([values], mesh, [how]))
        optimizer = ARSAdamW([param], lr=1e-3, weight_decay=0.0, stochastic_rounding=True, ars=None)
        param.grad = torch.ones_like(param)
        optimizer.step()
        found[name] = param.to_local().detach().clone()
    (param,) = (torch.nn.Parameter(p) for p in placed([values], mesh, [[Shard(0)]]))
    master = ARSAdamW([param], lr=1e-3, weight_decay=0.0, master_weights=True, ars=None)
    for _ in range(20):
        param.grad = torch.ones_like(param)
        master.step()
    found["master"] = whole(param)
    return found


def trials(mesh, rank):
    """A step at a rate of 0: whether it is a trial, all ranks say alike, and none waits."""
    counts = []
    for value in (0.0, float(rank)):
        (param,) = (torch.nn.Parameter(p) for p in placed([torch.ones(4)], mesh, [[Shard(0)]]))
        param.grad = placed([torch.ones(4)], mesh, [[Shard(0)]])[0] * value
        optimizer = ARSAdamW([param], lr=0.0, max_grad_norm=1.0)
        optimizer.step()
        counts.append(float(optimizer.state[param]["step"]))
    return counts


def refusals(mesh):
    messages = []
    (param,) = (torch.nn.Parameter(p) for p in placed([torch.ones(4)], mesh, [[Shard(0)]]))
    optimizer = ARSAdamW([param])
    for wrong in (
        lambda: GradientRelease(optimizer),
        lambda: setattr(optimizer, "penalty", Pulled(param)),
    ):
        try:
            wrong()
        except ValueError as error:
            messages.append(str(error))
    return messages


class Pulled:
    """A penalty whose buffer is whole, beside a parameter that is sharded."""

    strength, mode = 1.0, "coupled"

    def __init__(self, param):
        self.param = param

    def terms(self):
        return []

    def gradients(self):
        return [(self.param, torch.zeros(self.param.shape))]

    def refresh(self):
        return torch.zeros(())


def flat_memory(mesh):
    """Return the growth of what Python and torch hold over a few hundred steps."""
    import gc

    params = [torch.nn.Parameter(p) for p in placed(parameters(shapes=SHAPES), mesh, PLACEMENTS)]
    optimizer = ARSAdamW(params, max_grad_norm=1.0)
    counts = []
    for step in range(300):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        if step in (99, 299):
            gc.collect()
            counts.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
    return counts


def work(rank):
    mesh = init_device_mesh("cpu", (RANKS,))
    results = {
        case: train(
            case,
            lambda tensors: placed(tensors, mesh, PLACEMENTS),
            lambda step: loss_of(step, rank),
        )
        for case in CASES
    }
    results |= {
        "operations": operations(mesh),
        "model": fully_sharded(rank),
        "re-sharded": re_sharded(mesh),
        "meta": from_meta(rank),
        "rounded": rounded(mesh),
        "trials": trials(mesh, rank),
        "refusals": refusals(mesh),
        "memory": flat_memory(mesh),
    }
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(work, RANKS, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_a_step_on_parts_is_that_on_the_whole(results, case):
    expected, signals = train(
        case, losses=lambda step: (loss_of(step, 0).double() + loss_of(step, 1).double()) / 2
    )
    exact = {torch.bfloat16: 0.02, torch.float32: 1e-6, torch.float64: 1e-7}
    for tensors, _ in (result[case] for result in results):
        for mine, theirs in zip(tensors, expected, strict=True):
            tolerance = exact[torch.bfloat16 if case[0] in DTYPES else mine.dtype]
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    first, second = (result[case][1] for result in results)
    assert str(first) == str(second)  # to the bit; NaN is not itself
    for mine, theirs in zip(first, signals, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5 if case[0] in DTYPES else 1e-6, nan_ok=True)


def test_no_operation_on_dtensors_and_one_message(results):
    for result in results:
        assert result["operations"] == (0, [3], "fused")


def test_a_local_loss_gives_all_parts_one_rate(results):
    first, second = (result["model"] for result in results)
    expected, gates = first[0]
    assert min(gates) < 0.9
    for index in (1, 2):
        weights, phis = first[index]
        assert phis == second[index][1] == pytest.approx(gates, rel=1e-5)
        for mine, theirs in zip(weights, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_parameter_may_be_placed_in_another_way(results):
    for result in results:
        (expected, found), moments_follow = result["re-sharded"]
        assert moments_follow == [True] * 4
        torch.testing.assert_close(found, expected)


def test_parameters_may_get_their_data_after_the_optimizer_is_made(results):
    for result in results:
        for mine, theirs in zip(*result["meta"], strict=True):
            torch.testing.assert_close(theirs, mine)


def test_stochastic_rounding_of_parts(results):
    first, second = (result["rounded"] for result in results)
    assert torch.equal(first["replicas"], second["replicas"])
    assert not torch.equal(first["shards"], second["shards"])
    for found in (first["shards"], second["shards"], first["replicas"]):
        assert 0 < int((found != 1).sum()) < found.numel()
    # 20 steps of a thousandth, each less than half of the distance to the next bfloat16.
    torch.testing.assert_close(
        first["master"].float(), torch.full((64, 8), 0.98), atol=0.002, rtol=0
    )


def test_a_trial_is_one_for_all(results):
    assert [result["trials"] for result in results] == [[0.0, 1.0]] * RANKS


def test_what_cannot_be_had_of_parts_is_refused(results):
    for result in results:
        release, pull = result["refusals"]
        assert "gradient release is not for DTensors" in release
        assert "torch.zeros_like(parameter)" in pull


def test_memory_is_flat(results):
    for result in results:
        before, after = result["memory"]
        assert after <= before
