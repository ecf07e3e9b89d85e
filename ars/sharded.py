"""DTensors: the wholes that they stand for, and the parts of these that this process holds.

A DTensor, a parameter under ``fully_shard`` or ``parallelize_module``, has the shape of the whole
and the memory of this process's part: a mesh of processes divides it (``Shard``) or repeats it
(``Replicate``). Elementwise work needs nothing but the parts, and a sum over the whole is that of
the parts, each counted once: of replicas, that of the first. Nothing here imports what defines
DTensors before there is one. And the name of a group of processes.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import is_
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union

import torch
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "Group", "add_over", "add_over_divided", "checked_group", "count_here", "divides",
    "exchange_device", "indices_here", "is_counted", "is_placed_like", "is_sharded",
    "is_true_everywhere", "local_memory", "mean_over_meshes", "mesh_of", "norm_of_parts",
    "part_of", "parts_like", "place_as", "place_like", "placements_of", "reshard", "shard_number",
    "sum_of_parts", "whole", "with_part", "with_rows",
]  # fmt: skip

# Processes that do something as one: None is torch's default group, False is this process alone.
Group: TypeAlias = Union["ProcessGroup", Literal[False], None]
_NOTHING = repeat(None)


def checked_group(group: Group) -> Group:
    """Return what names a process group, once it has been seen to do so.

    Args:
        group: A process group; None is torch's default group, False this process alone.

    Raises:
        TypeError: It is something else, or a group that this process is not in.
    """
    known = group is None or group is False
    if not known and distributed.is_available():
        known = isinstance(group, distributed.ProcessGroup)
    if not known:
        raise TypeError(
            f"process_group must be a ProcessGroup that this process is in, None for the "
            f"default group, or False for none, got {group!r}"
        )
    return group


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
    ours, theirs = given.device_mesh, like.device_mesh
    same = ours is theirs or ours == theirs  # which compares all that they hold
    return bool(same and given.placements == like.placements)


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
    if is_placed_like(tensor, param):
        return tensor
    if is_sharded(tensor) and is_sharded(param) and given.device_mesh == mesh_of(param):
        moved: Tensor = given.redistribute(placements=param.placements)  # type: ignore[attr-defined]
        return moved
    return place_as(whole(tensor), param)


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


def with_rows(part: Tensor, param: Tensor) -> Tensor:
    """Return a matrix whose rows are placed as those of a parameter, which is divided by rows only.

    Args:
        part: The rows that this process holds.
        param: The parameter, a DTensor or not.
    """
    if not is_sharded(param):
        return part
    from torch.distributed.tensor import DTensor

    like: Any = param
    shape = torch.Size((param.shape[0], part.shape[1]))
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=shape,
        stride=(shape[1], 1),
    )  # fmt: skip


def divides(placement: Any, *, rows: bool) -> bool:
    """Whether a placement divides a parameter by rows, dimension 0, or else by what is in a row.

    Args:
        placement: One of a DTensor's.
        rows: Which of both is asked.
    """
    dimension = getattr(placement, "dim", None)
    return dimension is not None and (dimension == 0) == rows


def indices_here(param: Tensor, *, rows: bool) -> Tensor:
    """Return which rows, or which columns, of a parameter this process holds.

    Args:
        param: A DTensor, flattened from dimension 1 on.
        rows: Its rows, or else its columns.

    Returns:
        The numbers, int64, in the order of the part.
    """
    from torch.distributed.tensor import Replicate, distribute_tensor

    like: Any = param
    shape = [n if (index == 0) == rows else 1 for index, n in enumerate(param.shape)]
    numbers = torch.arange(math.prod(shape), device=like.device_mesh.device_type).view(shape)
    how = [p if divides(p, rows=rows) else Replicate() for p in like.placements]
    found = distribute_tensor(numbers, like.device_mesh, how, src_data_rank=None)
    return found.to_local().flatten().clone()


def add_over_divided(tensor: Tensor, param: Tensor, *, rows: bool) -> bool:
    """Add a tensor up over the processes that hold other rows, or columns, in place.

    Args:
        tensor: A sum over the rows, or columns, that are here.
        param: The parameter, a DTensor or not.
        rows: Over its rows, or else over its columns.

    Returns:
        Whether this is the first process of those that have the result.
    """
    first = True
    if is_sharded(param):
        like: Any = param
        mesh = like.device_mesh
        for dimension, placement in enumerate(like.placements):
            if divides(placement, rows=rows):
                distributed.all_reduce(tensor, group=mesh.get_group(dimension))
                first = first and mesh.get_local_rank(dimension) == 0
    return first


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


def mean_over_meshes(value: Tensor, params: Iterable[Tensor]) -> Tensor:
    """Return the mean of a number over the processes that hold parts of the same parameters.

    Args:
        value: 0-d.
        params: The parameters; where none is a DTensor, the number is returned as it is.

    Returns:
        The same bits in each of these processes; of several meshes, the largest of their means.
    """
    meshes = list(dict.fromkeys(mesh_of(param) for param in params if is_sharded(param)))
    if not meshes:
        return value
    sent = value.detach().to(exchange_device(None, value.device), torch.float64, copy=True)
    for mesh in meshes:
        add_over(mesh, sent)
        sent /= mesh.size()
    for mesh in meshes if len(meshes) > 1 else ():
        add_over(mesh, sent, largest=True)
    return sent


def norm_of_parts(grads: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """Return the norm of all gradients as one vector, of which each process holds parts.

    Args:
        grads: The gradients.
        params: Their parameters, DTensors among them.

    Returns:
        The norm, 0-d float64; the same bits in each process of one mesh.
    """
    parts = [part_of(place_like(g, p)) for g, p in zip(grads, params, strict=True)]
    norms = [torch.linalg.vector_norm(part.detach(), dtype=torch.float64) for part in parts]
    return sum_of_parts([norm.square() for norm in norms], params).sqrt()


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
    return total.to(functools.reduce(torch.promote_types, [v.dtype for v in values]))


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
