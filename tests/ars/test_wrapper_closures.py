"""ARSOptimizer and closures: bases that move first, that evaluate often, and skipped batches."""

import math

import pytest
import torch

from ars import ARSAdam, ARSAdamW, ARSConfig, ARSOptimizer

OPEN = ARSConfig(alpha=0.0, jitter=0.0, gate=("lr", "grad"))


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation in its usual form: climbs first, then asks for the gradient."""

    def __init__(self, params, lr=0.1, rho=0.5, *, raw=False, plain=False):
        super().__init__(params, {"lr": lr, "rho": rho})
        self.raw, self.plain = raw, plain

    def step(self, closure):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        closure = torch.enable_grad()(closure)
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in params]).norm() if params else None
            old = [p.detach().clone() for p in params]
            for p in params:
                climb = p.grad * (1.0 if self.plain else self.param_groups[0]["rho"] / norm)
                if self.raw:  # which advances no version counter
                    p.data.add_(climb)
                else:
                    p.add_(climb)
            self.zero_grad()
            loss = closure()
            for p, before in zip(params, old, strict=True):
                p.data = before
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad)
        return loss


class Averaging(torch.optim.Optimizer):
    """Steps along the mean of the gradients of ``count`` evaluations, each somewhat further."""

    def __init__(self, params, lr=0.1, count=3, *, zeroes="closure"):
        super().__init__(params, {"lr": lr})
        self.count, self.zeroes = count, zeroes

    def step(self, closure):
        (param,) = self.param_groups[0]["params"]
        start, total = param.detach().clone(), 0.0
        for _ in range(self.count):
            if self.zeroes == "none":
                self.zero_grad()
            elif self.zeroes == "raw" and param.grad is not None:
                param.grad.data.zero_()
            with torch.enable_grad():
                loss = closure()
            total = total + param.grad / self.count
            param.data.sub_(0.01 * param.grad)
        with torch.no_grad():
            param.copy_(start - self.param_groups[0]["lr"] * total)
        if self.zeroes == "none":
            self.zero_grad()
        return loss


def trace(build, *, wrap, zeroes=True, before=False, steps=5, config=OPEN, **arguments):
    """Minimise |w|^2 from [2, -1]; return the weights of every step and the evaluations."""
    weight = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
    optimizer = build([weight])
    optimizer = ARSOptimizer(optimizer, config) if wrap else optimizer
    seen, calls = [], []

    def closure():
        if zeroes:
            optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        calls.append(weight.detach().clone())
        return loss

    for _ in range(steps):
        if before:
            optimizer.zero_grad()
            loss = weight.square().sum()
            loss.backward()
            known = {"loss": loss} if wrap and arguments.get("known") else {}
            optimizer.step(closure, **known)
        else:
            optimizer.step(closure)
        grad = None if weight.grad is None else weight.grad.clone()
        seen.append((weight.detach().clone(), grad))
    return seen, calls


def assert_same(found, expected):
    for (w, g), (v, h) in zip(found, expected, strict=True):
        assert torch.equal(w, v)
        assert (g is None) == (h is None)
        assert g is None or torch.equal(g, h)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("zeroes", [False, True], ids=["adds", "zeroes"])
@pytest.mark.parametrize("raw", [False, True], ids=["versioned", "data"])
def test_sharpness_aware_minimisation_evaluates_at_the_moved_weights(raw, zeroes, plain):
    def build(params):
        return SAM(params, raw=raw, plain=plain)

    expected, calls = trace(build, wrap=False, zeroes=zeroes, before=True)
    found, more = trace(build, wrap=True, zeroes=zeroes, before=True)
    assert_same(found, expected)
    assert len(more) == 2 * len(calls)  # one more a step, for the gate
    found, same = trace(build, wrap=True, zeroes=zeroes, before=True, known=True)
    assert_same(found, expected)  # with the loss at hand, not even that
    assert all(map(torch.equal, same, calls))
    if not plain:
        assert expected[-1][0].square().sum() < 1


def test_a_base_that_moves_sees_the_gradients_it_would_see_alone():
    """None here, with which it does not climb: the gate's own evaluation must not show."""
    expected, _ = trace(SAM, wrap=False)
    assert_same(trace(SAM, wrap=True)[0], expected)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_line_searches_are_the_bases(search):
    def build(params):
        return torch.optim.LBFGS(params, lr=0.3, line_search_fn=search, max_iter=4)

    expected, calls = trace(build, wrap=False)
    found, same = trace(build, wrap=True)
    assert_same(found, expected)
    assert all(map(torch.equal, same, calls))
    assert len(same) == len(calls)


