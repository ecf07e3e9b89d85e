"""One AdamW step against torch's and its peers: equal results first, then medians and ratios."""

import importlib.util
import math

import pytest
import torch
from problem import SETTINGS, SHAPES, Penalized, Weights, check_equal, measure

from ars import ARSAdamW

BASELINE = "AdamW(fused=True)"


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_adamw(shapes, device, copy_bandwidth, report, request):
    """Plain AdamW, and the controller on it; the baseline is AdamW(fused=True)."""
    peers = {
        "AdamW(foreach=False)": {"foreach": False},
        "AdamW(foreach=True)": {"foreach": True},
        BASELINE: {"fused": True},
    }
    optimizers: dict[str, torch.optim.Optimizer] = {
        name: torch.optim.AdamW(Weights(shapes, device).parameters(), **options, **SETTINGS)
        for name, options in peers.items()
    }
    if importlib.util.find_spec("optimi") is not None:
        from optimi import AdamW

        optimizers["optimi.AdamW"] = AdamW(
            Weights(shapes, device).parameters(), eps=1e-8, **SETTINGS
        )
    optimizers |= {
        name: ARSAdamW(Weights(shapes, device).parameters(), **options, **SETTINGS)
        for name, options in {
            "ARSAdamW(ars=None)": {"ars": None},
            "ARSAdamW, surprise = loss": {},
            "ARSAdamW, surprise = gradient norm": {},
        }.items()
    }
    loss = torch.tensor(1.0, device=device)
    candidates = {name: optimizer.step for name, optimizer in optimizers.items()}
    with_loss = optimizers["ARSAdamW, surprise = loss"]
    candidates["ARSAdamW, surprise = loss"] = lambda: with_loss.step(loss=loss)
    for run in candidates.values():
        run()
    for name, optimizer in optimizers.items():
        check_equal(optimizer, optimizers[BASELINE], moments=not name.startswith("optimi"))

    bytes_moved = dict.fromkeys(candidates, 28.0)
    bytes_moved["ARSAdamW, surprise = gradient norm"] += 4
    rows = measure(
        candidates, BASELINE, bytes_moved, numel=sum(map(math.prod, shapes)),
        device=device, copy_bandwidth=copy_bandwidth,
    )  # fmt: skip
    report(f"adamw {request.node.callspec.id}".replace(" ", "-"), rows)


@pytest.mark.filterwarnings("default")  # torch's compiler uses what torch has deprecated
@pytest.mark.parametrize("shapes", list(SHAPES.values())[:1], ids=list(SHAPES)[:1])
def test_compiled(shapes, device, copy_bandwidth, report, request):
    """torch.compile of torch's step; apart, as its compilation takes the longest of all."""
    optimizers = {
        "compiled": torch.optim.AdamW(
            Weights(shapes, device).parameters(), foreach=True, **SETTINGS
        ),
        BASELINE: torch.optim.AdamW(Weights(shapes, device).parameters(), fused=True, **SETTINGS),
        "ARSAdamW(ars=None)": ARSAdamW(Weights(shapes, device).parameters(), ars=None, **SETTINGS),
    }
    compiled = torch.compile(optimizers["compiled"].step)
    candidates = {
        "torch.compile(AdamW(foreach=True).step)": compiled,
        BASELINE: optimizers[BASELINE].step,
        "ARSAdamW(ars=None)": optimizers["ARSAdamW(ars=None)"].step,
    }
    for run in candidates.values():
        run()
    check_equal(optimizers["compiled"], optimizers[BASELINE])
    rows = measure(
        candidates, BASELINE, dict.fromkeys(candidates, 28.0),
        numel=sum(map(math.prod, shapes)),
        device=device, copy_bandwidth=copy_bandwidth,
    )  # fmt: skip
    report(f"compiled {request.node.callspec.id}".replace(" ", "-"), rows)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_clipping(shapes, device, copy_bandwidth, report, request):
    """Clipping inside the step; the baseline is clip_grad_norm_, then AdamW(fused=True)."""
    baseline = "clip_grad_norm_ + AdamW(fused=True)"
    theirs, ours = Weights(shapes, device), Weights(shapes, device)
    adamw = torch.optim.AdamW(theirs.parameters(), fused=True, **SETTINGS)
    clipping = ARSAdamW(ours.parameters(), max_grad_norm=1.0, **SETTINGS)
    loss = torch.tensor(1.0, device=device)
    gradients = [weight.grad.clone() for weight in theirs.weights]

    def restore() -> None:
        for weight, gradient in zip(theirs.weights, gradients, strict=True):
            weight.grad.copy_(gradient)

    def by_torch() -> None:
        restore()  # which it scales in place, so that a second call would find nothing to clip
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adamw.step()

    candidates = {
        baseline: by_torch,
        "ARSAdamW(max_grad_norm=1), surprise = loss": lambda: clipping.step(loss=loss),
        "copies": restore,
    }
    for run in candidates.values():
        run()
    check_equal(clipping, adamw)
    rows = measure(
        candidates, baseline, {baseline: 40.0, list(candidates)[1]: 32.0},
        numel=sum(map(math.prod, shapes)), device=device, copy_bandwidth=copy_bandwidth,
        overhead="copies",
    )  # fmt: skip
    report(f"clipping {request.node.callspec.id}".replace(" ", "-"), rows)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_ewc(shapes, device, copy_bandwidth, report, request):
    """AdamW with EWC; the baseline is the penalty by autograd, then AdamW(fused=True)."""
    baseline = "EWC by autograd + AdamW(fused=True)"
    ours, theirs = Penalized(shapes, device), Penalized(shapes, device)
    plain = Weights(shapes, device)
    fused = ARSAdamW(ours.parameters(), penalty=ours.penalty(), **SETTINGS)
    adamw = torch.optim.AdamW(theirs.parameters(), fused=True, **SETTINGS)
    without = torch.optim.AdamW(plain.parameters(), fused=True, **SETTINGS)
    loss = torch.tensor(1.0, device=device)

    def by_autograd() -> None:
        theirs.restore_gradients()
        theirs.penalty_by_autograd().backward()
        adamw.step()

    value = theirs.penalty_by_autograd().item()
    by_autograd()
    fused.step(loss=loss)
    check_equal(fused, adamw, parameters=False)
    assert float(fused.diagnostics["penalty"]) == pytest.approx(value, rel=1e-5)

    candidates = {
        baseline: by_autograd,
        "ARSAdamW(penalty=EWC)": lambda: fused.step(loss=loss),
        "AdamW(fused=True) without a penalty": without.step,
        "copies": theirs.restore_gradients,
    }
    rows = measure(
        candidates, baseline,
        {"ARSAdamW(penalty=EWC)": 36.0, "AdamW(fused=True) without a penalty": 28.0},
        numel=sum(map(math.prod, shapes)), device=device, copy_bandwidth=copy_bandwidth,
        overhead="copies",
    )  # fmt: skip
    report(f"ewc {request.node.callspec.id}".replace(" ", "-"), rows)
