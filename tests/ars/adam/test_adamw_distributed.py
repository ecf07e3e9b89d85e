"""torch.distributed.checkpoint: its trial step moves nothing, and its state goes back and forth."""

import copy

import pytest
import torch
from optimizers import IMPLEMENTATIONS, Pull, gradients, make, parameters, train
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.two_tensor import TwoTensor

from ars import ARSAdamW, ARSConfig


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(p.detach()) for p in parameters(shapes=((5,), (3, 4)))
        )


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["float", "tensor"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_trial_step_makes_the_state_and_moves_nothing(implementation, lr):
    model = Model()
    params = list(model.parameters())
    before = copy.deepcopy(params)
    if implementation == "foreach" and isinstance(lr, torch.Tensor):
        lr = float(lr)  # torch's foreach does not take one
    optimizer = make(implementation, params, lr=lr, weight_decay=0.5, penalty=Pull(params))
    diagnostics = optimizer._buffer.clone()
    get_optimizer_state_dict(model, optimizer)
    assert all(map(torch.equal, params, before))
    for param in params:
        state = optimizer.state[param]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert not any(state[name].any() for name in ("step", "exp_avg", "exp_avg_sq"))
    assert not optimizer.controller.counts.any()
    assert not optimizer.controller.window.any()
    assert torch.equal(optimizer._buffer, diagnostics)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.01)
    for param, gradient in zip(params, before, strict=True):
        param.grad = gradient.detach().clone()
    optimizer.step(loss=1.0)  # and it may watch a loss
    assert float(optimizer.state[params[0]]["step"]) == 1


@pytest.mark.parametrize("ars", [None, ARSConfig.paper(window=5)], ids=["plain", "gated"])
def test_a_state_goes_through_a_checkpoint(ars):
    model, other = Model(), Model()
    params, copies = list(model.parameters()), list(other.parameters())
    first = ARSAdamW(params, ars=ars)
    train(first, params, 3)
    state = copy.deepcopy(get_optimizer_state_dict(model, first))
    other.load_state_dict(model.state_dict())
    second = ARSAdamW(copies, ars=ars)
    set_optimizer_state_dict(other, second, state)
    if ars is not None:  # which torch leaves to others
        second.controller.load_state_dict(first.controller.state_dict())
    expected = train(first, params, 3, first=3)
    assert all(map(torch.equal, train(second, copies, 3, first=3), expected))


@pytest.mark.parametrize("implementation", ["loop", "fused", "triton"])
def test_a_warm_up_from_zero_is_torchs(implementation):
    def run(build):
        params = parameters(shapes=((5,), (3, 4)))
        optimizer = build(params)
        for step in range(4):
            optimizer.param_groups[0]["lr"] = 0.01 * step
            gradients(params, step)
            if step == 0:  # one gradient of zeros among others is no trial
                params[0].grad.zero_()
            optimizer.step()
        return params, optimizer

    expected, theirs = run(lambda params: torch.optim.AdamW(params, lr=0.0))
    params, ours = run(lambda params: make(implementation, params, lr=0.0, ars=None))
    for a, b in zip(params, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert float(ours.state[a]["step"]) == float(theirs.state[b]["step"]) == 4


def with_a_closure(optimizer, params):
    """Its gradients are those before the closure, which may have been zeroed."""

    def closure():
        gradients(params, 0)
        return torch.ones(())

    optimizer.step(closure)


def with_a_rate(optimizer, _):
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()


def with_a_state(optimizer, params):
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    params[0].grad.zero_()
    optimizer.step()


@pytest.mark.parametrize(
    ("step", "config", "count"),
    [
        (with_a_closure, ARSConfig(), 1),
        (with_a_rate, ARSConfig(), 1),
        (with_a_state, ARSConfig(), 2),
        (lambda optimizer, _: optimizer.step(surprise=1.0), ARSConfig(surprise="entropy"), 1),
    ],
)
def test_what_is_no_trial_is_a_step(step, config, count):
    params = parameters(shapes=((5,),))
    optimizer = ARSAdamW(params, lr=0.0, ars=config)
    params[0].grad = torch.zeros(5)
    step(optimizer, params)
    assert float(optimizer.state[params[0]]["step"]) == count
    assert optimizer.controller.counts.tolist() == [count, count]


def test_wrapper_tensors_take_the_loop():
    """The kernels would take the norm of one rank's shard of a DTensor for that of the whole."""
    start = torch.arange(3.0)
    params = [TwoTensor(start.clone(), start.clone()).requires_grad_()]
    optimizer = ARSAdamW(params, lr=0.1, max_grad_norm=0.5)
    assert optimizer._implementation == "loop"
    for explicit in ({"fused": True}, {"foreach": True}):
        with pytest.raises(RuntimeError, match=r"not for a TwoTensor, .*: leave both None"):
            ARSAdamW(params, **explicit)


@pytest.mark.parametrize("mode", ["stochastic_rounding", "master_weights"])
def test_the_bits_of_wrapper_tensors_are_refused(mode):
    """Reading them would give garbage, or fail in the first step."""
    start = torch.arange(3.0, dtype=torch.bfloat16)
    wrapped = TwoTensor(start.clone(), start.clone()).requires_grad_()
    with pytest.raises(RuntimeError, match=r"bits of a parameter, which a TwoTensor .*: train it"):
        ARSAdamW([wrapped], **{mode: True})
    optimizer = ARSAdamW([start.clone().requires_grad_()], **{mode: True})
    with pytest.raises(RuntimeError, match="TwoTensor"):
        optimizer.add_param_group({"params": [wrapped]})
    assert len(optimizer.param_groups) == 1


def test_wrapper_tensors_in_an_added_group_take_the_loop():
    start = torch.arange(3.0)
    optimizer = ARSAdamW([start.clone().requires_grad_()])
    assert optimizer._implementation == "fused"
    wrapped = TwoTensor(start.clone(), start.clone()).requires_grad_()
    optimizer.add_param_group({"params": [wrapped]})
    assert optimizer._implementation == "loop"
    optimizer = ARSAdamW([start.clone().requires_grad_()], fused=True)
    with pytest.raises(RuntimeError, match="not for a TwoTensor"):
        optimizer.add_param_group({"params": [wrapped]})
    assert len(optimizer.param_groups) == 1


def test_sharded_parameters_are_clipped_and_gated_as_whole_ones(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        whole = Model()
        sharded = fully_shard(copy.deepcopy(whole), mesh=init_device_mesh("cpu", (1,)))
        results = []
        for model in (whole, sharded):
            params = list(model.parameters())
            optimizer = ARSAdamW(params, lr=0.1, max_grad_norm=0.5)
            for step in range(1, 4):
                for param in params:
                    param.grad = param.detach() * step
                optimizer.step()
            results.append([getattr(p, "full_tensor", lambda p=p: p)() for p in params])
            results[-1].append(optimizer.diagnostics["grad_norm"])
    finally:
        torch.distributed.destroy_process_group()
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected)
