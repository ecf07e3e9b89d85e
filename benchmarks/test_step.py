"""One optimizer step against torch's: equal results first, then medians and their ratio."""

import pytest
import torch
from interleaved import time_all

from ars import ARSAdamW
from ars.regularizers import EWC

SHAPES = {
    "50 x 512 x 512": [(512, 512)] * 50,
    "200 x 64 x 64": [(64, 64)] * 200,
}
SETTINGS = {"lr": 1e-3, "weight_decay": 0.01}
STRENGTH = 100.0


class Weights(torch.nn.Module):
    """The tensors to be optimized, their gradients, and what a penalty needs."""

    def __init__(self, shapes: list[tuple[int, ...]], device: str) -> None:
        """Draw everything from one seed, so that all candidates start alike."""
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def draw(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device)

        self.weights = torch.nn.ParameterList(draw(shape) for shape in shapes)
        self.task = [draw(shape) for shape in shapes]
        self.anchor = [w.detach() + 0.01 * draw(tuple(w.shape)) for w in self.weights]
        names = [name for name, _ in self.named_parameters()]
        self.importance = {n: draw(s).abs() for n, s in zip(names, shapes, strict=True)}
        self.take_gradients()

    def take_gradients(self) -> None:
        """Give every weight the task's gradient, as a backward pass would."""
        for weight, gradient in zip(self.weights, self.task, strict=True):
            weight.grad = gradient.clone()

    def penalty(self) -> EWC:
        """Return the penalty towards the anchors."""
        moved = [weight.detach().clone() for weight in self.weights]
        with torch.no_grad():
            for weight, anchor in zip(self.weights, self.anchor, strict=True):
                weight.copy_(anchor)
            ewc = EWC(self, self.importance, strength=STRENGTH)
            for weight, value in zip(self.weights, moved, strict=True):
                weight.copy_(value)
        return ewc

    def penalty_by_autograd(self) -> torch.Tensor:
        """The same penalty as users write it."""
        terms = zip(self.weights, self.anchor, self.importance.values(), strict=True)
        return 0.5 * STRENGTH * sum((f * (w - a).pow(2)).sum() for w, a, f in terms)


