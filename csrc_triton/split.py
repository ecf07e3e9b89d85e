"""How the tensors of a step are split into launches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
import triton.language as tl
from torch import Tensor

from ars.csrc_triton.layout import Operands
from ars.csrc_triton.rounding import MASTER, NEAREST, STOCHASTIC
from ars.csrc_triton.tiles import tile_map

__all__ = ["TRITON_DTYPES", "Controller", "Launch", "split_launches"]

Pair: TypeAlias = tuple[torch.dtype, torch.dtype]

TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}


class Controller(NamedTuple):
    """The state and constants of a controller, on the device."""

    window: Tensor  # (W,) float64, ring buffer, written in place
    counts: Tensor  # (2,) int64, surprises written and steps taken, written in place
    gate_state: Tensor  # (5,) float64, see layout.GateState, written in place
    config: Tensor  # (10,) float64, see layout.Config
    seed: int
    gate: tuple[str, ...]  # what Phi multiplies: some of betas, lr, grad
    standardize: bool
    detrend: bool


@dataclass(frozen=True)
class Launch:
    """What distinguishes the launches of one step: their tensors, and what these have in common."""

    tiles: Tensor  # (programs, 2) int32, see tiles.py
    first_partial: int  # of its programs' partial sums, among those of all launches
    param: torch.dtype
    moment: torch.dtype
    anchor: torch.dtype
    importance: torch.dtype
    amsgrad: bool
    penalized: bool
    pulled: bool
    rounding: int  # see rounding.py


def split_launches(tensors: Sequence[Operands], device: torch.device) -> list[Launch]:
    """Split the tensors into launches, in order of appearance: one for each parameter dtype.

    Amsgrad in some groups only doubles that, as would remainders. A parameter without a penalty
    shares a launch with those that have one; penalties stored in several pairs of dtypes cost a
    launch for each pair.
    """
    classes: dict[tuple[torch.dtype, bool, bool], dict[Pair | None, list[int]]] = {}
    for index, one in enumerate(tensors):
        anchor, importance = one.anchor, one.importance
        pair = None if anchor is None or importance is None else (anchor.dtype, importance.dtype)
        kind = (one.param.dtype, one.max_exp_avg_sq is not None, one.remainder is not None)
        classes.setdefault(kind, {}).setdefault(pair, []).append(index)

    launches: list[Launch] = []
    first_partial = 0
    for (dtype, amsgrad, mastered), members in classes.items():
        free = members.pop(None, [])
        for pair, penalized in list(members.items()) or [(None, [])]:
            indices = sorted(penalized + free)
            free = []
            moment = tensors[indices[0]].exp_avg.dtype
            rounding = STOCHASTIC if moment == torch.bfloat16 else MASTER if mastered else NEAREST
            anchor_dtype, importance_dtype = pair or (moment, moment)
            numels = [tensors[index].param.numel() for index in indices]
            launches.append(
                Launch(
                    tiles=tile_map(numels, indices, device),
                    first_partial=first_partial,
                    param=dtype,
                    moment=moment,
                    anchor=anchor_dtype,
                    importance=importance_dtype,
                    amsgrad=amsgrad,
                    penalized=pair is not None,
                    pulled=any(tensors[index].pull is not None for index in indices),
                    rounding=rounding.value,
                )
            )
            first_partial += len(launches[-1].tiles)
    return launches
