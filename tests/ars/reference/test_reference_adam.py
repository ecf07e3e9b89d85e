"""The definition of the step against torch, float64 closed forms and autograd."""

import math

import pytest
import torch

from ars import reference

HYPER = {"lr": 0.01, "eps": 1e-8}


def constant(step, beta1=0.9, beta2=0.999):
    corrections = {"correction1": 1 - beta1**step, "correction2": 1 - beta2**step}
    return {"beta1": beta1, "beta2": beta2, **corrections}


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adam])
def test_equals_torch_over_100_steps(cls, amsgrad, maximize):
    param = torch.randn(50, dtype=torch.float64, requires_grad=True)
    flags = {"amsgrad": amsgrad, "maximize": maximize}
    optimizer = cls([param], lr=0.01, weight_decay=0.1, foreach=False, **flags)
    theta = param.detach().clone()
    m, v, largest = (torch.zeros_like(theta) for _ in range(3))
    for step in range(1, 101):
        param.grad = torch.randn_like(theta) * step
        theta, m, v, largest = reference.adam_step(
            theta, param.grad, m, v, largest if amsgrad else None,
            **HYPER, **constant(step), weight_decay=0.1, maximize=maximize,
            decoupled=cls is torch.optim.AdamW,
        )  # fmt: skip
        optimizer.step()
    torch.testing.assert_close(theta, param.detach(), rtol=1e-12, atol=1e-12)
    state = optimizer.state[param]
    torch.testing.assert_close(m, state["exp_avg"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(v, state["exp_avg_sq"], rtol=1e-12, atol=1e-12)


def test_product_correction_is_exact_for_a_constant_gradient():
    """With products of the betas, m^ = g and v^ = g^2 whatever the betas were; powers fail."""
    gradient = torch.tensor([3.0, -0.5], dtype=torch.float64)
    m = v = torch.zeros_like(gradient)
    betas = [(0.9, 0.99), (0.1, 0.5), (0.95, 0.999), (0.0, 0.2), (0.7, 0.9)]
    product1 = product2 = 1.0
    for beta1, beta2 in betas:
        product1, product2 = product1 * beta1, product2 * beta2
        result = reference.adam_step(
            torch.zeros_like(gradient), gradient, m, v, lr=0.1, eps=0.0, weight_decay=0.0,
            beta1=beta1, beta2=beta2, correction1=1 - product1, correction2=1 - product2,
        )  # fmt: skip
        m, v = result.exp_avg, result.exp_avg_sq
        torch.testing.assert_close(result.param, -0.1 * gradient.sign(), rtol=1e-12, atol=0)
    assert not math.isclose(1 - 0.7**5, 1 - product1, rel_tol=0.05)


def test_coupled_penalty_is_its_autograd_gradient():
    """The step with the penalty equals a step on the gradient of task plus penalty."""
    theta = torch.randn(20, dtype=torch.float64, requires_grad=True)
    anchor, importance = torch.randn(20).double(), torch.rand(20).double()
    task = (theta**3).sum()
    (gradient,) = torch.autograd.grad(task, theta)
    value = reference.ewc_value(theta, anchor, importance, 7.0)
    (pull,) = torch.autograd.grad(value, theta)
    torch.testing.assert_close(
        pull, reference.ewc_gradient(theta.detach(), anchor, importance, 7.0)
    )
    start = theta.detach()
    zeros = torch.zeros_like(start)
    common = {**HYPER, **constant(1), "weight_decay": 0.1}
    fused = reference.adam_step(
        start, gradient, zeros, zeros, **common, clip=0.5,
        anchor=anchor, importance=importance, strength=7.0,
    )  # fmt: skip
    plain = reference.adam_step(start, 0.5 * gradient + pull, zeros, zeros, **common)
    torch.testing.assert_close(fused.param, plain.param, rtol=1e-13, atol=0)


def test_maximize_does_not_reverse_the_penalty():
    theta, anchor = torch.ones(1).double(), torch.zeros(1).double()
    zeros = torch.zeros(1).double()
    result = reference.adam_step(
        theta, zeros, zeros, zeros, **HYPER, **constant(1), weight_decay=0.0, maximize=True,
        anchor=anchor, importance=torch.ones(1).double(), strength=1.0,
    )  # fmt: skip
    assert float(result.param) < 1.0


def test_proximal_step_solves_its_own_problem():
    """It minimises (x - y)^2 d / (2 lr) + lambda Omega (x - a)^2 / 2 after the Adam step to y."""
    theta, anchor = torch.randn(9).double(), torch.randn(9).double()
    importance, gradient, zeros = torch.rand(9).double(), torch.randn(9).double(), torch.zeros(9)
    zeros, strength = zeros.double(), 40.0
    common = {**HYPER, **constant(1), "weight_decay": 0.0}
    after_task = reference.adam_step(theta, gradient, zeros, zeros, **common)
    result = reference.adam_step(
        theta, gradient, zeros, zeros, **common,
        anchor=anchor, importance=importance, strength=strength, proximal=True,
    )  # fmt: skip
    metric = reference.adam_denominator(result.exp_avg_sq, common["correction2"], 1e-8)
    stationary = metric * (result.param - after_task.param) / HYPER["lr"]
    stationary += strength * importance * (result.param - anchor)
    assert float(stationary.abs().max()) < 1e-10


@pytest.mark.parametrize("strength", [1e12, 1e30])
def test_proximal_step_is_stable_for_every_strength(strength):
    theta = torch.ones(3).double()
    zeros = torch.zeros(3).double()
    result = reference.adam_step(
        theta, theta, zeros, zeros, **HYPER, **constant(1), weight_decay=0.0, anchor=zeros,
        importance=torch.ones(3).double(), strength=strength, proximal=True,
    )  # fmt: skip
    assert float(result.param.abs().max()) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    theta, gradient = torch.randn(1000).to(dtype), torch.randn(1000).to(dtype)
    zeros = torch.zeros(1000)
    half = reference.adam_step(theta, gradient, zeros, zeros, **HYPER, **constant(1),
                               weight_decay=0.1)  # fmt: skip
    full = reference.adam_step(theta.float(), gradient.float(), zeros, zeros, **HYPER,
                               **constant(1), weight_decay=0.1)  # fmt: skip
    assert half.param.dtype == dtype
    assert torch.equal(half.param, full.param.to(dtype))
    assert half.exp_avg.dtype == torch.float32


def test_scalars_may_be_tensors():
    theta, gradient, zeros = torch.randn(5), torch.randn(5), torch.zeros(5)
    numbers = {**HYPER, **constant(3)}
    tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in numbers.items() if k != "eps"}
    a = reference.adam_step(theta, gradient, zeros, zeros, **numbers, weight_decay=0.1)
    b = reference.adam_step(theta, gradient, zeros, zeros, **tensors, eps=1e-8, weight_decay=0.1)
    torch.testing.assert_close(a.param, b.param, rtol=3e-7, atol=0)
    assert b.param.dtype == torch.float32


def test_arguments_are_not_changed():
    tensors = [torch.randn(4) for _ in range(2)] + [torch.rand(4) for _ in range(5)]
    before = [t.clone() for t in tensors]
    param, grad, m, v, largest, anchor, importance = tensors
    reference.adam_step(
        param, grad, m, v, largest, **HYPER, **constant(1), weight_decay=0.1, anchor=anchor,
        importance=importance, strength=1.0, proximal=True,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_norm_and_clip_equal_torch():
    params = [torch.randn(7, requires_grad=True), torch.randn(3, 4, requires_grad=True)]
    for p in params:
        p.grad = torch.randn_like(p) * 10
    grads = [p.grad.clone() for p in params]
    norm = reference.grad_norm(grads)
    assert norm.dtype == torch.float64
    assert float(norm) == pytest.approx(float(torch.nn.utils.clip_grad_norm_(params, 1.0)))
    clip = reference.clip_coefficient(norm, 1.0)
    torch.testing.assert_close(clip * grads[0], params[0].grad, rtol=1e-6, atol=0)
    assert float(reference.clip_coefficient(torch.tensor(0.5), 1.0)) == 1.0
    tiny = torch.tensor(1e-6, dtype=torch.float64)
    assert float(reference.clip_coefficient(tiny, 1e-6)) == pytest.approx(0.5)  # torch's 1e-6
