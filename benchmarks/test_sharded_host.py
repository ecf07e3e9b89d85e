"""What a step on shards costs the host: time for each tensor beside plain ones, memory over time.

The tensors are so small that their arithmetic is nothing. The plain ones are the very parts.
"""

import gc
import os
import random
import time
from pathlib import Path

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
TENSORS = 200
ROUNDS = 51
STEPS = (1000, 10_000)  # when the memory is read
NAMES = [
    f"{optimizer}, {where}"
    for where in ("shards", "plain")
    for optimizer in ("AdamW(fused=True)", "ARSAdamW(ars=None)", "ARSAdamW()")
]


def weights(*, divided: bool, count: int = TENSORS) -> torch.nn.ParameterList:
    """Make small parameters with gradients, the parts of DTensors or DTensors."""
    mesh = init_device_mesh("cpu", (RANKS,))
    found = torch.nn.ParameterList()
    for _ in range(count):
        weight = torch.nn.Parameter(
            distribute_tensor(torch.ones(8, 8), mesh, [Shard(0)], src_data_rank=None)
        )
        part = torch.full((4, 8), 1e-3)
        if divided:
            weight.grad = DTensor(part, weight._spec, requires_grad=False)
        else:
            weight = torch.nn.Parameter(weight.to_local().detach().clone())
            weight.grad = part
        found.append(weight)
    return found


def penalised(params: torch.nn.ParameterList) -> ARSAdamW:
    """Make an optimizer that clips and has a penalty."""
    importance = {key: torch.ones(p.shape) for key, p in params.named_parameters()}
    return ARSAdamW(params.parameters(), max_grad_norm=1.0, penalty=EWC(params, importance))


def candidates() -> dict[str, torch.optim.Optimizer]:
    """Build every optimizer on shards, and on plain tensors."""
    found: dict[str, torch.optim.Optimizer] = {}
    for where, divided in (("shards", True), ("plain", False)):
        some = [weights(divided=divided).parameters() for _ in range(3)]
        found[f"AdamW(fused=True), {where}"] = torch.optim.AdamW(some[0], fused=True)
        found[f"ARSAdamW(ars=None), {where}"] = ARSAdamW(some[1], ars=None)
        found[f"ARSAdamW(), {where}"] = ARSAdamW(some[2])
    return found


def begin(rank: int, folder: str) -> None:
    """Join the other process."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )


def end(rank: int, folder: str, found: object) -> None:
    """Save what the first process has found, and leave together."""
    if rank == 0:
        torch.save(found, f"{folder}/found")
    distributed.barrier()
    distributed.destroy_process_group()


def times(rank: int, folder: str) -> None:
    """Time all candidates in turns."""
    begin(rank, folder)
    optimizers, loss = candidates(), torch.tensor(1.0)
    seconds: dict[str, list[float]] = {key: [] for key in optimizers}
    order, shuffle = list(optimizers), random.Random(0)
    for index in range(ROUNDS + 3):
        shuffle.shuffle(order)
        for key in order:
            given = {"loss": loss} if key.startswith("ARS") else {}
            distributed.barrier()
            start = time.perf_counter()
            optimizers[key].step(**given)
            if index >= 3:
                seconds[key].append(time.perf_counter() - start)
    end(rank, folder, seconds)


def resident() -> int:
    """Return the bytes of this process that are in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(rank: int, folder: str) -> None:
    """Count tensors and objects, and read the process's memory, early and late in a long run."""
    begin(rank, folder)
    optimizer, rows = penalised(weights(divided=True, count=20)), []
    for step in range(1, STEPS[-1] + 1):
        optimizer.step(loss=3.0 + step % 7)
        if step in STEPS:
            gc.collect()
            objects = gc.get_objects()
            rows.append(
                {
                    "step": step,
                    "tensors": sum(issubclass(type(each), torch.Tensor) for each in objects),
                    "objects": len(objects),
                    "process MiB": round(resident() / 2**20, 1),
                }
            )
    end(rank, folder, rows)


@pytest.fixture(scope="module")
def host(request, contest, tmp_path_factory) -> Contest:
    """A step that computes next to nothing; divide by the number of tensors."""
    made: Contest = contest(f"sharded host, {TENSORS} tensors", NAMES[0])
    made.candidates = {key: Candidate(None) for key in NAMES}
    if request.config.getoption("benchmark_disable"):
        return made
    folder = tmp_path_factory.mktemp("host")
    torch.multiprocessing.spawn(times, (str(folder),), nprocs=RANKS)
    made.seconds = torch.load(folder / "found")
    load = round(os.getloadavg()[0], 1)
    made.notes = {
        key: {
            "processes": RANKS,
            "load of the machine": load,
            "shortest us / tensor": round(min(values) / TENSORS * 1e6, 3),
        }
        for key, values in made.seconds.items()
    }
    return made


@pytest.mark.parametrize("name", NAMES)
def test_sharded_host_time(name, host, benchmark):
    host.play(name, benchmark)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to read memory from")
def test_sharded_memory(table, tmp_path: Path) -> None:
    """Memory of a clipped step with EWC on shards after 1,000 and 10,000 steps."""
    torch.multiprocessing.spawn(memory, (str(tmp_path),), nprocs=RANKS)
    rows = torch.load(tmp_path / "found")
    table("sharded memory", rows)
    early, late = rows
    assert late["tensors"] <= early["tensors"]
    assert late["objects"] <= early["objects"] + 10  # the row of numbers that was made before
