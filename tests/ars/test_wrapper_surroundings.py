"""ARSOptimizer among schedulers, checkpoints, closures, scalers and hooks."""

import copy
import pickle

import pytest
import torch
from optimizers import gradients, parameters
from test_wrapper import BASES, BRAKING, MATRICES, run, spiky, wrapped

from ars import ARSConfig, ARSOptimizer
from ars.wrapper import _GatedGradients

RATE = ARSConfig.paper(window=6, gate=("lr",))


@pytest.mark.parametrize("name", ["momentum", "fused", "muon"])
@pytest.mark.parametrize("on_base", [False, True])
def test_schedulers_see_what_they_set(name, on_base):
    opt, params = wrapped(name)
    plain = BASES[name](parameters(shapes=MATRICES))
    scheduled = opt.base if on_base else opt
    assert isinstance(opt, torch.optim.Optimizer)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in (scheduled, plain)]
    for step in range(9):
        gradients(params, step)
        opt.step(loss=spiky(step))
        plain.step()
        for scheduler in schedulers:
            scheduler.step()
        rate = plain.param_groups[0]["lr"]
        assert opt.param_groups[0]["lr"] == rate
    assert float(rate) < 0.01


def test_a_scheduler_of_momentum_too():
    opt, params = wrapped("momentum")
    scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.3, total_steps=9)
    for step in range(8):
        gradients(params, step)
        opt.step(loss=spiky(step))
        scheduler.step()
    assert opt.param_groups[0]["momentum"] == pytest.approx(0.95)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_alike_and_apart(copied):
    opt, params = wrapped("adamw")
    run(opt, params, 5)
    other = copied(opt)
    others = [p for group in other.param_groups for p in group["params"]]
    assert other.param_groups is other.base.param_groups
    assert other.controller.counts.data_ptr() != opt.controller.counts.data_ptr()
    expected = run(opt, params, 5, first=5)
    assert all(map(torch.equal, run(other, others, 5, first=5), expected))
    torch.optim.lr_scheduler.StepLR(other, 1)


def test_hooks_and_groups_are_those_of_an_optimizer():
    opt, params = wrapped("momentum")
    calls = []
    opt.register_step_pre_hook(lambda o, *_: calls.append(("before", o is opt)))
    opt.base.register_step_pre_hook(lambda o, *_: calls.append(("base", o is opt.base)))
    opt.register_step_post_hook(lambda o, *_: calls.append(("after", o is opt)))
    new = torch.nn.Parameter(torch.ones(2))
    opt.add_param_group({"params": [new], "lr": 0.5})
    assert opt.param_groups is opt.base.param_groups
    assert opt.state is opt.base.state
    run(opt, [*params, new], 1)
    assert calls == [("before", True), ("base", True), ("after", True)]
    assert new in opt.state
    opt.zero_grad()
    assert all(param.grad is None for param in [*params, new])
    opt.register_state_dict_post_hook(lambda o, state: {**state, "mine": "controller" in state})
    state = opt.state_dict()
    assert state["mine"] is True
    opt.register_load_state_dict_pre_hook(
        lambda o, state: {k: v for k, v in state.items() if k != "mine"}
    )
    loaded = []
    opt.register_load_state_dict_post_hook(lambda o: loaded.append(int(o.controller.counts[1])))
    run(opt, [*params, new], 2)
    opt.load_state_dict(copy.deepcopy(state))
    assert loaded == [3]  # what was saved is a reference, and deepcopied only then
    assert "Parameter Group 1" in repr(opt)


