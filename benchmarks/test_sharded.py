"""A step on shards: torch's AdamW(fused=True) and ours on the same ones, in two processes.

Each round begins by a barrier. The messages of two processes on one machine need both at once, so
whatever else runs there shows in the candidates that send any: beside the median are given the
shortest time and the load of the machine.
"""

import os
import random
import time

import pytest
import torch
import torch.multiprocessing
from contest import PLAYED_BACK, Candidate, Contest
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ars import ARSAdamW
from ars.regularizers import EWC

pytestmark = PLAYED_BACK

RANKS = 2
SHAPES = {"20 x 64 x 64": [(64, 64)] * 20, "10 x 1024 x 1024": [(1024, 1024)] * 10}
ROUNDS = {"20 x 64 x 64": 51, "10 x 1024 x 1024": 15}
BASELINE = "AdamW(fused=True)"
CLIPPED = "ARSAdamW(max_grad_norm=1, penalty=EWC)"
TOLERANCE = 1e-6  # of parameters of order one after one step of 1e-3
NAMES = [BASELINE, "AdamW()", "ARSAdamW(ars=None)", "ARSAdamW()", CLIPPED]


def weights(name: str) -> torch.nn.ParameterList:
    """Draw shards and their gradients, the same for every candidate."""
    mesh = init_device_mesh("cpu", (RANKS,))
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        whole = torch.randn(shape, generator=generator)
        return distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)

    found = torch.nn.ParameterList(torch.nn.Parameter(draw(shape)) for shape in SHAPES[name])
    for weight in found:
        # As FSDP2 gives them: placed by the very object that says how the parameter is.
        part = torch.randn(weight.to_local().shape, generator=generator)
        weight.grad = DTensor(part, weight._spec, requires_grad=False)
    return found


def candidates(name: str) -> dict[str, torch.optim.Optimizer]:
    """Build every optimizer, each with shards of its own."""
    penalised = weights(name)
    importance = {key: torch.ones(p.shape) for key, p in penalised.named_parameters()}
    return {
        BASELINE: torch.optim.AdamW(weights(name).parameters(), fused=True),
        "AdamW()": torch.optim.AdamW(weights(name).parameters()),
        "ARSAdamW(ars=None)": ARSAdamW(weights(name).parameters(), ars=None),
        "ARSAdamW()": ARSAdamW(weights(name).parameters()),
        CLIPPED: ARSAdamW(
            penalised.parameters(), max_grad_norm=1.0, penalty=EWC(penalised, importance)
        ),
    }


def take_step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """Take a step, with the loss where it is watched."""
    optimizer.step(**({"loss": loss} if isinstance(optimizer, ARSAdamW) else {}))


def largest_difference(optimizer: torch.optim.Optimizer, baseline: torch.optim.Optimizer) -> float:
    """Return how far the parts of this process are from the baseline's."""
    pairs = zip(
        optimizer.param_groups[0]["params"], baseline.param_groups[0]["params"], strict=True
    )
    return max(float((a.to_local() - b.to_local()).detach().abs().max()) for a, b in pairs)


def work(rank: int, name: str, folder: str) -> None:
    """Compare, then time all candidates in turns, and let the first process save both."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    optimizers = candidates(name)
    loss = torch.tensor(1.0)
    for optimizer in optimizers.values():
        take_step(optimizer, loss)
    # The last one clips, so it has taken another step.
    differences = {
        key: largest_difference(optimizers[key], optimizers[BASELINE]) for key in NAMES[:-1]
    }
    seconds: dict[str, list[float]] = {key: [] for key in optimizers}
    order, shuffle = list(optimizers), random.Random(0)
    for index in range(ROUNDS[name] + 3):
        shuffle.shuffle(order)  # who follows a long step has neither the core nor the cache
        for key in order:
            distributed.barrier()
            start = time.perf_counter()
            take_step(optimizers[key], loss)
            if index >= 3:
                seconds[key].append(time.perf_counter() - start)
    if rank == 0:
        torch.save((seconds, differences), f"{folder}/found")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module", params=SHAPES)
def sharded(request, contest, tmp_path_factory) -> Contest:
    """Ours against AdamW(fused=True) on the same shards; goals 1.1, and 2 with clip and EWC."""
    folder = tmp_path_factory.mktemp("sharded")
    made: Contest = contest(f"sharded {request.param}", BASELINE)
    if request.config.getoption("benchmark_disable"):
        made.candidates = dict.fromkeys(NAMES, Candidate(None))
        return made
    torch.multiprocessing.spawn(work, (request.param, str(folder)), nprocs=RANKS)
    made.seconds, differences = torch.load(folder / "found")
    load = round(os.getloadavg()[0], 1)

    def check(key: str) -> dict[str, float]:
        assert differences[key] <= TOLERANCE, f"{key} is off by {differences[key]}"
        return {"largest difference": differences[key], "atol": TOLERANCE}

    for key in NAMES:
        compared = (lambda key=key: check(key)) if key in differences else None
        made.candidates[key] = Candidate(None, check=compared)
        made.notes[key] = {"processes": RANKS, "load of the machine": load}
    return made


@pytest.mark.parametrize("name", NAMES)
def test_sharded_step(name, sharded, benchmark):
    sharded.play(name, benchmark)
