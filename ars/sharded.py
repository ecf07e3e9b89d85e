"""Tensors that are shards of a whole: whether they are, the whole, and a whole's shards.

A parameter under ``fully_shard`` or ``parallelize_module`` is a DTensor: its shape is that of the
whole, its memory that of this process's part. Nothing here imports what defines them before there
is one.
"""

from typing import Any

from torch import Tensor, nn

__all__ = ["is_sharded", "place_as", "reshard", "whole"]


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """Return all of a tensor, detached.

    Of a DTensor, a collective operation of its mesh; where that is, if a shard was offloaded.

    Args:
        tensor: Any tensor; one that is no DTensor is returned as it is.
    """
    if not is_sharded(tensor):
        return tensor.detach()
    return tensor.detach().to(tensor.device_mesh.device_type).full_tensor()


def place_as(tensor: Tensor, like: Any, *, from_first: bool = False) -> Tensor:
    """Return a whole tensor's part in this process, placed as another is.

    Args:
        tensor: Of the shape of ``like``, the same in all processes.
        like: A DTensor; ``tensor`` is returned as it is if it is none.
        from_first: Whether the first process's is sent to all, as theirs may be another.
    """
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    source = 0 if from_first else None
    mesh, placements = like.device_mesh, like.placements
    on_mesh = tensor.to(mesh.device_type)
    part: Tensor = distribute_tensor(on_mesh, mesh, placements, src_data_rank=source)
    return part.clone().to(like.device)  # lest all of it be kept for a view


def reshard(model: nn.Module) -> None:
    """Put the parameters of ``fully_shard`` in their places, where a forward pass has left others.

    Args:
        model: Any module.
    """
    for module in model.modules():
        if hasattr(module, "set_reshard_after_forward"):
            module.reshard()  # type: ignore[operator]
