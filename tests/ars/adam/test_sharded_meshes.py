"""Steps on a mesh of two dimensions, and with parameters on one of them beside it."""

import pytest
import torch
from optimizers import Pull, gradients, parameters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

from ars import ARSAdamW, ARSConfig
from ranks import placed, run_ranks, whole

RANKS = 4
STEPS = 4
SHAPES = ((5,), (7, 4), (6, 6), (3, 5), (8,))
BOTH = (
    [Shard(0), Shard(0)],
    [Shard(0), Shard(1)],
    [Replicate(), Shard(1)],
    [Shard(0), Replicate()],
)
ONE = [Shard(0)]  # on the first dimension only: repeated on the second, which no placement says
CASES = {
    "one mesh": (BOTH, None, False),
    "two meshes": (BOTH, ONE, False),
    "norm": (BOTH, ONE, True),
}


def loss_of(step, rank):
    return torch.tensor(3.0 + step + 0.25 * rank)


def train(place, losses, *, norm, mode):
    start = [p.detach() for p in parameters(shapes=SHAPES)]
    params = [torch.nn.Parameter(p) for p in place(start)]
    penalty = Pull(start, strength=5.0, mode=mode)
    penalty.rows = [(p, *row[1:]) for p, row in zip(params, penalty.rows, strict=True)]
    optimizer = ARSAdamW(
        params, lr=0.05, penalty=penalty, max_grad_norm=0.7, ars=ARSConfig.paper(window=3)
    )
    trace = []
    for step in range(STEPS):
        gradients(start, step)
        for param, grad in zip(params, place([p.grad for p in start]), strict=True):
            param.grad = grad.clone()
        optimizer.step(**{} if norm else {"loss": losses(step)})
        trace.append({key: float(value) for key, value in optimizer.diagnostics.items()})
    return [whole(param) for param in params], trace


def work(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    results = {}
    for name, (both, one, norm) in CASES.items():
        for mode in ("coupled", "proximal"):

            def place(tensors, both=both, one=one):
                first = placed(tensors[:-1], mesh, both)
                where = mesh if one is None else mesh["data"]
                return first + placed(tensors[-1:], where, [one or [Shard(0), Shard(0)]])

            results[name, mode] = train(
                place, lambda step: loss_of(step, rank), norm=norm, mode=mode
            )
    half = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "data"))["data"]
    results["stages"] = train(  # each half of the processes has a model of its own
        lambda tensors: placed(tensors, half, [[Shard(0)]] * len(SHAPES)),
        lambda step: loss_of(step, rank % 2),
        norm=True,
        mode="coupled",
    )
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(work, RANKS, tmp_path_factory.mktemp("meshes"))


def expected(name, mode):
    norm = name == "stages" or CASES[name][2]
    mean = lambda step: sum(loss_of(step, rank).double() for rank in range(RANKS)) / RANKS  # noqa: E731
    return train(lambda tensors: [t.clone() for t in tensors], mean, norm=norm, mode=mode)


@pytest.mark.parametrize("mode", ["coupled", "proximal"])
@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_one_process(results, name, mode):
    weights, signals = expected(name, mode)
    for result in results:
        found, trace = result[name, mode]
        assert trace == results[0][name, mode][1]
        for mine, theirs in zip(found, weights, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-6)
        for mine, theirs in zip(trace, signals, strict=True):
            assert mine == pytest.approx(theirs, rel=2e-6)


def test_processes_that_share_no_parameter_have_norms_of_their_own(results):
    weights, signals = expected("stages", "coupled")
    for result in results:
        found, trace = result["stages"]
        for mine, theirs in zip(found, weights, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=1e-6)
        for mine, theirs in zip(trace, signals, strict=True):
            assert mine == pytest.approx(theirs, rel=2e-6)
