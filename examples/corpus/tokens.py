"""Tokens on disk, read through the page cache: nothing is loaded whole."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Tokens"]


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
