r"""Several processes that fit one estimate, each on data of its own.

    sum over all samples = sum_r (sum over the samples of process r)

Every estimate here is a sum over samples divided by a count. So each process adds up its own
samples, and one reduction at the end gives all of them the same bits, whatever number of samples
each has had. Nothing is exchanged before, but for the parameters of a sharded model
(:mod:`ars.regularizers.fisher.gathered`).
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ars.sharded import Group, checked_group

__all__ = ["Group", "Processes"]

_Facts = TypeVar("_Facts")
_SPREAD = 2**32 + 15  # between the seeds of two ranks; any odd number would do


class Processes:
    """The processes whose samples are added up.

    Args:
        group: A process group; None: torch's default group, wherever ``torch.distributed`` is
            initialised; False: this process alone.

    Raises:
        TypeError: It is something else, or a group that this process is not in.
    """

    def __init__(self, group: Group) -> None:
        self.group = checked_group(group)
        self.is_lost = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Processes":
        return Processes(self.group)  # a group is not copied

    def __getstate__(self) -> dict[str, Any]:
        """Pickle all but a group of the user's, which cannot be."""
        named = self.group is not None and self.group is not False
        return {"group": None if named else self.group, "is_lost": named or self.is_lost}

    @property
    def count(self) -> int:
        """How many they are.

        Raises:
            RuntimeError: This was pickled, and a process group was left behind.
        """
        if self.is_lost:
            raise RuntimeError(
                "a pickle cannot hold the process_group that this estimate had: make another with "
                "process_group, and fit that"
            )
        if self.group is False:
            return 1
        if self.group is None and not (distributed.is_available() and distributed.is_initialized()):
            return 1
        return distributed.get_world_size(self.group)

    @property
    def ranks(self) -> list[int]:
        """Their numbers in the default group, in the order of the group."""
        assert self.group is not False
        return distributed.get_process_group_ranks(self.group)

    def generator(self, device: torch.device) -> torch.Generator | None:
        """Return a source of random numbers that differ from process to process.

        Replicas are often seeded alike. The same signs for the samples of all would leave the
        estimate unbiased, but with the noise of fewer draws.

        Args:
            device: Where the numbers are drawn; torch's own generator there is advanced.

        Returns:
            None, for torch's own, if this process is alone.
        """
        if self.count == 1:
            return None
        seed = int(torch.randint(2**62, (), device=device)) + _SPREAD * distributed.get_rank()
        return torch.Generator(device).manual_seed(seed % 2**63)

    def each(self, work: Callable[[], _Facts]) -> list[_Facts]:
        """Do this process's part of the work, and learn what came of the others'.

        Args:
            work: Exchanges nothing. What it returns can be pickled.

        Returns:
            What every process's work returned, in the order of the group.

        Raises:
            Exception: What this process's work raised.
            RuntimeError: Another process's work raised something, so that it has no sum to add.
        """
        if self.count == 1:
            return [work()]
        facts, error = None, None
        try:
            facts = work()
        except Exception as raised:  # the others must not wait for this one's sums
            error = raised
        told: list[Any] = [None] * self.count
        failure = None if error is None else f"{type(error).__name__}: {error}"
        distributed.all_gather_object(told, (facts, failure), group=self.group)
        if error is not None:
            raise error
        for rank, (_, failure) in zip(self.ranks, told, strict=True):
            if failure is not None:
                raise RuntimeError(f"rank {rank} could not fit its samples, so none can: {failure}")
        return [each for each, _ in told]

    def agreed(self, parts: list[dict[str, Any]], *, everywhere: bool) -> dict[str, Any]:
        """Join what the processes say of sums by name, before they are added up.

        Args:
            parts: Of each process, in the order of the group.
            everywhere: Whether all must have the same names.

        Returns:
            All names that any of them has.

        Raises:
            ValueError: Two of them say different things of one name; names it.
        """
        joined = {name: said for part in parts for name, said in part.items()}
        for number, part in enumerate(parts):
            for name, said in joined.items():
                if part.get(name, None if everywhere else said) != said:
                    raise ValueError(
                        f"rank {self.ranks[number]} does not have the {name!r} that another rank "
                        "has: give all of process_group the same model, or pass process_group=False"
                    )
        return joined

    def add_up_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, the same bits in each.

        Args:
            tensors: As many in every process, of the same shapes and dtypes.
        """
        if self.count == 1:
            return
        for tensor in tensors:
            place = self._exchange_device(tensor.device)
            total = tensor.to(place)
            distributed.all_reduce(total, group=self.group)
            if total is not tensor:
                tensor.copy_(total)

    def _exchange_device(self, device: torch.device) -> torch.device:
        """Return the device, or another one that the group can exchange tensors of."""
        group = None if self.group is False else self.group
        backends = distributed.get_backend_config(group).split(",")  # as in "cpu:gloo,cuda:nccl"
        kinds = [backend.partition(":")[0] for backend in backends]
        return device if device.type in kinds else torch.device(kinds[0])
