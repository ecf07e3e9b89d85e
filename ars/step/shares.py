"""Parameters that are parts of a model's without saying so, as a DTensor would.

``FullyShardedDataParallel`` leaves a process flat pieces, ``ZeroRedundancyOptimizer`` some of the
parameters. What is made of all of them, a norm or a penalty's value, would be that of a share.
"""

import sys
from types import FrameType
from typing import Any

from torch import Tensor, distributed

__all__ = ["check_share", "engine_of"]


def engine_of(params: list[Tensor]) -> str | None:
    """Return the name of the engine that has given an optimizer its share, None where it is all.

    To be called where an optimizer is made: ``ZeroRedundancyOptimizer`` makes it.

    Args:
        params: The optimizer's parameters.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    if distributed.get_world_size() == 1:
        return None
    if any(getattr(param, "_fsdp_flattened", False) for param in params):
        return "FullyShardedDataParallel"
    engines: Any = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame: FrameType | None = sys._getframe() if engines is not None else None
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), engines.ZeroRedundancyOptimizer):
            return "ZeroRedundancyOptimizer"
        frame = frame.f_back
    return None


def check_share(engine: str, *, norm: bool, penalty: bool, alone: bool) -> None:
    """Raise where a step would take something of a share for that of the whole model.

    Args:
        engine: What :func:`engine_of` returned.
        norm: Whether the step needs the norm of the gradients, to watch it or to clip by it.
        penalty: Whether it has a penalty.
        alone: Whether the process gates by its own surprise.

    Raises:
        RuntimeError: It would; names the remedy.
    """
    remedies = {
        "the norm of the gradients": norm and "pass step(loss=loss), and do not set max_grad_norm",
        "a penalty": penalty and "add penalty.value() to the loss of a model under DDP",
        "a surprise of its own": alone and "leave process_group None",
    }
    for what, remedy in remedies.items():
        if remedy:
            raise RuntimeError(
                f"under {engine} this optimizer holds a share of the parameters, which cannot "
                f"have {what}: {remedy}, or divide the model by fully_shard, whose shards it knows"
            )