def check_equal(
    ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, *, moments_only: bool = False
) -> None:
    """Assert that two optimizers have taken the same steps, up to rounding.

    Where a gradient and a penalty cancel, Adam's first step is the sign of a rounding error:
    there only the moments can agree.
    """
    for a, b in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            x, y = ours.state[a][name], theirs.state[b][name]
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
        if not moments_only:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def rows_of(seconds: dict[str, float], baseline: str, traffic: dict[str, float], roof: float):
    """Make one row a candidate: milliseconds, ratios to the baseline, bandwidth."""
    rows = []
    for name, value in seconds.items():
        row = {"candidate": name, "ms": round(value * 1e3, 3)}
        row["time / baseline"] = round(value / seconds[baseline], 3)
        row["baseline / time"] = round(seconds[baseline] / value, 2)
        if name in traffic:
            row["GB/s"] = round(traffic[name] / value / 1e9, 1)
            row["of a copy"] = f"{traffic[name] / value / roof:.0%}"
        rows.append(row)
    return rows


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_adamw(shapes, device, copy_bandwidth, report, request):
    """Plain AdamW, the controller, and clipping; the baseline is AdamW(fused=True)."""
    models = {
        name: Weights(shapes, device)
        for name in ("fused", "foreach", "plain", "loss", "norm", "clip", "torch clip")
    }
    optimizers = {
        "fused": torch.optim.AdamW(models["fused"].parameters(), fused=True, **SETTINGS),
        "foreach": torch.optim.AdamW(models["foreach"].parameters(), foreach=True, **SETTINGS),
        "torch clip": torch.optim.AdamW(models["torch clip"].parameters(), fused=True, **SETTINGS),
        "plain": ARSAdamW(models["plain"].parameters(), ars=None, **SETTINGS),
        "loss": ARSAdamW(models["loss"].parameters(), **SETTINGS),
        "norm": ARSAdamW(models["norm"].parameters(), **SETTINGS),
        "clip": ARSAdamW(models["clip"].parameters(), max_grad_norm=1.0, **SETTINGS),
    }
    loss = torch.tensor(1.0, device=device)

    def torch_clip() -> None:
        torch.nn.utils.clip_grad_norm_(models["torch clip"].parameters(), 1.0)
        optimizers["torch clip"].step()

    candidates = {
        "AdamW(fused=True)": optimizers["fused"].step,
        "AdamW(foreach=True)": optimizers["foreach"].step,
        "ARSAdamW(ars=None)": optimizers["plain"].step,
        "ARSAdamW, surprise = loss": lambda: optimizers["loss"].step(loss=loss),
        "ARSAdamW, surprise = gradient norm": optimizers["norm"].step,
        "clip_grad_norm_ + AdamW(fused=True)": torch_clip,
        "ARSAdamW(max_grad_norm=1), surprise = loss": lambda: optimizers["clip"].step(loss=loss),
    }
    for run in candidates.values():
        run()
    for ours, theirs in (("plain", "fused"), ("loss", "fused"), ("norm", "fused")):
        check_equal(optimizers[ours], optimizers[theirs])
    check_equal(optimizers["clip"], optimizers["torch clip"])

    numel = sum(weight.numel() for weight in models["fused"].weights)
    traffic = dict.fromkeys(candidates, 28.0 * numel)
    traffic["ARSAdamW, surprise = gradient norm"] += 4 * numel
    traffic["ARSAdamW(max_grad_norm=1), surprise = loss"] += 4 * numel
    traffic["clip_grad_norm_ + AdamW(fused=True)"] += 12 * numel
    seconds = time_all(candidates, device)
    name = "adamw " + request.node.callspec.id
    report(
        name.replace(" ", "-"),
        rows_of(seconds, "AdamW(fused=True)", traffic, copy_bandwidth),
    )


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_ewc(shapes, device, copy_bandwidth, report, request):
    """AdamW with EWC; the baseline is the penalty by autograd, then AdamW(fused=True)."""
    ours, theirs, plain = (Weights(shapes, device) for _ in range(3))
    fused = ARSAdamW(ours.parameters(), penalty=ours.penalty(), **SETTINGS)
    adamw = torch.optim.AdamW(theirs.parameters(), fused=True, **SETTINGS)
    without = torch.optim.AdamW(plain.parameters(), fused=True, **SETTINGS)
    loss = torch.tensor(1.0, device=device)

    def by_autograd() -> None:
        for weight, gradient in zip(theirs.weights, theirs.task, strict=True):
            weight.grad.copy_(gradient)  # what the task's backward pass would have left
        theirs.penalty_by_autograd().backward()
        adamw.step()

    value = theirs.penalty_by_autograd().item()
    by_autograd()
    fused.step(loss=loss)
    check_equal(fused, adamw, moments_only=True)
    assert float(fused.diagnostics["penalty"]) == pytest.approx(value, rel=1e-5)

    def only_copies() -> None:
        for weight, gradient in zip(theirs.weights, theirs.task, strict=True):
            weight.grad.copy_(gradient)

    candidates = {
        "EWC by autograd + AdamW(fused=True)": by_autograd,
        "ARSAdamW(penalty=EWC)": lambda: fused.step(loss=loss),
        "AdamW(fused=True) without a penalty": without.step,
        "the baseline's gradient copies": only_copies,
    }
    seconds = time_all(candidates, device)
    seconds["EWC by autograd + AdamW(fused=True)"] -= seconds.pop("the baseline's gradient copies")
    numel = sum(weight.numel() for weight in ours.weights)
    traffic = {
        "ARSAdamW(penalty=EWC)": 36.0 * numel,
        "AdamW(fused=True) without a penalty": 28.0 * numel,
    }
    name = "ewc " + request.node.callspec.id
    report(
        name.replace(" ", "-"),
        rows_of(seconds, "EWC by autograd + AdamW(fused=True)", traffic, copy_bandwidth),
    )
