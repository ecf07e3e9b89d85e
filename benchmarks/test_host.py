"""Host time of a step around its kernels, by the number of tensors.

On a GPU: until the step returns, launches included. On a CPU the Triton path runs without its
kernels (the launch is replaced by nothing), which is all of the step that a faster GPU would not
hide; torch's figure there includes its kernels, on tensors of four elements.
"""

import time
from collections.abc import Callable

import pytest
import torch

from ars import ARSAdamW
from ars.csrc_triton import launches

COUNTS = (10, 1000, 10_000)
ROUNDS = 15


def host_seconds(optimizer: torch.optim.Optimizer, *, moved: bool, device: str) -> float:
    """Return the shortest time until a step returns: the others waited for something else."""
    params = optimizer.param_groups[0]["params"]
    seconds = []
    for index in range(ROUNDS + 3):
        if moved or index == 0:
            fresh = [torch.zeros_like(param) for param in params]  # while the old ones are there
            for param, gradient in zip(params, fresh, strict=True):
                param.grad = gradient
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return min(seconds[3:])


@pytest.fixture
def ours(device: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[torch.Tensor]], ARSAdamW]:
    """Return a function that makes our optimizer on the Triton path."""

    def make(params: list[torch.Tensor]) -> ARSAdamW:
        optimizer = ARSAdamW(params)
        if device == "cpu":
            monkeypatch.setattr(launches, "DEVICE_TYPE", "cpu")
            monkeypatch.setattr(launches, "launch", lambda *args, **options: None)
            optimizer._implementation = "triton"
        return optimizer

    return make


def test_host_time(ours, device, report):
    """Ours with the gradient norm watched, and AdamW(fused=True)."""
    rows = []
    for count in COUNTS:
        for name, make in (("ARSAdamW", ours), ("AdamW(fused=True)", torch_fused)):
            params = [torch.zeros(4, device=device, requires_grad=True) for _ in range(count)]
            optimizer = make(params)
            for moved in (False, True):
                seconds = host_seconds(optimizer, moved=moved, device=device)
                rows.append(
                    {
                        "candidate": name,
                        "tensors": count,
                        "gradients": "moved" if moved else "stable",
                        "us": round(seconds * 1e6, 1),
                        "us a tensor": round(seconds * 1e6 / count, 3),
                    }
                )
    report("host", rows)


def torch_fused(params: list[torch.Tensor]) -> torch.optim.Optimizer:
    """Make torch's optimizer."""
    return torch.optim.AdamW(params, fused=True)
