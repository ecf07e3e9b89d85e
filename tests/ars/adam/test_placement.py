"""Optimizers built before their parameters have data: all follows where these are, then."""

import copy
import pickle

import pytest
import torch
from optimizers import Pull, gradients, parameters, train
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from ars import ARSAdamW, ARSConfig, ARSOptimizer
from ars.step import choose

GATED = ARSConfig.paper(window=5, release=9)


def weights(device="cpu"):
    model = torch.nn.Linear(3, 2, device=device)
    return model, list(model.parameters())


def give_data(model):
    """As deferred initialization does, with parameters that stay the same objects."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


BUILD = {
    "adamw": lambda params: ARSAdamW(params, ars=GATED),
    "wrapper": lambda params: ARSOptimizer(torch.optim.SGD(params, lr=0.1, momentum=0.9), GATED),
}


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD.keys())
def test_a_state_is_loaded_after_the_parameters_have_got_data(build):
    _, params = weights()
    first = build(params)
    train(first, params, 4, loss=1.0)
    model, later = weights("meta")
    second = build(later)
    give_data(model)
    with torch.no_grad():
        for param, value in zip(later, params, strict=True):
            param.copy_(value)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for name, tensor in second.controller.state_dict().items():
        assert torch.equal(tensor, first.controller.state_dict()[name])
    assert float(second.diagnostics["rho"]) == 0.0
    expected = train(first, params, 3, first=4, loss=2.0)
    assert all(map(torch.equal, train(second, later, 3, first=4, loss=2.0), expected))


def on_kernels(*_, **__):
    return "triton"


def test_a_state_is_loaded_for_the_implementation_that_will_step(monkeypatch):
    """Its step counters lie where that wants them."""
    _, params = weights()
    first = ARSAdamW(params)
    train(first, params, 2)
    model, later = weights("meta")
    second = ARSAdamW(later)
    give_data(model)
    monkeypatch.setattr(choose, "choose", on_kernels)
    chosen = []

    def step_kind(optimizer, *_):
        chosen.append(optimizer._implementation)
        return {"dtype": torch.float32}

    monkeypatch.setattr(ARSAdamW, "_step_kind", step_kind)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert chosen == ["triton", "triton"]


def test_a_trial_step_makes_the_state_where_the_parameters_are(monkeypatch):
    model, params = weights("meta")
    optimizer = ARSAdamW(params)
    give_data(model)
    monkeypatch.setattr(choose, "choose", on_kernels)
    get_optimizer_state_dict(model, optimizer)
    assert optimizer._implementation == "triton"
    assert not optimizer._buffer.is_meta
    assert not optimizer.controller.window.is_meta


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_chooses_its_implementation_again(clone, monkeypatch):
    """As one that was pickled on a machine with a GPU must."""
    optimizer = ARSAdamW(parameters())
    with monkeypatch.context() as patched:
        patched.setattr(choose, "choose", on_kernels)
        optimizer._move_to_parameters()
    other = clone(optimizer)
    assert other._implementation == "fused"
    assert other._step_supports_amp_scaling is True
    gradients(other.param_groups[0]["params"], 0)
    other.step()


def test_parameters_that_have_left_their_penalty_change_nothing():
    model, params = weights("meta")
    optimizer = ARSAdamW(params)
    optimizer._penalty = Pull(weights()[1])  # of other parameters
    give_data(model)
    gradients(params, 0)
    controller, buffer, kept = optimizer._controller, optimizer._buffer, optimizer._steppers
    for _ in range(2):
        with pytest.raises(ValueError, match="belongs to no parameter"):
            optimizer.step()
    assert optimizer._implementation == "loop"
    assert optimizer._controller is controller
    assert optimizer._buffer is buffer
    assert optimizer._steppers is kept
