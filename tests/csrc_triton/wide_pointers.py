"""Record which pointers the kernels promise to be divisible by 16, with one operand misaligned.

Run as a script, with TRITON_INTERPRET=1: ``python wide_pointers.py`` prints a JSON object, the
misaligned operand -> the remainders by 16 of the addresses promised, and how many there were, in
the step and in the norm.
"""

import json
import sys
from typing import Any

import torch
from fused_problem import Problem, make_problem
from torch import Tensor

from ars.csrc_triton import adam, control
from ars.csrc_triton.tiles import TILE

OPERANDS = (
    "params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "anchors", "importances", "pulls",
    "remainders",
)  # fmt: skip


def misaligned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].copy_(tensor)


def recording(module: Any, promised: list[int]) -> Any:
    """Make a module note the address modulo 16 of every pointer it calls wide; return the old."""
    original = module.pointer

    def pointer(address: Any, dtype: Any, wide: bool, **options: Any) -> Any:
        if wide:
            promised.append(int(address.handle.data[0]) % 16)
        return original(address, dtype, wide, **options)

    module.pointer = pointer
    return original


def record(problem: Problem, grads: list[Tensor]) -> list[list[int]]:
    """Take a step; return what the step and the norm noted."""
    reports: list[list[int]] = [[], []]
    modules = (adam, control)
    originals = list(map(recording, modules, reports))
    try:
        problem.fused().step(grads, loss=None, clip=True)
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.pointer = original
    return reports


def main() -> None:
    found = {}
    for name in ("nothing", "grads", *OPERANDS):
        problem = make_problem(
            "cpu", [torch.bfloat16], [(TILE + 7,)], amsgrad=True, penalty="proximal",
            max_norm=1.0, pulled=(0,), master=True,
        )  # fmt: skip
        grads = problem.gradients()
        if name == "grads":
            grads = [misaligned(grads[0])]
        elif name != "nothing":
            setattr(problem, name, [misaligned(getattr(problem, name)[0])])
        reports = record(problem, grads)
        found[name] = [(sorted(set(report)), len(report)) for report in reports]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
