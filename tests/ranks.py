"""Processes of one gloo group, started once for all that a module's tests ask of them."""

import multiprocessing
from datetime import timedelta

import torch
import torch.multiprocessing
from torch import distributed
from torch.distributed.tensor import DTensor, distribute_tensor

PATIENCE = timedelta(seconds=120)  # for a process that waits for another in vain


def _begin(rank, work, world, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=PATIENCE
    )
    torch.save(work(rank), f"{folder}/{rank}")
    distributed.barrier()  # so that none leaves while another still waits for it
    distributed.destroy_process_group()


def run_ranks(work, world, folder):
    """Return what ``work(rank)`` returns in each of several processes; it must be picklable.

    They are forked from one process that has imported torch and nothing else: half the time.
    """
    multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor"])
    torch.multiprocessing.start_processes(
        _begin, (work, world, str(folder)), nprocs=world, start_method="forkserver"
    )
    return [torch.load(folder / str(rank)) for rank in range(world)]


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
