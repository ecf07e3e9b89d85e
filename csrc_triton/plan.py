"""What a step works on, and how its tensors are split into launches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
import triton.language as tl
from torch import Tensor

from ars.csrc_triton.layout import Table
from ars.csrc_triton.rounding import MASTER, NEAREST, STOCHASTIC
from ars.csrc_triton.tiles import addresses, tile_map

__all__ = ["TRITON_DTYPES", "Controller", "Launch", "Operands", "plan_launches"]

Pair: TypeAlias = tuple[torch.dtype, torch.dtype]

TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}


class Operands(NamedTuple):
    """The tensors of the steps, gradients apart; entry i of every list belongs to parameter i."""

    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: Sequence[Tensor | None] | None
    steps: list[Tensor]
    products: list[Tensor] | None
    anchors: Sequence[Tensor | None] | None
    importances: Sequence[Tensor | None] | None
    remainders: Sequence[Tensor | None] | None = None
    pulls: Sequence[Tensor | None] | None = None
    scales: Sequence[Tensor | None] | None = None
    products_steps: list[Tensor] | None = None

    def addresses(self) -> dict[Table, list[int]]:
        """Where all of them are."""
        operands: dict[Table, Sequence[Tensor | None] | None] = {
            Table.PARAM: self.params,
            Table.EXP_AVG: self.exp_avgs,
            Table.EXP_AVG_SQ: self.exp_avg_sqs,
            Table.MAX_EXP_AVG_SQ: self.max_exp_avg_sqs,
            Table.ANCHOR: self.anchors,
            Table.IMPORTANCE: self.importances,
            Table.STEP: self.steps,
            Table.PRODUCTS: self.products,
            Table.PRODUCTS_STEP: self.products_steps,
            Table.REMAINDER: self.remainders,
            Table.PULL: self.pulls,
            Table.SCALE: self.scales,
        }
        count = len(self.params)
        return {column: addresses(tensors, count) for column, tensors in operands.items()}


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


def plan_launches(operands: Operands, device: torch.device) -> list[Launch]:
    """Split the tensors into launches, in order of appearance: one for each parameter dtype.

    Amsgrad in some groups only doubles that, as would remainders. A parameter without a penalty
    shares a launch with those that have one; penalties stored in several pairs of dtypes cost a
    launch for each pair.
    """
    params = operands.params
    absent = [None] * len(params)
    classes: dict[tuple[torch.dtype, bool, bool], dict[Pair | None, list[int]]] = {}
    for index, (param, largest, remainder, anchor, importance) in enumerate(
        zip(
            params,
            operands.max_exp_avg_sqs or absent,
            operands.remainders or absent,
            operands.anchors or absent,
            operands.importances or absent,
            strict=True,
        )
    ):
        pair = None if anchor is None or importance is None else (anchor.dtype, importance.dtype)
        kind = (param.dtype, largest is not None, remainder is not None)
        members = classes.setdefault(kind, {})
        members.setdefault(pair, []).append(index)

    launches: list[Launch] = []
    first_partial = 0
    pulls = operands.pulls or absent
    for (dtype, amsgrad, mastered), members in classes.items():
        free = members.pop(None, [])
        for pair, penalized in list(members.items()) or [(None, [])]:
            tensors = sorted(penalized + free)
            free = []
            moment = operands.exp_avgs[tensors[0]].dtype
            rounding = STOCHASTIC if moment == torch.bfloat16 else MASTER if mastered else NEAREST
            anchor_dtype, importance_dtype = pair or (moment, moment)
            launches.append(
                Launch(
                    tiles=tile_map([params[index].numel() for index in tensors], tensors, device),
                    first_partial=first_partial,
                    param=dtype,
                    moment=moment,
                    anchor=anchor_dtype,
                    importance=importance_dtype,
                    amsgrad=amsgrad,
                    penalized=pair is not None,
                    pulled=any(pulls[index] is not None for index in tensors),
                    rounding=rounding.value,
                )
            )
            first_partial += len(launches[-1].tiles)
    return launches
