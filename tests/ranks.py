"""Processes of one gloo group, started once for all that a module's tests ask of them."""

import multiprocessing
from datetime import timedelta

import torch
import torch.multiprocessing
from torch import distributed
from torch.distributed.tensor import DTensor, distribute_tensor

PATIENCE = timedelta(seconds=120)  # for a process that waits for another in vain


def _begin(rank, works, folder):
    torch.set_num_threads(1)
    results = []
    for index, (world, work) in enumerate(works):
        result = None
        if rank < world:
            distributed.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store {index}",
                rank=rank,
                world_size=world,
                timeout=PATIENCE,
            )
            result = work(rank)
            distributed.barrier()  # so that none leaves while another still waits for it
            distributed.destroy_process_group()
        results.append(result)
    torch.save(results, f"{folder}/{rank}")


def run_worlds(works, folder):
    """Do one work after another in the same processes, each as a group of as many as it says.

    They are forked from one process that has imported torch and nothing else: half the time.

    Args:
        works: Pairs of a number of processes and of ``work(rank)``, which must be picklable.
        folder: For files.

    Returns:
        What each work returned: lists of one result for each process.
    """
    multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor"])
    most = max(world for world, _ in works)
    torch.multiprocessing.start_processes(
        _begin, (works, str(folder)), nprocs=most, start_method="forkserver"
    )
    found = [torch.load(folder / str(rank)) for rank in range(most)]
    return [[found[r][i] for r in range(world)] for i, (world, _) in enumerate(works)]


def run_ranks(work, world, folder):
    """Return what ``work(rank)`` returns in each of several processes; see :func:`run_worlds`."""
    return run_worlds([(world, work)], folder)[0]


def whole(tensor):
    """Return all of a tensor, detached, wherever its parts are."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def placed(tensors, mesh, placements):
    """Distribute tensors that every process has; None leaves one as it is."""
    return [
        tensor
        if how is None
        else distribute_tensor(tensor.detach().clone(), mesh, how, src_data_rank=None)
        for tensor, how in zip(tensors, placements, strict=True)
    ]
