"""torch's optimizer tests: hooks, printing, copying.

Covers ``test_step_pre_hook``, ``test_step_post_hook``, ``test_step_all_hooks``,
``test_state_dict_pre_hook``, ``test_state_dict_post_hook``, ``test_state_dict_pre_post_hook``,
``test_load_state_dict_pre_hook_and_prepend``, ``test_load_state_dict_post_hook``,
``test_load_state_dict_pre_post_hook``, ``test_optimizer_can_be_printed`` and
``test_deepcopy_copies_all_public_attrs``.
"""

import copy
from contextlib import ExitStack

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch_suite import FLAGS, affine, assert_same, cases

from ars import ARSAdamW


def integers():
    """Parameters without a gradient: a step does nothing but run the hooks."""
    return [torch.tensor([1.0, 1.0])]


@pytest.mark.parametrize("kind", ["pre", "post"])
@cases(implementations=[""], every_input=False)
def test_step_hook_runs_until_removed(case, kind):
    optimizer, calls = case.build(integers()), []
    register = getattr(optimizer, f"register_step_{kind}_hook")
    handle = register(lambda *call: calls.append(call))
    optimizer.step()
    optimizer.step(None)
    assert [call[0] for call in calls] == [optimizer, optimizer]
    assert calls[1][1][-1] is None  # the positional arguments, torch's own order
    handle.remove()
    optimizer.step()
    assert len(calls) == 2


@cases(implementations=[""], every_input=False)
def test_step_hooks_run_in_order(case):
    params, order = integers(), []
    ours, sgd = case.build(params), torch.optim.SGD(params)
    with ExitStack() as stack:
        add = stack.enter_context
        add(removing(register_optimizer_step_pre_hook(lambda *_: order.append(0))))
        add(removing(register_optimizer_step_post_hook(lambda *_: order.append(3))))
        for optimizer in (ours, sgd):
            add(removing(optimizer.register_step_pre_hook(lambda *_: order.append(1))))
            add(removing(optimizer.register_step_post_hook(lambda *_: order.append(2))))
        for optimizer in (ours, sgd, ours):
            optimizer.step()
    assert order == [0, 1, 2, 3] * 3
    ours.step()
    sgd.step()
    assert len(order) == 12


class removing:  # noqa: N801 - reads as contextlib.closing does
    def __init__(self, handle):
        self.handle = handle

    def __enter__(self):
        return self.handle

    def __exit__(self, *_):
        self.handle.remove()


def mark(optimizer):
    optimizer.state["test"] = 1


def unmark(optimizer, state_dict):
    state_dict["marked"] = state_dict["state"].pop("test", None) == 1
    return state_dict


@pytest.mark.parametrize(("pre", "post"), [(True, False), (False, True), (True, True)])
@cases(implementations=[""], every_input=False)
def test_state_dict_hooks(case, pre, post):
    optimizer = case.build([torch.rand(2, 3, requires_grad=True)])
    if pre:
        optimizer.register_state_dict_pre_hook(mark)
    if post:
        optimizer.register_state_dict_post_hook(unmark)
    state_dict = optimizer.state_dict()
    assert ("test" in state_dict["state"]) is (pre and not post)
    assert state_dict.get("marked") is (pre if post else None)


def set_lr(_, state_dict):
    state_dict["param_groups"][0]["lr"] = 0.002


def return_with_lr(_, state_dict):
    changed = copy.deepcopy(state_dict)
    changed["param_groups"][0]["lr"] = 0.003
    return changed


@cases(implementations=[""], every_input=False)
def test_load_state_dict_pre_hook_and_prepend(case):
    optimizer = case.build([torch.rand(2, 3, requires_grad=True)])
    state_dict = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(set_lr)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.002
    optimizer.register_load_state_dict_pre_hook(return_with_lr, prepend=True)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.002  # the other one had the last word


@pytest.mark.parametrize("pre", [True, False])
@cases(implementations=[""], every_input=False)
def test_load_state_dict_post_hook(case, pre):
    optimizer, seen = case.build([torch.rand(2, 3, requires_grad=True)]), []
    if pre:
        optimizer.register_load_state_dict_pre_hook(return_with_lr)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
    lr = optimizer.param_groups[0]["lr"]
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [0.003 if pre else lr]


@cases(implementations=[""])
def test_load_hooks_decide_what_is_loaded(case):
    """Ours: a hook's state replaces the given one whole, the controller's memory included."""
    params, forward = affine()
    optimizer = case.build(params)
    for _ in range(2):
        forward()
        optimizer.step()
    wanted = copy.deepcopy(optimizer.state_dict())
    forward()
    optimizer.step()
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda *_: copy.deepcopy(wanted))
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.append(copy.deepcopy(o.state_dict()))
    )
    optimizer.load_state_dict(optimizer.state_dict())
    assert_same(seen, [wanted])  # complete when the hook runs
    assert_same(optimizer.state_dict(), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_load_post_hook_sees_the_moments_in_their_dtype_and_may_change_them(dtype):
    param = torch.randn(3, dtype=dtype, requires_grad=True)
    param.grad = torch.ones_like(param)
    optimizer = ARSAdamW([param])
    optimizer.step()
    seen = []

    def hook(loaded):
        seen.append(loaded.state[param]["exp_avg"].clone())
        loaded.state[param]["exp_avg"].fill_(7.0)

    optimizer.register_load_state_dict_post_hook(hook)
    before = optimizer.state[param]["exp_avg"].clone()
    optimizer.load_state_dict(optimizer.state_dict())
    assert_same(seen, [before])
    assert (optimizer.state[param]["exp_avg"] == 7.0).all()


@cases(implementations=[""], every_input=False)
def test_state_dict_post_hook_sees_and_may_drop_the_controller(case):
    optimizer = case.build(integers())
    optimizer.register_state_dict_post_hook(lambda _, s: {k: s[k] for k in s if k != "controller"})
    assert optimizer.state_dict().keys() == {"state", "param_groups"}


@cases(implementations=FLAGS)
def test_optimizer_can_be_printed(case):
    text = repr(case.build(affine()[0]))
    assert text.startswith(f"{case.cls.__name__} (\nParameter Group 0\n")
    assert f"    lr: {case.kwargs.get('lr', 0.001)}\n" in text


@cases(implementations=[""])
def test_deepcopy_copies_everything(case):
    params, forward = affine()
    optimizer = case.build(params)
    for _ in range(3):
        forward()
        optimizer.step()
    other = copy.deepcopy(optimizer)
    public = [{k for k in vars(o) if not k.startswith("_")} for o in (optimizer, other)]
    assert public[0] == public[1]
    assert_same(other.state_dict(), optimizer.state_dict())
    assert other.diagnostics["lr"] == optimizer.diagnostics["lr"] > 0
