"""Bind and compile the launches of real steps, for a GPU that need not be there; run none.

Run as a script, without TRITON_INTERPRET: ``python launch_bindings.py`` prints a JSON object,
kernel -> how many versions of it were compiled over steps that differ in all but their kind.
"""

import json
import sys
from typing import Any

import torch
import triton
from fused_problem import make_problem
from triton.backends.compiler import GPUTarget

from ars.csrc_triton import launches as host
from ars.csrc_triton.control import control_kernel
from ars.csrc_triton.update import adam_kernel


class Driver:
    """As much of a driver as binding arguments and compiling need."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def bind(kernel: Any, grid: tuple[int], *args: Any, **options: Any) -> None:
    kernel.warmup(*args, grid=grid, **options, **host.OPTIONS)


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    host.launch, host.DEVICE_TYPE = bind, "cpu"
    problem = make_problem(
        "cpu", [torch.float32], [(5,), (6000,)], controller="conditioned", penalty="coupled",
        unpenalized=(0,), max_norm=1.0, group_count=2,
    )  # fmt: skip
    fused = problem.fused()
    losses = torch.rand(5)
    scaler = {"grad_scale": losses[:1], "found_inf": losses[:1]}
    for index in range(5):  # at any alignment
        problem.hyper *= 0.5
        scaler = dict.fromkeys(scaler, losses[index : index + 1])
        fused.step(problem.gradients(), loss=losses[index], clip=True, **scaler)
    misaligned = [torch.randn(p.numel() + 1)[1:].view_as(p) for p in problem.params]
    fused.step(misaligned, loss=losses[0], clip=True, **scaler)

    # Another model of the same kind, whatever its size.
    for shapes in ([(5,)] * 16, [(3,)], [(40000,), (7,)]):
        problem = make_problem(
            "cpu", [torch.float32], shapes, controller="conditioned", penalty="coupled",
            unpenalized=(0,) if len(shapes) > 1 else (), max_norm=1.0, group_count=2,
        )  # fmt: skip
        problem.fused().step(problem.gradients(), loss=losses[0], clip=True, **scaler)
    versions = {k.fn.__name__: len(k.device_caches[0][0]) for k in (adam_kernel, control_kernel)}
    json.dump(versions, sys.stdout)


if __name__ == "__main__":
    main()
