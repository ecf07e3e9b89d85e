"""What the CPU step keeps from step to step must not outlive what it was made of."""

import copy

import pytest
import torch
from optimizers import Pull

from ars import ARSAdamW

SHAPES = [(300, 700), (5,), (4, 3, 2, 2), (7, 3)]


def make(penalty, **settings):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    pull = Pull(params) if penalty else None
    return params, ARSAdamW(params, penalty=pull, max_grad_norm=1.0, **settings)


def gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


def plan_of(optimizer):
    return optimizer._steppers.cpu._division


@pytest.mark.parametrize("penalty", [False, True])
def test_a_plan_is_kept(penalty):
    """Also where the norm is now above its maximum, now below."""
    params, optimizer = make(penalty)
    seen = set()
    for step in range(6):
        gradients(params, step)
        for param in params:
            param.grad *= 1e-6 if step % 2 else 1.0
        optimizer.step(loss=1.0)
        seen.add(plan_of(optimizer))
    assert len(seen) == 1


def moved_parameter(params, optimizer):
    params[0].data = params[0].data.clone()


def moved_moment(params, optimizer):
    state = optimizer.state[params[0]]
    state["exp_avg"].data = state["exp_avg"].data.clone()


def another_moment(params, optimizer):
    state = optimizer.state[params[0]]
    state["exp_avg_sq"] = state["exp_avg_sq"].clone()


def another_order(params, optimizer):
    params[2].data = params[2].data.to(memory_format=torch.channels_last)


def other_step(params, optimizer):
    state = optimizer.state[params[1]]
    state["step"] = state["step"].clone()


def loaded(params, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("penalty", [False, True])
@pytest.mark.parametrize(
    "change",
    [moved_parameter, moved_moment, another_moment, another_order, other_step, loaded],
)
def test_a_plan_is_not_kept_for_other_memory(change, penalty):
    """Equal values elsewhere: everything must go on as if nothing had been moved."""
    results = []
    for moves in (False, True):
        params, optimizer = make(penalty)
        for step in range(6):
            gradients(params, step)
            if step == 2 and moves:
                before = plan_of(optimizer)
                change(params, optimizer)
            optimizer.step(loss=1.0)
        if moves and change is not loaded:
            assert plan_of(optimizer) is not before
        results.append([*params, *(s["exp_avg"] for s in optimizer.state.values())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_an_anchor_changed_in_place_pulls_at_once():
    values = []
    for moved in (False, True):
        params, optimizer = make(penalty=True)
        for step in range(3):
            gradients(params, step)
            if step == 2 and moved:
                for _, anchor, _ in optimizer.penalty.terms():
                    anchor += 1.0
            optimizer.step(loss=1.0)
        values.append(float(optimizer.diagnostics["penalty"]))
    assert values[0] != pytest.approx(values[1], rel=1e-3)


@pytest.mark.parametrize("penalty", [False, True])
def test_memory_order_changes_nothing(penalty):
    """Dense in another order, strided with gaps, and a gradient laid out unlike its parameter."""
    results = []
    for order in ("plain", "other"):
        params, optimizer = make(penalty)
        if order == "other":
            params[2].data = params[2].data.to(memory_format=torch.channels_last)
            params[3].data = torch.empty(3, 14).t()[::2].copy_(params[3].data)
        for step in range(4):
            gradients(params, step)
            if order == "other":
                params[0].grad = params[0].grad.t().contiguous().t()
                params[2].grad = params[2].grad.to(memory_format=torch.channels_last)
            optimizer.step(loss=1.0)
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_step_counters_of_two_dtypes(foreach):
    """A default dtype that changes makes further counters wider."""
    params, optimizer = make(penalty=False, foreach=foreach)
    gradients(params, 0)
    params[1].grad = None
    optimizer.step(loss=1.0)
    torch.set_default_dtype(torch.float64)
    try:
        for step in (1, 2):
            for param in params:
                param.grad = param.detach() * step
            optimizer.step(loss=1.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [float(optimizer.state[param]["step"]) for param in params] == [3.0, 2.0, 3.0, 3.0]
