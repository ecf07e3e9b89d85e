"""Under a GradScaler: gradients unscaled in the step, and nothing moves when one overflowed."""

import copy
import math

import pytest
import torch
from optimizers import IMPLEMENTATIONS, Pull, gradients, make, parameters

from ars import ARSConfig

SHAPES = ((5,), (3, 4), (2,))
SETTINGS = {"lr": 0.01, "max_grad_norm": 1.0}


def scaled_gradients(params, seed, scale, infinite=False):
    gradients(params, seed)
    for param in params:
        param.grad *= scale
    if infinite:
        params[1].grad[0, 2] = math.inf


def scaler(growth_interval=2):
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=growth_interval)


def scaled_step(optimizer, params, grad_scaler, seed, infinite=False, unscale=False, **step):
    scale = grad_scaler.scale(torch.ones(())).item()  # makes the scaler's tensors, too
    scaled_gradients(params, seed, scale, infinite)
    if unscale:
        grad_scaler.unscale_(optimizer)
    grad_scaler.step(optimizer, **step)
    grad_scaler.update()


def whole_state(optimizer):
    """Everything that a step may change, as a list of tensors."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [p.detach() for p in params]
    tensors += [value for p in params for value in optimizer.state[p].values()]
    tensors += [optimizer._buffer]
    if optimizer.controller is not None:
        tensors += optimizer.controller.state_dict().values()
    return copy.deepcopy(tensors)


def same(ours, theirs):
    return all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("loss", [None, 0.5])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_run_with_overflows_is_the_unscaled_run_without_them(implementation, loss):
    params, plain = parameters(shapes=SHAPES), parameters(shapes=SHAPES)
    ours = make(implementation, params, penalty=Pull(params), **SETTINGS)
    theirs = make(implementation, plain, penalty=Pull(plain), **SETTINGS)
    assert ours._step_supports_amp_scaling
    grad_scaler = scaler()
    seeds = [0, 1, "overflow", 2, 3, "overflow", 4]
    for seed in seeds:
        if seed == "overflow":
            before = whole_state(ours)
            scaled_step(ours, params, grad_scaler, 9, infinite=True, loss=loss)
            assert same(whole_state(ours), before)
            continue
        scaled_step(ours, params, grad_scaler, seed, loss=loss)
        gradients(plain, seed)
        theirs.step(loss=loss)
    for a, b in zip(whole_state(ours), whole_state(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, equal_nan=True)
    assert grad_scaler.get_scale() == 1024.0 * 2 / 2 * 2 / 2
    assert not hasattr(ours, "grad_scale")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_overflow_in_the_first_step_leaves_a_fresh_state(implementation):
    params = parameters(shapes=SHAPES)
    optimizer = make(implementation, params, **{**SETTINGS, "ars": ARSConfig.paper(window=5)})
    before = [param.detach().clone() for param in params]
    scaled_step(optimizer, params, scaler(), 0, infinite=True)
    assert same([param.detach() for param in params], before)
    for param in params:
        state = dict(optimizer.state[param])
        assert state.pop("beta_products").tolist() == [1.0, 1.0]
        assert not any(map(torch.count_nonzero, state.values()))
    assert int(optimizer.controller.counts.sum()) == 0


@pytest.mark.parametrize("implementation", ["loop", "fused", "triton"])
def test_scaled_half_precision_gradients_are_unscaled_in_float32(implementation):
    """Divided in float16, a gradient of 1e-6 would lose most of its digits."""
    param = torch.ones(4, dtype=torch.float16, requires_grad=True)
    optimizer = make(implementation, [param], ars=None)
    param.grad = torch.full((4,), 0.001, dtype=torch.float16)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    optimizer.step()
    expected = float(param.grad[0]) / 1024 * (1 - 0.9)
    torch.testing.assert_close(
        optimizer.state[param]["exp_avg"], torch.full((4,), expected), rtol=1e-5, atol=0
    )
    assert float(param.grad[0]) == float(torch.tensor(0.001).half())  # as the user left it


def test_where_reading_would_wait_the_scaler_skips_the_step_itself():
    optimizer = make("loop", [torch.empty(3, device="meta", requires_grad=True)])
    optimizer._move_to_parameters()  # as on a GPU: neither torch's CPU kernels nor ours
    assert optimizer._implementation == "loop"
    assert not optimizer._step_supports_amp_scaling


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_penalty_gradients_are_not_unscaled(implementation):
    class Constant:
        strength, mode = 1.0, "coupled"

        def __init__(self, param):
            self.param, self.buffer = param, torch.empty_like(param)

        def terms(self):
            return []

        def gradients(self):
            return [(self.param, self.buffer)]

        def refresh(self):
            self.buffer.fill_(1.0)
            return torch.tensor(5.0)

    param = torch.ones(4, requires_grad=True)
    optimizer = make(implementation, [param], ars=None, penalty=Constant(param))
    param.grad = torch.full((4,), 1024.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(512.0), torch.tensor(0.0)
    optimizer.step()
    assert float(optimizer.state[param]["exp_avg"][0]) == pytest.approx(0.1 * (2.0 + 1.0))
    assert float(optimizer.diagnostics["penalty"]) == 5.0
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.penalty.refresh = lambda: torch.tensor(9.0)
    optimizer.step()
    assert float(optimizer.diagnostics["penalty"]) == 5.0
