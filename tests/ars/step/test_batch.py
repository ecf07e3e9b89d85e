"""What the optimizer keeps between steps, and everything that must make it look again."""

import copy
import sys

import pytest
import torch
from optimizers import Pull, gradients, make, parameters

from ars import ARSAdamW, ARSConfig

SHAPES = ((5,), (2, 3), (4,))


def trained(implementation="fused", **settings):
    params = parameters(shapes=SHAPES)
    optimizer = make(implementation, params, **settings)
    for seed in range(2):
        gradients(params, seed)
        optimizer.step(loss=1.0)
    return optimizer, params


def rebuilds(optimizer):
    return optimizer._collector.rebuilds


@pytest.mark.parametrize("implementation", ["loop", "foreach", "fused", "triton"])
def test_steps_that_change_only_gradients_and_rates_gather_nothing(implementation):
    optimizer, params = trained(implementation, penalty=None)
    tables = optimizer._steppers.triton._fused
    for seed in range(3):
        gradients(params, seed)
        optimizer.param_groups[0]["lr"] *= 0.5
        optimizer.param_groups[0]["betas"] = (0.8, 0.9 + 0.01 * seed)
        optimizer.step(loss=1.0)
        assert float(optimizer.diagnostics["beta2"]) == 0.9 + 0.01 * seed
    assert rebuilds(optimizer) == 1
    assert optimizer._steppers.triton._fused is tables


def calls(function):
    """Number of calls of Python functions, which are what costs microseconds."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_python_calls_of_a_gathering_do_not_depend_on_the_number_of_tensors():
    def count(tensors):
        params = parameters(shapes=((3,),) * tensors)
        optimizer = ARSAdamW(params)
        gradients(params, 0)
        optimizer.step(loss=1.0)
        collector, groups = optimizer._collector, optimizer.param_groups
        gradients(params, 1)
        arguments = (groups, optimizer.state, optimizer._terms)
        arguments += (optimizer._append, optimizer._check)
        return calls(lambda: collector.collect(*arguments))

    assert count(3) == count(50) < 20


def test_python_calls_of_the_tables_do_not_depend_on_the_number_of_tensors():
    def count(tensors):
        params = parameters(shapes=((3,),) * tensors)
        optimizer = make("triton", params)
        gradients(params, 0)
        optimizer.step(loss=1.0)
        gradients(params, 1)
        fused, grads = optimizer._steppers.triton._fused, [param.grad for param in params]
        return calls(lambda: (fused.is_outdated(), fused._check_gradients(grads)))

    assert count(3) == count(20) < 20


def replace_parameter(optimizer, params):
    new = params[1].detach().clone().requires_grad_()
    optimizer.param_groups[0]["params"][1] = params[1] = new


def move_state_entry(optimizer, params):
    state = optimizer.state[params[1]]
    state["exp_avg_sq"] = state["exp_avg_sq"].clone()


def replace_state(optimizer, params):
    optimizer.state[params[0]] = copy.deepcopy(optimizer.state[params[0]])


def forget_state(optimizer, params):
    optimizer.state.pop(params[2])


def add_group(optimizer, params):
    params.append(torch.ones(3, requires_grad=True))
    optimizer.add_param_group({"params": params[-1:]})


CHANGES = {
    "parameter": replace_parameter,
    "state entry": move_state_entry,
    "state": replace_state,
    "no state": forget_state,
    "group": add_group,
    "load": lambda optimizer, params: optimizer.load_state_dict(optimizer.state_dict()),
    "amsgrad": lambda optimizer, params: optimizer.param_groups[0].update(amsgrad=True),
    "penalty": lambda optimizer, params: setattr(optimizer, "penalty", Pull(params)),
}


@pytest.mark.parametrize("implementation", ["fused", "triton"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_between_steps_is_noticed(change, implementation):
    """Against the loop, given a state of its own and no memory of what was before."""
    optimizer, params = trained(implementation)
    change(optimizer, params)
    before = rebuilds(optimizer)
    other = copy.deepcopy(optimizer)
    other._implementation = "loop"
    copies = [p for group in other.param_groups for p in group["params"]]
    for seed in (5, 6):
        gradients(params, seed)
        gradients(copies, seed)
        optimizer.step(loss=1.0)
        other.step(loss=1.0)
    assert rebuilds(optimizer) == before + 1
    for a, b in zip(params, copies, strict=True):
        torch.testing.assert_close(a, b)
        for name, value in other.state[b].items():
            torch.testing.assert_close(optimizer.state[a][name], value)


@pytest.mark.parametrize("implementation", ["fused", "triton"])
@pytest.mark.parametrize("what", ["param", "exp_avg", "step", "beta_products"])
def test_memory_that_moves_under_a_tensor_is_followed(what, implementation):
    optimizer, params = trained(implementation, ars=ARSConfig.paper())
    tensor = params[1] if what == "param" else optimizer.state[params[1]][what]
    stale = tensor.data
    tensor.data = tensor.data.clone()
    kept = stale.clone()
    before = tensor.detach().clone()
    gradients(params, 5)
    optimizer.step(loss=1.0)
    assert torch.equal(stale, kept)
    assert not torch.equal(tensor, before)


def test_memory_that_moves_under_a_complex_parameter_is_followed():
    wave = torch.randn(5, dtype=torch.complex64, requires_grad=True)
    optimizer = ARSAdamW([wave], lr=0.1)
    for _ in range(2):
        wave.grad = torch.ones_like(wave)
        optimizer.step(loss=1.0)
    before = wave.detach().clone()
    wave.data = wave.data.clone()
    optimizer.step(loss=1.0)
    assert not torch.equal(wave, before)


@pytest.mark.parametrize(("lr", "scale"), [(0.0, 0.0), (0.1, 1.0)], ids=["trial", "step"])
def test_gradients_are_let_go(lr, scale):
    params = parameters(shapes=SHAPES)
    optimizer = ARSAdamW(params, lr=lr)
    gradients(params, 0, scale=scale)
    optimizer.step()
    assert optimizer._collector._cached.batch.grads == []


@pytest.mark.parametrize("shape", [(2,), (5, 1)])
def test_a_parameter_that_has_another_shape_at_its_address_is_noticed(shape):
    optimizer, params = trained("triton")
    params[0].grad = None
    size = params[0].data.view(-1)[: shape[0]]
    params[0].data = size.view(shape)
    gradients(params, 5)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="exp_avg of parameter 0 of group 0 has shape"):
            optimizer.step(loss=1.0)
