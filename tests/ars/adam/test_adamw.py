"""ARSAdamW and ARSAdam: against torch, and every implementation against the loop."""

import pytest
import torch
from optimizers import IMPLEMENTATIONS, Pull, gradients, make, parameters, train

from ars import ARSAdamW, ARSConfig, reference

CONFIGS = {
    "off": None,
    # So sensitive that 14 steps exercise the trend, the threshold and the significance.
    "on": ARSConfig(window=12, threshold=0.2, significance=0.5),
    "paper": ARSConfig.paper(),
    "all gates": ARSConfig(
        window=12, threshold=0.2, significance=0.5, gate=("lr", "grad", "betas"), resonance=0.5,
        release=3,
    ),
}  # fmt: skip


def assert_equal(ours, theirs, rtol=1e-6):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


def test_on_a_cpu_the_default_is_bitwise_torch_fused():
    a, b = parameters(), parameters()
    expected = train(torch.optim.AdamW(a, fused=True), a, 20)
    assert all(map(torch.equal, train(ARSAdamW(b, ars=None), b, 20), expected))


@pytest.mark.parametrize(
    ("config", "mode"),
    [*((name, "coupled") for name in CONFIGS), ("off", None), ("on", "proximal")],
)
@pytest.mark.parametrize("implementation", ["foreach", "fused", "triton"])
def test_implementations_agree(implementation, config, mode):
    """Controller, clipping, penalty, amsgrad, an ascending group, a missed gradient: at once."""

    def run(which):
        params = parameters()
        penalty = None if mode is None else Pull(params, mode=mode, skip=(1,))
        ascending = {"params": params[2:], "betas": (0.8, 0.9), "maximize": True}
        groups = [{"params": params[:2], "lr": 0.03}, ascending]
        settings = {
            "ars": CONFIGS[config],
            "penalty": penalty,
            "max_grad_norm": 2.0,
            "amsgrad": True,
        }
        optimizer = make(which, groups, **settings)
        seen = []
        for step in range(14):
            gradients(params, step, scale=0.1 if step % 5 else 10.0)
            if step == 3:
                params[2].grad = None
            optimizer.step()
            seen.append({name: float(value) for name, value in optimizer.diagnostics.items()})
        return params, seen

    expected, theirs = run("loop")
    params, ours = run(implementation)
    assert_equal(params, expected, rtol=3e-6)
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7, nan_ok=True)
    if mode is not None:
        assert ours[0]["penalty"] > 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_first_step_by_hand(implementation):
    """One element, every number written out: gate 1 - the first step has no history."""
    param = torch.tensor([2.0], requires_grad=True)
    penalty = Pull([param], strength=4.0)
    penalty.rows = [(param, torch.tensor([1.0]), torch.tensor([0.5]))]
    optimizer = make(implementation, [param], lr=0.1, weight_decay=0.5, penalty=penalty)
    param.grad = torch.tensor([-10.0])
    optimizer.step()
    # g = -10 + 4 * 0.5 * (2 - 1) = -8; the first Adam step is lr * sign(g); decay 1 - 0.1 * 0.5.
    assert float(param.detach()) == pytest.approx(2.0 * 0.95 + 0.1, rel=1e-6)
    said = {name: float(value) for name, value in optimizer.diagnostics.items()}
    assert said["penalty"] == pytest.approx(0.5 * 4.0 * 0.5 * 1.0)
    assert said["grad_norm"] == said["surprise"] == pytest.approx(10.0)
    assert (said["phi"], said["psi"], said["rho"], said["chi"]) == (1.0, 1.0, 0.0, 0.0)
    assert (said["lr"], said["beta1"], said["beta2"]) == pytest.approx((0.1, 0.9, 0.999))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gate_reaches_the_moments(implementation):
    """With the gate at phi, m after one step is (1 - beta1 phi) g, and the correction fits it."""
    param = torch.zeros(4, requires_grad=True)
    optimizer = make(implementation, [param], lr=0.1, weight_decay=0.0, ars=ARSConfig.paper())
    param.grad = torch.full((4,), 2.0)
    optimizer.step(loss=torch.tensor(1.5))
    phi = 0.1 + 0.9 * torch.exp(torch.tensor(-1.5))
    assert float(optimizer.diagnostics["phi"]) == pytest.approx(float(phi))
    state = optimizer.state[param]
    torch.testing.assert_close(state["exp_avg"], torch.full((4,), float(1 - 0.9 * phi) * 2))
    torch.testing.assert_close(param.detach(), torch.full((4,), -0.1))
    assert state["beta_products"].tolist() == pytest.approx([0.9 * float(phi), 0.999 * float(phi)])
    assert float(state["step"]) == 1


@pytest.mark.parametrize("implementation", ["loop", "fused", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_float32_moments(implementation, dtype):
    params = parameters(dtype)
    penalty = Pull(params)
    optimizer = make(implementation, params, lr=0.01, penalty=penalty)
    gradients(params, 0)
    expected = []
    for param, anchor, importance in penalty.rows:
        zeros = torch.zeros(param.shape)
        result = reference.adam_step(
            param.detach(), param.grad, zeros, zeros, lr=0.01, beta1=0.9, beta2=0.999,
            correction1=1 - 0.9, correction2=1 - 0.999, eps=1e-8, weight_decay=0.01,
            anchor=anchor, importance=importance, strength=3.0,
        )  # fmt: skip
        expected.append(result.param)
    optimizer.step()
    for param, result in zip(params, expected, strict=True):
        assert optimizer.state[param]["exp_avg"].dtype == torch.float32
        # One unit in the last place: the interpreter truncates bf16 where torch rounds.
        bits = (param.detach().view(torch.int16).int() - result.view(torch.int16).int()).abs()
        assert not bits.numel() or int(bits.max()) <= 1


@pytest.mark.parametrize("mode", ["coupled", "proximal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tensors_are_cut_and_small_ones_gathered(dtype, mode):
    """Tensors of several blocks, of one, of a part of one, with and without a penalty."""

    def run(implementation):
        params = parameters(dtype, shapes=((70_001,), (5,), (65_536,), (0,), (200_000,), (3, 7)))
        penalty = Pull(params, mode=mode, skip=(1,))
        optimizer = make(implementation, params, penalty=penalty, max_grad_norm=1.0)
        return train(optimizer, params, 2), float(optimizer.diagnostics["penalty"])

    (ours, value), (expected, penalty) = run("fused"), run("loop")
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert value == pytest.approx(penalty, rel=1e-5)


def test_differentiable_equals_the_loop_and_has_a_gradient():
    lr = torch.tensor(0.1, requires_grad=True)
    start = torch.randn(4, requires_grad=True)
    param = start.clone()
    param.grad = torch.randn(4)
    optimizer = ARSAdamW([param], lr=lr, differentiable=True, ars=None, weight_decay=0.0)
    optimizer.step()
    param.sum().backward()
    assert float(lr.grad) == pytest.approx(-float(param.grad.sign().sum()), rel=1e-5)
