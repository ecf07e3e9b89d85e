"""Several processes as one: what torchrun started them for, and what one process does without.

    torchrun --standalone --nproc_per_node=2 examples/miniseries.py --device cuda

Every process holds the whole model and steps it alike, or with ``--fsdp`` its part of every weight;
gradients and losses are averaged, and the windows of an evaluation and the sequences of a Fisher
pass divided. The first process alone writes and reads files and draws, and tells the others.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ars.models import GPT
from ars.sharded import is_sharded, whole
from common.errors import RunInterruptedError, UsageError
from common.program import StopRequest

__all__ = ["Parallel", "is_asked", "use_device"]

_Value = TypeVar("_Value")
_PATIENCE = timedelta(days=30)


class Parallel:
    """This process among all of a run.

    Without torchrun there is one, and nothing here does anything.

    Args:
        device: "cpu", "cuda" or "cuda:N"; with several processes each takes the one of its number.
        fsdp: divide models among the processes where there are several.
    """

    def __init__(self, device: str, *, fsdp: bool = False) -> None:
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.divides = fsdp and self.world_size > 1
        self.rank = int(os.environ.get("RANK", "0"))
        if self.world_size > 1 and device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        self.device = torch.device(device)
        if self.world_size > 1 and not dist.is_initialized():
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            _join("nccl" if self.device.type == "cuda" else "gloo")
        if self.world_size > 1:
            # What the first process does alone, such as reading a text, can take longer than the
            # minutes after which a collective operation of the training is given up.
            self._waiting = dist.new_group(backend="gloo", timeout=_PATIENCE)

    @property
    def is_first(self) -> bool:
        """Whether this process writes and draws."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, averaging gradients over the processes where there are several."""
        if self.world_size == 1 or self.divides:
            return model
        return nn.parallel.DistributedDataParallel(model)

    def divide(self, model: GPT) -> GPT:
        """Divide a model's weights among the processes if that is asked for, a block at a time.

        Args:
            model: the same in every process; changed in place.
        """
        if self.divides and not any(map(is_sharded, model.parameters())):
            from torch.distributed.fsdp import fully_shard

            for block in model.blocks:
                fully_shard(block)
            fully_shard(model)
        return model

    def gathered(self, content: Any) -> Any:
        """Gather the divided tensors of nested dicts and lists, for the first process to save.

        Args:
            content: of all processes alike; what is no divided tensor stays as it is.

        Returns:
            The same with whole tensors on the CPU; with none in the other processes.
        """
        if isinstance(content, dict):
            return {key: self.gathered(value) for key, value in content.items()}
        if isinstance(content, list):
            return [self.gathered(value) for value in content]
        if not is_sharded(content):
            return content
        found = whole(content)
        return found.cpu() if self.is_first else None

    def part(self, count: int) -> slice:
        """Which of some things are this process's: each is one's, as many as another's or one more.

        Args:
            count: how many there are for all.
        """
        return slice(
            count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size
        )

    def sum(self, value: Tensor) -> Tensor:
        """Sum of a tensor over the processes, the same bits in each; ``value`` is overwritten."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over the processes, the same bits in each; ``value`` is overwritten."""
        return self.sum(value).div_(self.world_size)

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process: all learn it at the same point."""
        if self.world_size == 1:
            return flag
        found = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found.item())

    def leave_together(self, stop: StopRequest) -> None:
        """Leave the run in all processes if a signal has arrived at any.

        Raises:
            RunInterruptedError: it has.
        """
        if self.any(is_asked(stop)):
            stop.leave()

    def from_first(self, work: Callable[[], _Value]) -> _Value:
        """Let the first process do something and tell the others what came of it.

        Args:
            work: whose result can be pickled.

        Raises:
            OSError: it raised one; in every process, as the next.
            UsageError: it raised one.
        """
        if self.world_size == 1:
            return work()
        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told[0] = work()
            except (UsageError, OSError) as error:
                told[1] = error
        dist.broadcast_object_list(told, group=self._waiting)
        if told[1] is not None:
            raise told[1]
        result: _Value = told[0]
        return result

    def close(self) -> None:
        """Take leave of the other processes."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _join(backend: str) -> None:
    """Meet the other processes.

    When torchrun starts them again after one has died, the store still has the addresses of those
    that were there before, so each attempt keeps its own apart.
    """
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, world_size = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def is_asked(stop: StopRequest) -> bool:
    """Whether a signal has arrived at this process, which is left to leave at a better moment."""
    try:
        stop.check()
    except RunInterruptedError:
        return True
    return False


def use_device(name: str, option: str = "--device") -> None:
    """Check that a device is there, for every process that torchrun has started here.

    Args:
        name: "cpu", "cuda" or "cuda:N".
        option: that named it.

    Raises:
        UsageError: it is unknown or not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"{option} {name} is unknown: use cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(
                f"{option} {name} is not available (CUDA devices found: {count}): use {option} cpu"
            )
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if processes > 1 and device.index is not None:
            raise UsageError(
                f"{option} {name} is one for {processes} processes: use {option} cuda, of which "
                "each takes its own"
            )
        if processes > count:
            raise UsageError(
                f"{option} {name} has {count} for {processes} processes: start at most {count}"
            )