@pytest.mark.parametrize("zeroes", ["closure", "none", "raw"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_base_that_evaluates_often(count, zeroes):
    def build(params):
        return Averaging(params, count=count, zeroes=zeroes)

    expected, calls = trace(build, wrap=False, zeroes=zeroes == "closure")
    found, more = trace(build, wrap=True, zeroes=zeroes == "closure")
    assert_same(found, expected)
    if zeroes == "closure":
        assert all(map(torch.equal, more, calls))
        assert len(more) == len(calls)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, ARSAdamW])
def test_ordinary_bases_take_the_first_evaluation_and_copy_nothing(base, monkeypatch):
    def build(params):
        return base(params, lr=0.1, **({"ars": None} if base is ARSAdamW else {}))

    expected, calls = trace(build, wrap=False)
    monkeypatch.setattr("ars.wrapper._copied", None)
    found, same = trace(build, wrap=True)
    assert_same(found, expected)
    assert len(same) == len(calls)


def test_a_hook_of_the_base_may_move_the_weights():
    def build(params):
        base = torch.optim.SGD(params, lr=0.1)
        base.register_step_pre_hook(lambda *_: setattr(params[0], "data", 0.5 * params[0].data))
        return base

    expected, _ = trace(build, wrap=False)
    assert_same(trace(build, wrap=True)[0], expected)


def test_gradients_that_the_base_drops_do_not_come_back():
    """Though they are gated, Phi = 1/2: not before the next evaluation, nor after the step."""
    config = ARSConfig.paper(
        surprise=lambda: math.log(2), phi_min=0.0, jitter=0.0, gate=("grad",), significance=1e6
    )

    def build(params):
        return Averaging(params, count=2, zeroes="none")

    ((weight, grad),), calls = trace(build, wrap=True, zeroes=False, config=config, steps=1)
    assert grad is None
    start = torch.tensor([2.0, -1.0])
    # The second evaluation lies 0.01 times half of the first one's gradient further.
    assert calls[-1].tolist() == pytest.approx((0.99 * start).tolist())
    assert weight.tolist() == pytest.approx((start - 0.1 * 0.995 * start).tolist())


class Own(torch.optim.SGD):
    """Not torch's own, so it is watched."""


def optimizers(weight):
    yield ARSAdamW([weight])
    yield ARSAdam([weight])
    yield ARSOptimizer(torch.optim.AdamW([weight]))
    yield ARSOptimizer(Own([weight], lr=0.1))


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("watched", ["auto", "loss", "entropy"])
def test_a_closure_that_skips_a_batch_is_no_step(index, watched):
    """Lightning's way: it returns None, and no parameter has a gradient."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = list(optimizers(weight))[index]
    config = ARSConfig(surprise=watched)
    optimizer = [ARSAdamW, ARSAdam, ARSOptimizer, ARSOptimizer][index](
        [weight] if index < 2 else optimizer.base, **{"ars" if index < 2 else "config": config}
    )
    surprise = {"surprise": 1.0} if watched == "entropy" else {}

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    def skips():
        optimizer.zero_grad()

    assert optimizer.step(skips) is None  # the first batch, before anything is watched
    optimizer.step(closure, **surprise)
    before, counts = weight.detach().clone(), optimizer.controller.counts.clone()
    state = str(optimizer.state)
    assert optimizer.step(skips) is None
    optimizer.zero_grad()
    optimizer.step()  # likewise without a closure
    assert torch.equal(weight, before)
    assert torch.equal(optimizer.controller.counts, counts)
    assert str(optimizer.state) == state
    optimizer.step(closure, **surprise)
    assert optimizer.controller.counts.tolist() == [2, 2]


@pytest.mark.parametrize("index", range(3))
def test_a_closure_without_a_loss_repeats_the_last_one_if_there_are_gradients(index):
    """As of batches that were accumulated before the skipped one."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = list(optimizers(weight))[index]
    weight.grad = torch.ones(2)
    for loss in (3.0, 4.0, None, 6.0):
        before = weight.detach().clone()
        optimizer.step(lambda loss=loss: loss)
        assert not torch.equal(weight, before)
    assert optimizer.controller.window[:4].tolist() == [3.0, 4.0, 4.0, 6.0]
    with pytest.raises(ValueError, match="has watched the loss and now gets the grad_norm"):
        optimizer.step()  # without a closure it has been forgotten
