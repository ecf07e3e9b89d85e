"""What a step must not depend on: default device, inference mode, how many tensors there are."""

import pytest
import torch
from optimizers import IMPLEMENTATIONS, Pull, gradients, make, parameters, train

from ars import ARSAdamW, ARSConfig
from ars.csrc_triton import launches

GATES = (("betas",), ("lr",), ("grad",))


def trained(implementation, place, dtype=torch.float32, **settings):
    """Train under a default device: compressed importance, clipping, two groups, a strided one."""
    params = parameters(dtype)
    params[2].data = params[2].data.t().contiguous().t()[::2]
    pull = Pull(params, skip=(2, 4))
    pull.rows += [(params[4], torch.ones(129), torch.full((129,), 9).byte(), torch.ones(3))]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}]
    if implementation == "triton":  # which does not take gaps
        params[2].data = params[2].data.contiguous()
    torch.set_default_device(place)
    try:
        optimizer = make(implementation, groups, penalty=pull, max_grad_norm=1.0, **settings)
        for step in range(3):
            for index, param in enumerate(params):
                param.grad = param.detach() * (step + index)
            optimizer.step(loss=1.5)
    finally:
        torch.set_default_device(None)
    return params


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_default_device_is_not_where_a_step_works(implementation, gate):
    """``torch.set_default_device("cuda")`` in a script; meta tensors have no values to read."""
    config = ARSConfig.paper(window=5, gate=gate)
    expected = trained(implementation, "cpu", ars=config)
    result = trained(implementation, "meta", ars=config)
    assert all(map(torch.equal, result, expected))


@pytest.mark.parametrize("mode", ["stochastic_rounding", "master_weights"])
@pytest.mark.parametrize("implementation", ["loop", "triton"])
def test_nor_where_bfloat16_is_rounded(implementation, mode):
    expected = trained(implementation, "cpu", torch.bfloat16, **{mode: True})
    result = trained(implementation, "meta", torch.bfloat16, **{mode: True})
    assert all(map(torch.equal, result, expected))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_step_in_inference_mode_leaves_nothing_that_cannot_be_written_later(implementation):
    results = []
    for inference in (False, True):
        params = parameters()
        optimizer = make(implementation, params, penalty=Pull(params), max_grad_norm=0.1)
        train(optimizer, params, 1, loss=1.0)
        gradients(params, 1)
        params[0].grad = None  # other tensors than before, other tables
        with torch.inference_mode(inference):
            optimizer.step(loss=1.0)
        results.append(train(optimizer, params, 2, first=2, loss=1.0))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_the_loop_takes_every_gate_where_numbers_are_not_on_the_host(gate, tensors):
    """As on a GPU: on the meta device reading a number raises. Tensors of one element mix."""
    params = [torch.empty(3, device="meta", requires_grad=True)]
    numbers = {"lr": torch.full((1,), 0.1), "betas": (torch.full((1,), 0.9), torch.tensor(0.99))}
    config = ARSConfig(window=5, gate=gate)
    optimizer = ARSAdamW(params, foreach=False, max_grad_norm=1.0, ars=config)
    if tensors:
        optimizer.param_groups[0].update(numbers)
    params[0].grad = torch.empty(3, device="meta")
    optimizer.step(loss=torch.empty((), device="meta"))
    state = optimizer.state[params[0]]
    assert ("beta_products" in state) == ("betas" in gate)
    assert all(value.is_meta for name, value in state.items() if name != "step")


@pytest.mark.parametrize("tensors", [10, 1_000])
@pytest.mark.parametrize("clip", [None, 1.0], ids=["free", "clip"])
@pytest.mark.parametrize("loss", [None, 1.0], ids=["norm", "loss"])
def test_launches_do_not_depend_on_the_number_of_tensors(tensors, clip, loss, monkeypatch):
    names = []
    monkeypatch.setattr(
        launches, "launch", lambda kernel, *_, **__: names.append(kernel.fn.__name__)
    )
    params = [torch.ones(2, requires_grad=True) for _ in range(tensors)]
    groups = [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.0}]
    optimizer = make("triton", groups, penalty=Pull(params), max_grad_norm=clip)
    for param in params:
        param.grad = torch.ones(2)
    for _ in range(2):
        optimizer.step(loss=loss)
    assert names == ["control_kernel", "adam_kernel"] * 2
