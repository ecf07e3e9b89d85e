"""One AdamW step against torch's and its peers: equal results first, then times taken in turns."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contest import PLAYED_BACK, Candidate, Contest
from problem import SETTINGS, SHAPES, Penalized, Shapes, Weights, check_equal
from step_peers import PEERS, missing, quiet

from ars import ARSAdamW, ARSConfig

pytestmark = PLAYED_BACK

BASELINE = "AdamW(fused=True)"
TORCH = {
    BASELINE: {"fused": True},
    "AdamW(foreach=False)": {"foreach": False},
    "AdamW(foreach=True)": {"foreach": True},
}
OURS = {
    "ARSAdamW(ars=None)": {"ars": None},
    "ARSAdamW, surprise = loss": {},
    "ARSAdamW, surprise = gradient norm": {"ars": ARSConfig(surprise="grad_norm")},
}
COMPILED = "torch.compile(AdamW(foreach=True).step)"
CLIPPING = "clip_grad_norm_ + AdamW(fused=True)"
OURS_CLIPPING = "ARSAdamW(max_grad_norm=1), surprise = loss"
AUTOGRAD = "EWC by autograd + AdamW(fused=True)"
OURS_EWC = "ARSAdamW(penalty=EWC)"
WITHOUT = "AdamW(fused=True) without a penalty"


def numel(shapes: Shapes) -> int:
    """Count the parameters."""
    return sum(map(math.prod, shapes))


def compared(
    run: Callable[[], object], ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer,
    **options: bool,
) -> Callable[[], dict[str, Any]]:  # fmt: skip
    """Return a check that takes a step and compares it with the baseline's."""

    def check() -> dict[str, Any]:
        run()
        return check_equal(ours, theirs, **options)

    return check


@pytest.fixture(scope="module", params=SHAPES)
def adamw(request, device, contest) -> Contest:
    """Plain AdamW, and the controller on it; the baseline is AdamW(fused=True)."""
    shapes = SHAPES[request.param]
    made: Contest = contest(f"adamw {request.param}", BASELINE, numel=numel(shapes))

    def params():
        return Weights(shapes, device).parameters()

    optimizers: dict[str, torch.optim.Optimizer] = {
        name: torch.optim.AdamW(params(), **options, **SETTINGS) for name, options in TORCH.items()
    }
    for name, (make, module) in PEERS.items():
        if reason := missing(module):
            made.left_out[name] = reason
        else:
            optimizers[name] = quiet(lambda make=make: make(params(), device, SETTINGS))
    for name, options in OURS.items():
        optimizers[name] = ARSAdamW(params(), **options, **SETTINGS)
    baseline = optimizers[BASELINE]
    baseline.step()
    loss = torch.tensor(1.0, device=device)
    for name, optimizer in optimizers.items():
        run = optimizer.step
        if name == "ARSAdamW, surprise = loss":
            run = lambda step=run: step(loss=loss)  # noqa: E731
        check = None
        if name in PEERS:
            first = lambda run=run: quiet(run)  # noqa: E731
            check = compared(first, optimizer, baseline, moments=False)
        elif name != BASELINE:
            check = compared(run, optimizer, baseline)
        norm = name == "ARSAdamW, surprise = gradient norm"
        made.candidates[name] = Candidate(run, check=check, bytes_moved=32.0 if norm else 28.0)
    return made


@pytest.mark.filterwarnings(
    "default"
)  # peers compile, and torch's compiler uses what is deprecated
@pytest.mark.parametrize("name", [*TORCH, *PEERS, *OURS])
def test_adamw(name, adamw, benchmark):
    adamw.play(name, benchmark)


