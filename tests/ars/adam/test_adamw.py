"""ARSAdamW and ARSAdam: against torch, and every implementation against the loop."""

import pytest
import torch
from optimizers import IMPLEMENTATIONS, Pull, gradients, make, parameters, train

from ars import ARSAdam, ARSAdamW, ARSConfig, reference

FLAGS = ({}, {"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.3, "betas": (0.5, 0.7)})

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


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("cls", [ARSAdamW, ARSAdam], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_ars_it_is_torch(implementation, cls, flags):
    """100 steps, two groups, one gradient missing on the way."""
    steps = 12 if implementation == "triton" else 100  # the interpreter is slow

    def run(build):
        params = parameters()
        groups = [{"params": params[:2], "lr": 0.03, "weight_decay": 0.2}, {"params": params[2:]}]
        optimizer = build(groups)
        for step in range(steps):
            gradients(params, step)
            if step == 3:
                params[2].grad = None
            optimizer.step()
        return params, optimizer

    theirs = torch.optim.AdamW if cls is ARSAdamW else torch.optim.Adam
    expected, _ = run(lambda groups: theirs(groups, **flags))
    params, _ = run(lambda groups: make(implementation, groups, cls, ars=None, **flags))
    assert_equal(params, expected)


def test_on_a_cpu_the_default_is_bitwise_torch_fused():
    a, b = parameters(), parameters()
    expected = train(torch.optim.AdamW(a, fused=True), a, 20)
    assert all(map(torch.equal, train(ARSAdamW(b, ars=None), b, 20), expected))


@pytest.mark.parametrize("mode", ["coupled", "proximal", None])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("implementation", ["foreach", "fused", "triton"])
def test_implementations_agree(implementation, config, mode):
    """Controller, clipping, penalty, amsgrad, an ascending group, a missed gradient: at once."""

    def run(which):
        params = parameters()
        penalty = None if mode is None else Pull(params, mode=mode, skip=(1,))
        ascending = {"params": params[2:], "betas": (0.8, 0.9), "maximize": True}
        groups = [{"params": params[:2], "lr": 0.03}, ascending]
        settings = {"ars": config, "penalty": penalty, "max_grad_norm": 2.0, "amsgrad": True}
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


@pytest.mark.parametrize("implementation", ["loop", "fused"])
def test_strided_and_complex_parameters_equal_dense_ones(implementation):
    dense = torch.randn(6, 8, requires_grad=True)
    strided = dense.detach().clone().T.contiguous().T.requires_grad_()
    wave = torch.randn(5, dtype=torch.complex64, requires_grad=True)
    real = torch.view_as_real(wave.detach()).clone().requires_grad_()
    settings = {"max_grad_norm": 1.0, "lr": 0.01}
    a, b = ([dense, real], [strided, wave])
    first, second = make(implementation, a, **settings), make(implementation, b, **settings)
    for seed in range(5):
        gradients(a, seed)
        strided.grad, wave.grad = dense.grad.clone(), torch.view_as_complex(real.grad.clone())
        first.step()
        second.step()
    assert_equal([strided, torch.view_as_real(wave.detach())], a)


def test_differentiable_equals_the_loop_and_has_a_gradient():
    lr = torch.tensor(0.1, requires_grad=True)
    start = torch.randn(4, requires_grad=True)
    param = start.clone()
    param.grad = torch.randn(4)
    optimizer = ARSAdamW([param], lr=lr, differentiable=True, ars=None, weight_decay=0.0)
    optimizer.step()
    param.sum().backward()
    assert float(lr.grad) == pytest.approx(-float(param.grad.sign().sum()), rel=1e-5)


@pytest.mark.parametrize("implementation", ["loop", "fused", "triton"])
def test_learning_rate_may_be_a_tensor(implementation):
    a, b = parameters(), parameters()
    lr = torch.tensor(0.01)
    first, second = make(implementation, a, lr=lr), make(implementation, b, lr=0.01)
    train(first, a, 2)
    train(second, b, 2)
    lr.fill_(0.05)
    second.param_groups[0]["lr"] = 0.05
    assert_equal(train(first, a, 2, first=2), train(second, b, 2, first=2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_schedulers_change_rate_and_betas(implementation):
    def run(which, ars):
        params = parameters(shapes=((5,),))
        optimizer = make(which, params, ars=ars, lr=0.01)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=12)
        for step in range(10):
            gradients(params, step)
            optimizer.step()
            scheduler.step()
        return params

    assert_equal(run(implementation, ARSConfig()), run("loop", ARSConfig()))
    params = parameters(shapes=((5,),))
    adamw = torch.optim.AdamW(params, lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(adamw, max_lr=0.1, total_steps=12)
    for step in range(10):
        gradients(params, step)
        adamw.step()
        scheduler.step()
    assert_equal(run(implementation, None), params)


def test_closure_and_loss():
    params = parameters(shapes=((5,),))
    optimizer = ARSAdamW(params)

    def closure():
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    loss = closure().item()
    assert optimizer.step(closure).item() == loss
    assert float(optimizer.diagnostics["surprise"]) == pytest.approx(loss)
    assert optimizer.step(loss=0.25) is None
    assert float(optimizer.diagnostics["surprise"]) == 0.25


def test_nothing_moves_without_gradients():
    params = parameters()
    optimizer = ARSAdamW(params)
    optimizer.step(loss=1.0)
    assert not optimizer.state
    assert int(optimizer.controller.counts[1]) == 0


def test_reaches_the_target():
    """Distance to the target falls by half at least; the same run twice is the same bitwise."""

    def run():
        torch.manual_seed(0)
        weight, target = torch.randn(64, requires_grad=True), torch.randn(64)
        optimizer = ARSAdamW([weight], lr=0.05, weight_decay=0.0)
        for _ in range(50):
            optimizer.zero_grad()
            loss = (weight - target).square().sum()
            loss.backward()
            optimizer.step(loss=loss)
        return weight.detach(), float((weight - target).detach().norm())

    (weight, distance), (again, _) = run(), run()
    torch.manual_seed(0)
    start = float((torch.randn(64) - torch.randn(64)).norm())
    assert distance < start / 2
    assert torch.equal(weight, again)
