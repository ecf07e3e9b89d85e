"""Host tables that let one launch cover any number of tensors.

A kernel finds its work in two steps: program -> (tensor, tile), then tensor -> addresses. Both
tables are built once. Gradients move after ``zero_grad(set_to_none=True)``, so their addresses are
a table of their own that is uploaded again when, and only when, one of them changed.
"""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ars.csrc_triton.layout import Operands

# Elements per program. One program's table look-ups, ticket and partial sum serve 4096 elements
# (112 kB of fp32 traffic), and a million elements still make 256 programs.
TILE = 4096
# Steps that can be captured in CUDA graphs without one outside of a capture in between.
CAPTURES = 8


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device without making the host wait for it."""
    if device.type == "cpu":
        return values
    # The pinned copy may be dropped at once: torch keeps its block until the transfer is done.
    return values.pin_memory().to(device, non_blocking=True)


def tile_map(numels: list[int], tensors: list[int], device: torch.device) -> Tensor:
    """Map each program to its (tensor, tile), shape (programs, 2), int32.

    Args:
        numels: Elements of each of the launch's tensors, in order.
        tensors: Row of each of them in the address table.
        device: Where the map goes.

    Returns:
        The map. A launch of empty tensors has one program, which finds nothing to do.
    """
    counts = (torch.tensor(numels, device="cpu") + TILE - 1) // TILE
    if not counts.any():
        counts[0] = 1
    ends = counts.cumsum(0)
    tensor = torch.tensor(tensors, device="cpu").repeat_interleave(counts)
    tile = torch.arange(int(ends[-1]), device="cpu") - (ends - counts).repeat_interleave(counts)
    return upload(torch.stack((tensor, tile), 1).to(torch.int32), device)


def address_table(
    tensors: Sequence[Operands], groups: list[int], numbers: list[int], device: torch.device
) -> Tensor:
    """Return the table of :class:`~ars.csrc_triton.layout.Table`, shape (tensors, columns)."""
    columns = [
        [0 if tensor is None else tensor.data_ptr() for tensor in column]
        for column in zip(*tensors, strict=True)
    ]
    columns += [[one.param.numel() for one in tensors], groups, numbers]
    return upload(torch.tensor(columns, dtype=torch.int64, device="cpu").T.contiguous(), device)


class GradientTable:
    """Device addresses of the gradients, shape (tensors,), int64, refreshed when they moved.

    A CUDA graph keeps reading the addresses it was captured with, whatever is uploaded afterwards,
    so a capture gets a table of its own, filled by a copy that is part of the graph. Its pinned
    source is set aside beforehand, because pinned memory cannot be had during a capture: enough
    for some captures, and for as many again at the next step outside of one.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.uploads = 0  # uploads so far, captures not counted
        self._addresses: list[int] | None = None
        self._table = torch.empty(count, dtype=torch.int64, device=device)
        self._captured: list[tuple[Tensor, Tensor]] = []
        self._spares = self._pinned()

    def _pinned(self) -> list[Tensor]:
        shape = (CAPTURES, len(self._table))
        pinned = self._table.is_cuda
        return list(torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=pinned))

    def needs_upload(self, addresses: list[int]) -> bool:
        """Whether any gradient is elsewhere than in the last uploaded table."""
        return addresses != self._addresses

    def refresh(self, addresses: list[int]) -> Tensor:
        """Return a table of these addresses, for the launches of one step.

        Raises:
            RuntimeError: During one CUDA-graph capture too many without an eager step before it.
        """
        if self._table.is_cuda and torch.cuda.is_current_stream_capturing():
            if not self._spares:
                raise RuntimeError(
                    f"{CAPTURES} steps were captured; take one step outside of a capture before "
                    "capturing another"
                )
            source = self._spares.pop()
            source.copy_(torch.tensor(addresses, dtype=torch.int64, device="cpu"))
            table = torch.empty_like(self._table)
            table.copy_(source, non_blocking=True)
            self._captured.append((source, table))
            return table
        if not self._spares:
            self._spares = self._pinned()
        if self.needs_upload(addresses):
            values = torch.frombuffer(array("q", addresses), dtype=torch.int64)
            values = values.pin_memory() if self._table.is_cuda else values
            self._table.copy_(values, non_blocking=True)
            self._addresses = addresses
            self.uploads += 1
        return self._table