def closure_of(params, optimizer, losses, set_to_none=True):
    def closure():
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = sum((p - 1).square().sum() * (i + 1) for i, p in enumerate(params))
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    return closure


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_a_closure_is_evaluated_once_and_is_the_surprise(name, set_to_none):
    opt, params = wrapped(name)
    other, others = wrapped(name)
    for step in range(4):
        losses = []
        closure = closure_of(params, opt, losses, set_to_none)
        assert float(opt.step(closure).detach()) == losses[0]
        loss = closure_of(others, other, [])()
        other.step(loss=loss)
        assert len(losses) == 1
        assert float(opt.diagnostics["surprise"]) == losses[0]
        assert int(opt.controller.counts[1]) == step + 1
        assert all(map(torch.equal, params, others))
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("gate", ["lr", "grad"])
def test_all_evaluations_of_lbfgs_are_under_the_gate_of_the_first(gate, set_to_none):
    def build(lr):
        params = parameters(shapes=MATRICES)
        return torch.optim.LBFGS(params, lr=lr, max_iter=3), params

    base, params = build(0.2)
    opt = ARSOptimizer(base, ARSConfig.paper(gate=(gate,), jitter=0.0))
    plain, others = build(0.2)
    losses, theirs = [], []
    closure = closure_of(params, opt, losses, set_to_none)
    closure()
    grads = [param.grad for param in params]
    losses.clear()
    opt.step(closure)
    # Those that are zeroed and used again are the caller's own, in every evaluation.
    assert set_to_none or all(p.grad is grad for p, grad in zip(params, grads, strict=True))
    phi = float(opt.diagnostics["phi"])
    assert len(losses) == 3
    assert opt.controller.counts.tolist() == [1, 1]
    assert float(opt.diagnostics["surprise"]) == pytest.approx(losses[0])
    inner = closure_of(others, plain, theirs)

    def gated():
        loss = inner()
        for p in others:
            p.grad.mul_(phi)
        return loss

    if gate == "lr":
        plain.param_groups[0]["lr"] *= phi
    plain.step(inner if gate == "lr" else gated)
    for ours, expected in zip(params, others, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    assert losses == pytest.approx(theirs)
    last = [p.grad.clone() for p in others]
    for ours, expected in zip(params, last, strict=True):  # unscaled
        torch.testing.assert_close(ours.grad * (phi if gate == "grad" else 1.0), expected)
    assert base.param_groups[0]["lr"] == 0.2


def test_a_gradient_that_an_evaluation_does_not_give_does_not_come_back():
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    gradients_of = _GatedGradients([{"params": [param]}], 0.5)
    gradients_of.put()
    assert param.grad.tolist() == [0.5, 0.5]
    gradients_of.restore()
    assert param.grad.tolist() == [1.0, 1.0]
    param.grad = None
    gradients_of.put()
    gradients_of.restore()
    assert param.grad is None


@pytest.mark.parametrize("name", ["momentum", "fused"])
def test_a_step_that_the_scaler_skips_does_not_move_the_controller(name):
    opt, params = wrapped(name)
    plain, others = wrapped(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=100)
    scaler.scale(torch.ones(()))  # makes its scale
    for step in range(4):
        gradients(params, step, scale=64.0)
        gradients(others, step)
        plain.step(loss=spiky(step))
        scaler.step(opt, loss=spiky(step))
        scaler.update()
    assert all(map(torch.equal, params, others))
    before, counts = [p.detach().clone() for p in params], opt.controller.counts.tolist()
    gradients(params, 9)
    params[0].grad[0, 0] = torch.inf
    scaler.step(opt, loss=9.0)
    scaler.update()
    assert scaler.get_scale() == 32.0
    assert opt.controller.counts.tolist() == counts == [4, 4]
    assert all(map(torch.equal, params, before))


def test_the_step_that_only_makes_the_state_is_not_observed():
    """torch.distributed.checkpoint takes it: all rates 0, all gradients 0."""
    opt, params = wrapped("adamw", BRAKING)
    opt.param_groups[0]["lr"] = 0.0
    for param in params:
        param.grad = torch.zeros_like(param)
    opt.step()
    assert opt.state
    assert opt.controller.counts.tolist() == [0, 0]


def test_parameters_may_move_before_the_first_step():
    with torch.device("meta"):
        model = torch.nn.Linear(3, 2)
    opt = ARSOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), RATE)
    model.to_empty(device="cpu")
    opt.base.param_groups[0]["params"] = list(model.parameters())
    for param in model.parameters():
        torch.nn.init.ones_(param)
        param.grad = torch.ones_like(param)
    opt.step(loss=1.0)
    phi = float(opt.diagnostics["phi"])
    assert phi < 0.5
    assert float(model.weight.detach()[0, 0]) == pytest.approx(1 - 0.1 * phi)


def test_inside_a_compiled_function():
    opt, params = wrapped("adamw")
    other, others = wrapped("adamw")
    compiled = torch.compile(lambda loss: opt.step(loss=loss), backend="aot_eager")
    for step in range(3):
        gradients(params, step)
        gradients(others, step)
        compiled(spiky(step))
        other.step(loss=spiky(step))
    assert all(map(torch.equal, params, others))


@pytest.mark.parametrize("given", [{"loss": 9.0}, {}])
def test_in_inference_mode_gradients_are_gated_and_put_back(given):
    """Its tensors have no version counter."""
    results = []
    for inference in (False, True):
        opt, params = wrapped("momentum")
        with torch.inference_mode(inference):
            for step in range(9):  # a window and more
                gradients(params, step)
                grads = [param.grad for param in params]
                opt.step(**given)
                assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
        results.append([param.detach().clone() for param in params])
    assert all(map(torch.equal, *results))
