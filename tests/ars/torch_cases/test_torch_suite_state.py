"""torch's optimizer tests of the state: saving, loading, and what older versions saved.

Covers ``test_state_dict_deterministic``, ``test_can_load_older_state_dict``,
``test_can_load_from_to_named_state_dict``, ``test_save_load_equality_with_weights_only``,
``test_load_nontensor_step``, ``test_adamw_serialization`` and ``test_non_empty_state``.
"""

import copy
import io

import pytest
import torch
from optimizers import make
from torch_suite import IMPLEMENTATIONS, affine, assert_same, cases, clones, named

from ars import ARSAdam, ARSAdamW


def convolution():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 2, 1, stride=2), torch.nn.BatchNorm2d(2))
    inputs = torch.rand(1, 4, 16, 16)

    def forward(optimizer):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()

    return model, forward


def without_names(state_dict):
    state_dict = copy.deepcopy(state_dict)
    for group in state_dict["param_groups"]:
        group.pop("param_names", None)
    return state_dict


@pytest.mark.parametrize(
    ("name_first", "name_second", "with_loss"), [(True, False, False), (False, True, True)]
)
@cases()
def test_state_dict_deterministic(case, name_first, name_second, with_loss):
    """Ten steps, and ten more after loading, equal twenty exactly, in every state."""
    params, forward = affine()
    optimizer = case.build(named(params, name_first))

    def step(params, optimizer):
        loss = forward(params)
        optimizer.step(loss=loss if with_loss else None)

    for _ in range(10):
        step(params, optimizer)
    copies = clones(params)
    other = case.build(named(copies, name_second))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(10):
        step(params, optimizer)
        step(copies, other)
        assert all(map(torch.equal, params, copies))
    assert str(other.diagnostics) == str(optimizer.diagnostics)
    assert_same(without_names(other.state_dict()), without_names(optimizer.state_dict()))
    # A group that is listed twice is described alike both times.
    other.param_groups.extend(other.param_groups)
    groups = [without_names(o.state_dict())["param_groups"][-1] for o in (optimizer, other)]
    assert_same(*groups)


@cases()
def test_can_load_older_state_dict(case):
    """Of a version in which torch's class lacked the later arguments."""
    model, forward = convolution()
    optimizer = case.build(model.parameters())
    for _ in range(3):
        forward(optimizer)
    older = copy.deepcopy(optimizer.state_dict())
    for group in older["param_groups"]:
        for flag in (*case.info.not_og_supported_flags, "decoupled_weight_decay"):
            group.pop(flag, None)
    optimizer.load_state_dict(older)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    forward(optimizer)
    for index, state in optimizer.state_dict()["state"].items():
        assert state["step"] == before[index]["step"] + 1 == 4
    decoupled = optimizer.param_groups[0]["decoupled_weight_decay"]
    assert decoupled is (case.cls is ARSAdamW)


@pytest.mark.parametrize("name_first", [True, False])
@pytest.mark.parametrize("name_second", [True, False])
@cases(implementations=[""])
def test_can_load_from_to_named_state_dict(case, name_first, name_second):
    model, forward = convolution()

    def build(yes):
        return case.build(model.named_parameters() if yes else model.parameters())

    first, second = build(name_first), build(name_second)
    for _ in range(3):
        forward(first)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert_same(without_names(second.state_dict()), without_names(first.state_dict()))
    forward(second)
    group = second.state_dict()["param_groups"][0]
    assert ("param_names" in group) is (name_first or name_second)
    if name_first or name_second:
        assert group["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]


@pytest.mark.parametrize("with_names", [True, False])
@cases(implementations=[""])
def test_save_load_equality_with_weights_only(case, with_names):
    params, forward = affine()
    optimizer = case.build(named(params, with_names))
    for _ in range(3):
        optimizer.step(forward)
    saved, file = optimizer.state_dict(), io.BytesIO()
    torch.save(saved, file)
    for weights_only in (False, True):
        file.seek(0)
        assert_same(torch.load(file, weights_only=weights_only), saved)


def numbered(state_dict):
    """The state dict with its step counters as numbers, as torch once saved them."""
    state_dict = copy.deepcopy(state_dict)
    for state in state_dict["state"].values():
        state["step"] = float(state["step"])
    return state_dict


@cases()
def test_load_nontensor_step(case):
    params, forward = affine()
    optimizer = case.build(params)
    for _ in range(3):
        forward()
        optimizer.step()
    wanted = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(numbered(wanted))
    assert_same(optimizer.state_dict(), wanted)
    forward()
    optimizer.step()
    assert all(float(optimizer.state[param]["step"]) == 4 for param in params)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "triton"])
