"""Tokens on disk, and which of them a step sees.

They are read through the page cache: nothing is loaded whole. The order is a pure function of a
name and a number, so a cursor is one number.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Tokens", "batch", "rows_per_epoch", "validation_windows"]


class Tokens:
    """One long sequence of tokens that lies in several arrays.

    Args:
        shards: one-dimensional arrays of unsigned integers, such as memory maps, in order.

    Example:
        >>> tokens = Tokens([np.arange(3, dtype=np.uint8), np.arange(3, 9, dtype=np.uint8)])
        >>> len(tokens)
        9
        >>> tokens.windows(torch.tensor([0, 1]), 4)
        tensor([[0, 1, 2, 3],
                [1, 2, 3, 4]])
    """

    def __init__(self, shards: Sequence[npt.NDArray[Any]]) -> None:
        # Plain views: slicing a numpy.memmap costs several times what slicing an ndarray does.
        self._shards = [np.asarray(shard) for shard in shards if shard.size]
        self._starts = [0]
        for shard in self._shards:
            self._starts.append(self._starts[-1] + shard.size)

    def __len__(self) -> int:
        return self._starts[-1]

    def windows(self, starts: Tensor, length: int) -> Tensor:
        """Copy windows out, across the borders of shards too.

        Args:
            starts: (B,) integers, index of each window's first token.
            length: tokens a window.

        Returns:
            (B, length) int64 on the CPU.

        Raises:
            IndexError: a window reaches out of the sequence.
        """
        rows = np.empty((starts.numel(), length), dtype=np.int64)
        for row, start in zip(rows, starts.tolist(), strict=True):
            if start < 0 or start + length > len(self):
                raise IndexError(
                    f"window [{start}, {start + length}) reaches out of {len(self)} tokens"
                )
            shard = bisect_right(self._starts, start) - 1
            filled = 0
            while filled < length:
                offset = start + filled - self._starts[shard]
                part = self._shards[shard][offset : offset + length - filled]
                row[filled : filled + part.size] = part
                filled += part.size
                shard += 1
        return torch.from_numpy(rows)


def rows_per_epoch(count: int, sequence_len: int) -> int:
    """Rows of T inputs that an epoch over N tokens has: N // T - 1, so that any offset fits.

    Args:
        count: N, at least T + 1.
        sequence_len: T.

    Raises:
        ValueError: there are too few tokens for a row and its targets.

    Example:
        >>> rows_per_epoch(1001, 10)
        99
    """
    if count < sequence_len + 1:
        raise ValueError(f"{count} tokens hold no row of {sequence_len} and its targets")
    return max(1, count // sequence_len - 1)


@lru_cache(maxsize=4)  # the training's and the Fisher pass's, each at the border of two epochs
def _epoch(stream: str, epoch: int, count: int, sequence_len: int) -> Tensor:
    """First tokens of the rows of an epoch, (n,) int64, in the order in which they are seen."""
    digest = hashlib.sha256(f"{stream} epoch {epoch}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    rows = rows_per_epoch(count, sequence_len)
    # Offsets [0, T), or fewer where a text of less than two rows leaves no room for them.
    offsets = min(sequence_len, count - rows * sequence_len)
    offset = torch.randint(offsets, (), generator=generator, device="cpu")
    order = torch.randperm(rows, generator=generator, device="cpu")
    return order.mul_(sequence_len).add_(offset)


def batch(
    tokens: Tokens,
    *,
    stream: str,
    step: int,
    batch_size: int,
    sequence_len: int,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[Tensor, Tensor]:
    """The batch of one step.

    Sample j of a stream is row j mod n of epoch j // n. An epoch cuts the tokens into n rows that
    share no target, from an offset of its own so that the same cuts do not recur, and shuffles
    them: each is seen exactly once. Step s of rank r has the samples
    s B W + r B, ..., s B W + r B + B - 1, so W processes with batches of B see together what one
    with batches of B W sees.

    Args:
        tokens: to draw from.
        stream: names the order, such as ``"train 0"`` for seed 0.
        step: s, index in that order.
        batch_size: B, of this process.
        sequence_len: T.
        rank: r, of this process.
        world_size: W, number of processes.

    Returns:
        Inputs and targets, each (B, T) int64; the targets are the inputs moved on by one token.

    Raises:
        ValueError: there are too few tokens for a row.

    Example:
        >>> tokens = Tokens([torch.arange(100, dtype=torch.uint8).numpy()])
        >>> inputs, targets = batch(tokens, stream="s", step=3, batch_size=2, sequence_len=8)
        >>> torch.equal(targets, inputs + 1)
        True
    """
    rows = rows_per_epoch(len(tokens), sequence_len)
    first = (step * world_size + rank) * batch_size
    starts: list[Tensor] = []
    while batch_size > 0:
        epoch, row = divmod(first, rows)
        part = _epoch(stream, epoch, len(tokens), sequence_len)[row : row + batch_size]
        starts.append(part)
        first += part.numel()
        batch_size -= part.numel()
    windows = tokens.windows(torch.cat(starts), sequence_len + 1)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def validation_windows(tokens: Tokens, sequence_len: int, most: int) -> Tensor:
    """Evenly spread windows that do not share a target token.

    Args:
        tokens: M of them.
        sequence_len: T.
        most: how many windows at most.

    Returns:
        (n, T + 1) int64 with n = min(most, (M - 1) // T).
    """
    available = (len(tokens) - 1) // sequence_len
    count = min(most, available)
    chosen = torch.arange(count, device="cpu") * available // max(1, count)
    return tokens.windows(chosen * sequence_len, sequence_len + 1)
