"""A step on shards: torch's AdamW(fused=True) and ours on the same ones, in two processes.

Each round begins by a barrier. The messages of two processes on one machine need both at once, so
whatever else runs there shows in the candidates that send any: beside the median are given the
shortest time and the load of the machine.
"""

import os
import random
import statistics
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ars import ARSAdamW
from ars.regularizers import EWC

RANKS = 2
SHAPES = {"20 x 64 x 64": [(64, 64)] * 20, "10 x 1024 x 1024": [(1024, 1024)] * 10}
ROUNDS = {"20 x 64 x 64": 51, "10 x 1024 x 1024": 15}
BASELINE = "AdamW(fused=True)"


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
        "ARSAdamW(max_grad_norm=1, penalty=EWC)": ARSAdamW(
            penalised.parameters(), max_grad_norm=1.0, penalty=EWC(penalised, importance)
        ),
    }


def work(rank: int, name: str, folder: str) -> None:
    """Time all candidates in turns, and let the first process save the seconds."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    optimizers = candidates(name)
    loss = torch.tensor(1.0)
    seconds: dict[str, list[float]] = {key: [] for key in optimizers}
    order, shuffle = list(optimizers), random.Random(0)
    for index in range(ROUNDS[name] + 3):
        shuffle.shuffle(order)  # who follows a long step has neither the core nor the cache
        for key in order:
            optimizer = optimizers[key]
            given = {"loss": loss} if isinstance(optimizer, ARSAdamW) else {}
            distributed.barrier()
            start = time.perf_counter()
            optimizer.step(**given)
            if index >= 3:
                seconds[key].append(time.perf_counter() - start)
    if rank == 0:
        torch.save(seconds, f"{folder}/seconds")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.parametrize("name", SHAPES)
def test_sharded_step(name: str, report, tmp_path: Path) -> None:
    """Ours against AdamW(fused=True) on the same shards; goals 1.1, and 2 with clip and EWC."""
    torch.multiprocessing.spawn(work, (name, str(tmp_path)), nprocs=RANKS)
    seconds = torch.load(tmp_path / "seconds")
    base = seconds[BASELINE]
    rows = []
    for key, values in seconds.items():
        median, shortest = statistics.median(values), min(values)
        rows.append(
            {
                "candidate": key,
                "ms": round(median * 1e3, 3),
                "time / baseline": round(median / statistics.median(base), 3),
                "shortest ms": round(shortest * 1e3, 3),
                "shortest / baseline": round(shortest / min(base), 3),
                "processes": RANKS,
                "load of the machine": round(os.getloadavg()[0], 1),
            }
        )
    report("sharded-" + name.replace(" ", "-"), rows)
