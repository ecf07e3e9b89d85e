"""Gradient release: the ordinary step, parameter by parameter, with one gradient at a time."""

import weakref
from operator import is_

import pytest
import torch
from optimizers import IMPLEMENTATIONS, Pull, make

from ars import ARSAdam, ARSAdamW, ARSConfig, GradientRelease
from ars.step.batch import DIAGNOSTICS

SHAPES = ((4, 3), (7,), (), (0,), (3, 5))


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def build(implementation, dtype=torch.float32, cls=ARSAdamW, mode="coupled", **settings):
    """Two groups; one parameter, the first to be stepped or not, has no penalty."""
    params = parameters(dtype)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02, "weight_decay": 0.1}]
    penalty = Pull(params, mode=mode, skip=(4 if mode == "coupled" else 1,))
    settings = {"penalty": penalty, "lr": 0.05, **settings}
    return make(implementation, groups, cls, **settings)


def loss_of(optimizer, step):
    """A loss with a jump, whose gradients depend on the parameters; one uses its weight twice."""
    params = [p for i, p in enumerate(optimizer._parameters()) if i != step % 4]  # one is missed
    generator = torch.Generator().manual_seed(step)
    targets = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]
    terms = [
        ((p - t).square() + p * p.detach()).sum() for p, t in zip(params, targets, strict=True)
    ]
    return sum(terms) * (100.0 if step == 13 else 1.0)


def assert_same(released, ordinary):
    assert all(map(torch.equal, released._parameters(), ordinary._parameters()))
    for param, expected in zip(released._parameters(), ordinary._parameters(), strict=True):
        state, other = released.state[param], ordinary.state[expected]
        assert state.keys() == other.keys()
        assert all(torch.equal(state[name], other[name]) for name in state)
    for name, value in released.diagnostics.items():
        expected = ordinary.diagnostics[name]
        if name == "penalty":  # added up in another order
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=0.0)
        else:
            assert torch.equal(value.nan_to_num(-1.0), expected.nan_to_num(-1.0)), name


def compare(released, ordinary, steps):
    with GradientRelease(released) as release:
        for step in range(steps):
            release.backward(loss_of(released, step))
            assert all(param.grad is None for param in released._parameters())
            ordinary.zero_grad()
            loss = loss_of(ordinary, step)
            loss.backward()
            ordinary.step(loss=loss)
            assert_same(released, ordinary)


@pytest.mark.parametrize("mode", ["coupled", "proximal"])
@pytest.mark.parametrize(
    "config",
    [None, ARSConfig(), ARSConfig.paper(), ARSConfig.paper(gate=("lr", "grad"), release=5)],
    ids=["off", "on", "paper", "gates"],
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_the_ordinary_step(implementation, config, mode):
    settings = {"ars": config, "mode": mode, "amsgrad": mode == "proximal"}
    steps = 3 if implementation == "triton" else 16  # interpreted
    compare(build(implementation, **settings), build(implementation, **settings), steps)


@pytest.mark.parametrize("settings", [{"betas": (0.5, 0.6)}, {"maximize": True}])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_the_ordinary_step_with_other_settings(implementation, settings):
    settings = {"ars": ARSConfig.paper(), "cls": ARSAdam, **settings}
    if implementation != "foreach":  # torch's wants a number there
        settings["lr"] = torch.tensor(0.05)
    compare(build(implementation, **settings), build(implementation, **settings), 3)


@pytest.mark.parametrize("precision", ["stochastic_rounding", "master_weights"])
def test_equals_the_ordinary_step_in_bfloat16(precision):
    def make_one():
        return ARSAdamW(parameters(torch.bfloat16), lr=0.05, **{precision: True})

    compare(make_one(), make_one(), 4)


def test_gradients_are_never_alive_together():
    optimizer = build("fused")
    alive, most = [], []

    def count(param):
        alive.append(weakref.ref(param.grad))
        most.append(sum(ref() is not None for ref in alive))

    for param in optimizer._parameters():
        param.register_post_accumulate_grad_hook(count)
    release = GradientRelease(optimizer)
    for step in range(3):
        release.backward(loss_of(optimizer, step))
    assert most == [1] * (3 * (len(SHAPES) - 1))
    release.remove()
    loss_of(optimizer, 0).backward()  # the same without
    assert max(most) == len(SHAPES) - 1


@pytest.mark.parametrize("implementation", ["fused", "triton"])
def test_what_is_kept_from_step_to_step(implementation, monkeypatch):
    """Launches a parameter: the control kernel and the step, and nothing is gathered again."""
    from ars.csrc_triton import launches as module

    launches = []
    launch = module.launch
    monkeypatch.setattr(module, "launch", lambda *a, **k: (launches.append(a[0]), launch(*a, **k)))
    params = parameters()
    optimizer = make(implementation, params, penalty=Pull(params))
    release = GradientRelease(optimizer)
    counts, tables = [], []
    for _ in range(3):
        release.backward(sum(param.square().sum() for param in params))
        parts = [release._step._first, *release._step._parts.values()]
        counts.append(sum(part.collector.rebuilds for part in parts))
        tables.append([part.steppers.triton._fused for part in parts])
    assert counts == [len(SHAPES)] * 3
    assert all(map(is_, tables[0], tables[2]))
    assert (None in tables[0]) == (implementation != "triton")
    assert len(launches) == (3 * 2 * len(SHAPES) if implementation == "triton" else 0)


def test_a_penalty_with_buffers_is_refreshed_once_before_anything_moves():
    class Buffered:
        strength, mode = 1.0, "coupled"

        def __init__(self, params):
            self.pairs = [(p, torch.zeros(p.shape)) for p in params]
            self.rows = Pull(params).rows
            self.calls = 0

        def terms(self):
            return self.rows

        def gradients(self):
            return self.pairs

        def refresh(self):
            self.calls += 1
            for param, buffer in self.pairs:
                buffer.copy_(param)
            return sum(0.5 * param.square().sum().double() for param, _ in self.pairs)

    optimizers = []
    for _ in range(2):
        params = parameters()
        optimizers.append(ARSAdamW(params, lr=0.05, penalty=Buffered(params), foreach=False))
    compare(*optimizers, 3)
    assert optimizers[0].penalty.calls == optimizers[1].penalty.calls == 3


def test_diagnostics_begin_with_the_signals():
    """What the parts after the first read the gate from."""
    from ars.reference import Signals

    assert DIAGNOSTICS[: len(Signals._fields)] == Signals._fields