def test_step_counters_are_loaded_as_they_are_made(implementation, default):
    """Whatever kind they were saved as, under whatever default dtype."""
    params, forward = affine()
    saved = {}
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            optimizer = make(implementation, params)
            forward()
            optimizer.step()
            saved[dtype] = copy.deepcopy(optimizer.state_dict())
        torch.set_default_dtype(default)
        for state_dict in [*saved.values(), numbered(saved[default])]:
            optimizer = make(implementation, params)
            optimizer.load_state_dict(copy.deepcopy(state_dict))
            assert_same(optimizer.state[params[0]]["step"], saved[default]["state"][0]["step"])
            optimizer.step()
            assert float(optimizer.state[params[0]]["step"]) == 2
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "triton"])
def test_adam_takes_the_kind_of_weight_decay_from_the_state(implementation):
    """AdamW is always decoupled; Adam is what its argument or what it loads says."""
    settings = {"lr": 0.1, "weight_decay": 0.5, "ars": None}

    def build(cls, **changes):
        params = [torch.ones(3, requires_grad=True)]
        params[0].grad = torch.full((3,), 0.25)
        if cls in (ARSAdam, ARSAdamW):
            return make(implementation, params, cls, **settings, **changes)
        return cls(params, lr=0.1, weight_decay=0.5, **changes)

    def after_a_step(optimizer):
        optimizer.step()
        return optimizer.param_groups[0]["params"][0].detach()

    expected = {
        decoupled: after_a_step(build(torch.optim.Adam, decoupled_weight_decay=decoupled))
        for decoupled in (True, False)
    }
    assert not torch.allclose(expected[True], expected[False], atol=1e-3)
    for cls in (ARSAdam, ARSAdamW):
        for theirs in (torch.optim.Adam, torch.optim.AdamW):
            decoupled = theirs is torch.optim.AdamW or cls is ARSAdamW
            optimizer = build(cls)
            optimizer.load_state_dict(build(theirs).state_dict())
            assert optimizer.param_groups[0]["decoupled_weight_decay"] is decoupled
            torch.testing.assert_close(after_a_step(optimizer), expected[decoupled])
    optimizer = build(ARSAdam, decoupled_weight_decay=True)
    torch.testing.assert_close(after_a_step(optimizer), expected[True])
    optimizer.param_groups[0]["decoupled_weight_decay"] = False  # is read at every step
    coupled = build(torch.optim.Adam)
    coupled.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    coupled.param_groups[0]["params"][0].data.copy_(expected[True])
    torch.testing.assert_close(after_a_step(optimizer), after_a_step(coupled))


def test_groups_with_different_kinds_of_weight_decay_are_refused():
    params, forward = affine()
    groups = [{"params": params[:1]}, {"params": params[1:], "decoupled_weight_decay": True}]
    optimizer = ARSAdam(groups)
    before = clones(params)
    forward()
    with pytest.raises(ValueError, match="decoupled_weight_decay=True and some False"):
        optimizer.step()
    assert all(map(torch.equal, params, before))


@cases()
def test_non_empty_state(case):
    params, forward = affine()
    optimizer = case.build(params)
    forward()
    optimizer.step()
    assert optimizer.state.keys() == set(params)
    names = {"step", "exp_avg", "exp_avg_sq"}
    names |= {"max_exp_avg_sq"} if case.given.get("amsgrad") else set()
    assert all(state.keys() == names for state in optimizer.state.values())