@pytest.fixture(scope="module", params=list(SHAPES)[:1])
def compiled(request, device, contest) -> Contest:
    """torch.compile of torch's step; apart, as its compilation takes the longest of all."""
    shapes = SHAPES[request.param]
    made: Contest = contest(f"compiled {request.param}", BASELINE, numel=numel(shapes))
    baseline, theirs, ours = (Weights(shapes, device).parameters() for _ in range(3))
    fused = torch.optim.AdamW(baseline, fused=True, **SETTINGS)
    foreach = torch.optim.AdamW(theirs, foreach=True, **SETTINGS)
    plain = ARSAdamW(ours, ars=None, **SETTINGS)
    fused.step()
    run = torch.compile(foreach.step)
    made.candidates = {
        BASELINE: Candidate(fused.step, bytes_moved=28.0),
        COMPILED: Candidate(run, check=compared(run, foreach, fused), bytes_moved=28.0),
        "ARSAdamW(ars=None)": Candidate(
            plain.step, check=compared(plain.step, plain, fused), bytes_moved=28.0
        ),
    }
    return made


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler
@pytest.mark.parametrize("name", [BASELINE, COMPILED, "ARSAdamW(ars=None)"])
def test_compiled(name, compiled, benchmark):
    compiled.play(name, benchmark)


@pytest.fixture(scope="module", params=SHAPES)
def clipping(request, device, contest) -> Contest:
    """Clipping inside the step; the baseline is clip_grad_norm_, then AdamW(fused=True)."""
    shapes = SHAPES[request.param]
    made: Contest = contest(f"clipping {request.param}", CLIPPING, numel=numel(shapes))
    theirs, ours = Weights(shapes, device), Weights(shapes, device)
    adamw = torch.optim.AdamW(theirs.parameters(), fused=True, **SETTINGS)
    clipped = ARSAdamW(ours.parameters(), max_grad_norm=1.0, **SETTINGS)
    loss = torch.tensor(1.0, device=device)
    gradients = [weight.grad.clone() for weight in theirs.weights]

    def restore() -> None:  # torch scales in place, so that a second call would find none to clip
        for weight, gradient in zip(theirs.weights, gradients, strict=True):
            weight.grad.copy_(gradient)

    def by_torch() -> None:
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adamw.step()

    def by_us() -> None:
        clipped.step(loss=loss)

    by_torch()
    made.candidates = {
        CLIPPING: Candidate(by_torch, prepare=restore, bytes_moved=40.0),
        OURS_CLIPPING: Candidate(by_us, check=compared(by_us, clipped, adamw), bytes_moved=32.0),
    }
    return made


@pytest.mark.parametrize("name", [CLIPPING, OURS_CLIPPING])
def test_clipping(name, clipping, benchmark):
    clipping.play(name, benchmark)


@pytest.fixture(scope="module", params=SHAPES)
def ewc(request, device, contest) -> Contest:
    """AdamW with EWC; the baseline is the penalty by autograd, then AdamW(fused=True)."""
    shapes = SHAPES[request.param]
    made: Contest = contest(f"ewc {request.param}", AUTOGRAD, numel=numel(shapes))
    ours, theirs = Penalized(shapes, device), Penalized(shapes, device)
    fused = ARSAdamW(ours.parameters(), penalty=ours.penalty(), **SETTINGS)
    adamw = torch.optim.AdamW(theirs.parameters(), fused=True, **SETTINGS)
    plain = torch.optim.AdamW(Weights(shapes, device).parameters(), fused=True, **SETTINGS)
    loss = torch.tensor(1.0, device=device)

    def by_autograd() -> None:
        theirs.penalty_by_autograd().backward()
        adamw.step()

    def by_us() -> None:
        fused.step(loss=loss)

    value = theirs.penalty_by_autograd().item()
    by_autograd()

    def check() -> dict[str, Any]:
        by_us()
        assert float(fused.diagnostics["penalty"]) == pytest.approx(value, rel=1e-5)
        return check_equal(fused, adamw, parameters=False) | {"value of the penalty": value}

    made.candidates = {
        AUTOGRAD: Candidate(by_autograd, prepare=theirs.restore_gradients),
        OURS_EWC: Candidate(by_us, check=check, bytes_moved=36.0),
        WITHOUT: Candidate(plain.step, bytes_moved=28.0),
    }
    return made


@pytest.mark.parametrize("name", [AUTOGRAD, OURS_EWC, WITHOUT])
def test_ewc(name, ewc, benchmark):
    ewc.play(name, benchmark)
