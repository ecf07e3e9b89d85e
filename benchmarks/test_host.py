"""Host time of a step around its kernels, by the number of tensors.

On a GPU: until the step returns, launches included. On a CPU the Triton path runs without its
kernels (the launch is replaced by nothing), which is all of the step that a faster GPU would not
hide; torch's figure there includes its kernels, on tensors of four elements.
"""

from collections.abc import Callable

import pytest
import torch
from contest import PLAYED_BACK, Candidate, Contest

from ars import ARSAdamW, ARSConfig
from ars.csrc_triton import launches

pytestmark = PLAYED_BACK

COUNTS = (10, 1000, 10_000)
ROUNDS = 15  # of which the shortest counts: the others waited for something else
BASELINE = "AdamW(fused=True)"


def make_ours(params: list[torch.Tensor], device: str) -> ARSAdamW:
    """Make our optimizer on the Triton path, the gradient norm watched."""
    optimizer = ARSAdamW(params, ars=ARSConfig(surprise="grad_norm"))
    if device == "cpu":
        optimizer._implementation = "triton"
    return optimizer


def make_torch(params: list[torch.Tensor], device: str) -> torch.optim.Optimizer:
    """Make torch's optimizer."""
    del device
    return torch.optim.AdamW(params, fused=True)


def give_gradients(params: list[torch.Tensor]) -> None:
    """Set gradients at new addresses."""
    fresh = [torch.zeros_like(param) for param in params]  # while the old ones are there
    for param, gradient in zip(params, fresh, strict=True):
        param.grad = gradient


@pytest.fixture(scope="module")
def without_launches(device: str):
    """Launch nothing where there is no GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            patch.setattr(launches, "DEVICE_TYPE", "cpu")
            patch.setattr(launches, "launch", lambda *args, **options: None)
        yield


@pytest.fixture(scope="module", params=[False, True], ids=["stable", "moved"])
def moved(request) -> bool:
    """Say whether the gradients are at new addresses in each step."""
    return request.param


@pytest.fixture(scope="module", params=COUNTS)
def host(request, moved, device, contest, without_launches) -> Contest:
    """A step around its kernels; the two are not compared, as ours computes nothing on a CPU."""
    which = "moved" if moved else "stable"
    made: Contest = contest(f"host {request.param} tensors, gradients {which}", BASELINE)
    made.rounds = max(made.rounds, ROUNDS)
    made.count_costs = made.wait = False
    makers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        BASELINE: make_torch,
        "ARSAdamW": make_ours,
    }
    for name, make in makers.items():
        params = [torch.zeros(4, device=device, requires_grad=True) for _ in range(request.param)]
        give_gradients(params)
        made.candidates[name] = Candidate(
            make(params, device).step,
            prepare=(lambda params=params: give_gradients(params)) if moved else None,
        )
    return made


@pytest.mark.parametrize("name", [BASELINE, "ARSAdamW"])
def test_host_time(name, host, benchmark):
    host.play(name, benchmark)
