"""DTensors as the parts of them that this process holds.

A DTensor is a whole tensor that a mesh of processes divides (``Shard``) or repeats (``Replicate``).
Elementwise work needs nothing but the parts, and a sum over the whole is the sum of those over the
parts, each counted once: of replicas, that of the first.
"""

import sys
from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "add_over", "count_here", "exchange_device", "is_counted", "is_placed_like", "is_sharded",
    "is_true_everywhere", "local_memory", "mesh_of", "part_of", "parts_like", "place_like",
    "placements_of", "shard_number", "sum_of_parts", "with_part",
]  # fmt: skip

_NOTHING = repeat(None)


def is_sharded(tensor: object) -> bool:
    """Whether something is a DTensor; nothing is imported to find out."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def part_of(tensor: Any) -> Tensor:
    """Return what this process holds of a DTensor, detached and in the same memory; others as such.

    Args:
        tensor: Any tensor.
    """
    if not is_sharded(tensor):
        found: Tensor = tensor
        return found
    part: Any = tensor._local_tensor
    # The result of a collective operation that may not have arrived.
    return part.wait() if is_traceable_wrapper_subclass(part) and hasattr(part, "wait") else part


def placements_of(tensors: Iterable[Tensor]) -> list[Any]:
    """Return how each tensor is placed, an object to be compared by identity; None of plain ones.

    Args:
        tensors: Any tensors.
    """
    return list(map(getattr, tensors, repeat("_spec"), _NOTHING))


def local_memory(tensors: list[Tensor]) -> list[Any]:
    """Return each tensor's part, an object to be compared by identity; plain ones themselves.

    Args:
        tensors: Any tensors.
    """
    return list(map(getattr, tensors, repeat("_local_tensor"), tensors))


def parts_like(tensors: list[Tensor], params: list[Tensor], placements: list[Any]) -> list[Tensor]:
    """Return the parts of gradients, placed as their parameters are.

    Those of FSDP2 are so already, and are only looked up. A partial one, say, is reduced.

    Args:
        tensors: The gradients.
        params: Their parameters.
        placements: What :func:`placements_of` returned of these; None to leave a plain one.
    """
    if all(map(is_, map(getattr, tensors, repeat("_spec"), _NOTHING), placements)):
        return local_memory(tensors)
    return [
        tensor if how is None and not is_sharded(tensor) else part_of(place_like(tensor, param))
        for tensor, param, how in zip(tensors, params, placements, strict=True)
    ]


def is_placed_like(tensor: Tensor, param: Tensor) -> bool:
    """Whether two tensors are divided in the same way, or neither is.

    Args:
        tensor: Any tensor.
        param: Another.
    """
    if not (is_sharded(tensor) and is_sharded(param)):
        return is_sharded(tensor) == is_sharded(param)
    given: Any = tensor
    like: Any = param
    return bool(given.device_mesh == like.device_mesh and given.placements == like.placements)


def mesh_of(param: Tensor) -> "DeviceMesh":
    """Return the mesh of a DTensor."""
    mesh: DeviceMesh = param.device_mesh  # type: ignore[attr-defined]
    return mesh


def place_like(tensor: Tensor, param: Tensor) -> Tensor:
    """Return a tensor placed as a parameter is: itself, where it is so.

    A whole tensor is cut where it is, so every process must have the same one: nothing is sent. A
    DTensor that is placed otherwise is redistributed, by all processes of its mesh.

    Args:
        tensor: Of the parameter's global shape; any dtype.
        param: The parameter, a DTensor or not.

    Returns:
        A tensor of the parameter's kind, in the dtype of ``tensor``.
    """
    given: Any = tensor
    if not is_sharded(param):
        return given.full_tensor() if is_sharded(given) else tensor
    like: Any = param
    mesh, placements = like.device_mesh, like.placements
    if is_sharded(given):
        if given.device_mesh == mesh:
            same = given.placements == placements
            return tensor if same else given.redistribute(placements=placements)
        given = given.full_tensor()
    from torch.distributed.tensor import distribute_tensor

    whole = given.detach().to(param.device)
    cut = distribute_tensor(whole, mesh, placements, src_data_rank=None)
    return with_part(cut.to_local().clone(), param)  # lest all of it be kept for a view


def with_part(part: Tensor, param: Tensor) -> Tensor:
    """Return a tensor placed as a parameter is, of which this process holds a given part.

    Args:
        part: Of the shape of the parameter's part, any dtype.
        param: The parameter, a DTensor or not.
    """
    if not is_sharded(param):
        return part
    from torch.distributed.tensor import DTensor

    like: Any = param
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=param.shape,
        stride=param.stride(),
    )  # fmt: skip


def is_counted(param: Tensor) -> bool:
    """Whether this process's part is counted in sums: the first of its replicas.

    Args:
        param: A DTensor.
    """
    like: Any = param
    place = like.device_mesh.get_coordinate()
    return place is not None and all(
        index == 0 for index, how in zip(place, like.placements, strict=True) if how.is_replicate()
    )


def shard_number(param: Tensor) -> int:
    """Return a number that is the same for replicas of a part and another for any other part.

    Args:
        param: Any tensor.
    """
    like: Any = param
    number = 0
    if is_sharded(param):
        mesh = like.device_mesh
        place = mesh.get_coordinate() or [0] * mesh.ndim
        for index, size, how in zip(place, mesh.shape, like.placements, strict=True):
            if not how.is_replicate():
                number = number * size + index
    return number


def count_here(params: Sequence[Tensor]) -> "dict[DeviceMesh, list[int]]":
    """Return, for every mesh of some parameters, which of them are counted by this process.

    A plain tensor among them counts as repeated over the first mesh.

    Args:
        params: At least one DTensor.

    Returns:
        Indices of parameters, by mesh in the order of the parameters.
    """
    found: dict[Any, list[int]] = {}
    for index, param in enumerate(params):
        if is_sharded(param):
            here = found.setdefault(param.device_mesh, [])  # type: ignore[attr-defined]
            if is_counted(param):
                here.append(index)
    first = next(iter(found))
    if not any(first.get_coordinate()):
        found[first] += [i for i, param in enumerate(params) if not is_sharded(param)]
    return found


def add_over(mesh: "DeviceMesh", values: Tensor, *, largest: bool = False) -> None:
    """Add numbers up over the processes of a mesh, in place: the same bits in each.

    Args:
        mesh: The mesh.
        values: The numbers, on a device of which its processes can exchange tensors.
        largest: Take the largest of each instead.
    """
    how = distributed.ReduceOp.MAX if largest else distributed.ReduceOp.SUM
    if mesh.size() == distributed.get_world_size():
        distributed.all_reduce(values, op=how)
        return
    for dimension in range(mesh.ndim):
        distributed.all_reduce(values, op=how, group=mesh.get_group(dimension))


def sum_of_parts(values: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """Add up a number for each parameter's part over the parts of all processes.

    Args:
        values: 0-d, one for each parameter.
        params: The parameters.

    Returns:
        The sum, 0-d on the first value's device; the same bits in each process of one mesh.
    """
    device = values[0].device
    if not any(map(is_sharded, params)):
        return torch.stack([value.to(device) for value in values]).sum()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for mesh, counted in count_here(params).items():
        own = torch.zeros((), dtype=torch.float64, device=exchange_device(None, device))
        for index in counted:
            own += values[index].detach().to(own)
        add_over(mesh, own)
        total += own.to(device)
    return total.to(values[0].dtype)


def is_true_everywhere(flag: Tensor | bool, param: Tensor) -> bool:
    """Whether something is true in all processes that hold a part of a parameter.

    Args:
        flag: Whether it is so here.
        param: Any tensor.
    """
    if not is_sharded(param):
        return bool(flag)
    like: Any = param
    place = exchange_device(None, param.device)
    wrong = torch.tensor(float(not bool(flag)), dtype=torch.float64, device=place)
    add_over(like.device_mesh, wrong)
    return wrong.item() == 0


def exchange_device(group: "ProcessGroup | None", device: torch.device) -> torch.device:
    """Return the device, or another one that the group can exchange tensors of.

    Args:
        group: A process group, None for the default one.
        device: The device.
    """
    backends = distributed.get_backend_config(group).split(",")  # as in "cpu:gloo,cuda:nccl"
    kinds = [backend.partition(":")[0] for backend in backends]
    return device if device.type in kinds else torch.device(kinds[0])
