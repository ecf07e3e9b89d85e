"""A distributed model as one process alone has it, for as long as it is measured.

Per-sample gradients need each layer's input and output gradient beside its whole weight. Under
``fully_shard`` and ``parallelize_module`` parameters are DTensors, and hooks gather or redistribute
around every layer; a DistributedDataParallel exchanges buffers in its forward. Both would make a
pass of one process wait for one of every other, and they have different numbers of them. So the
hooks are put aside, and every parameter is gathered once.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ars.regularizers.fisher.processes import Processes
from ars.sharded import is_sharded, reshard, whole

__all__ = ["gathered"]


@contextmanager
def gathered(model: nn.Module, processes: Processes) -> Iterator[dict[str, nn.Parameter]]:
    """Let each process run the model by itself, with whole parameters under their names.

    A collective operation if parameters are DTensors, once for each of them. Gathered ones have
    their own dtype, whatever a mixed-precision policy says. Everything is as before afterwards.

    Args:
        model: Any module.
        processes: Whose samples will be added up.

    Yields:
        The parameters that are DTensors, by name; empty for a model that is not sharded.

    Raises:
        TypeError: The model is sharded by FullyShardedDataParallel, in flat parameters.
        ValueError: Not all processes that hold a part of a parameter add up their samples.
    """
    _refuse_flat_parameters(model)
    reshard(model)
    sharded = {name: p for name, p in model.named_parameters() if is_sharded(p)}
    for name, p in sharded.items():
        _check_members(name, p, processes)
    hooks = [
        registered
        for module in model.modules()
        for registered in (module._forward_pre_hooks, module._forward_hooks)
    ]
    kept = [OrderedDict(registered) for registered in hooks]
    wholes: dict[Tensor, Any] = {}
    stores: list[dict[str, Any]] = [
        store for module in model.modules() for store in (module._parameters, module._buffers)
    ]
    places = [
        (store, own, tensor)
        for store in stores
        for own, tensor in store.items()
        if is_sharded(tensor)
    ]
    wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    try:
        for registered in hooks:
            for key in [key for key, hook in registered.items() if _is_of_torch(hook)]:
                del registered[key]
        for store, own, tensor in places:
            if tensor not in wholes:  # a tied one is one
                wholes[tensor] = _whole(tensor)
            store[own] = wholes[tensor]
        for wrapper in wrappers:
            wrapper.forward = wrapper.module.__call__  # type: ignore[method-assign]
        yield sharded
    finally:
        for wrapper in wrappers:
            vars(wrapper).pop("forward", None)
        for store, own, tensor in places:
            store[own] = tensor
        for registered, before in zip(hooks, kept, strict=True):
            added = {key: hook for key, hook in registered.items() if key not in before}
            registered.clear()
            registered.update({**before, **added})


def _whole(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(whole(tensor), requires_grad=tensor.requires_grad)
    return whole(tensor)


def _is_of_torch(hook: Any) -> bool:
    """Whether a hook belongs to fully_shard, parallelize_module, replicate or their like."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


def _refuse_flat_parameters(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise TypeError(
                f"{name or 'the model'!r} is a FullyShardedDataParallel, whose parameters are flat "
                "pieces without samples' gradients: fit before it is wrapped, or shard the model "
                "by torch.distributed.fsdp.fully_shard instead"
            )


def _check_members(name: str, p: Any, processes: Processes) -> None:
    holders = set(p.device_mesh.mesh.flatten().tolist())
    if len(holders) == 1:
        return
    if processes.group is False:
        raise ValueError(
            f"parameter {name!r} is sharded over {len(holders)} processes, and with "
            "process_group=False each would keep its part of another result: leave process_group "
            "None, or fit before the model is sharded"
        )
    missing = sorted(holders.difference(processes.ranks))
    if missing:
        raise ValueError(
            f"parameter {name!r} is sharded over processes that process_group lacks (rank "
            f"{missing[0]}), so that its parts would be of different data: pass a group that has "
            "them all, or None"
        )
