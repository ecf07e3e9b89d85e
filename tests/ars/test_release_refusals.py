"""What gradient release refuses, and what happens around it."""

import gc

import pytest
import torch
from optimizers import parameters
from torch.utils.checkpoint import checkpoint

from ars import ARSAdam, ARSAdamW, GradientRelease


def loss_of(optimizer):
    return sum(param.square().sum() for param in optimizer._parameters())


def adam(**settings):
    return ARSAdamW(parameters(), **settings)


def watching():
    optimizer = adam()
    optimizer._parameters()[0].grad = torch.ones(3)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def hooked():
    optimizer = adam()
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def released_twice():
    optimizer = adam()
    optimizer.keep = GradientRelease(optimizer)
    return optimizer


def shared():
    optimizer = adam()
    optimizer.keep = ARSAdam(optimizer._parameters()[1:2])
    return optimizer


@pytest.mark.parametrize(
    ("optimizer", "match"),
    [
        (lambda: adam(max_grad_norm=1.0), "max_grad_norm needs the norm of all gradients"),
        (lambda: adam(differentiable=True), "differentiable=True needs the gradients"),
        (watching, "has watched the grad_norm and now gets the loss"),
        (hooked, "step hooks do not run"),
        (released_twice, "are released already"),
        (shared, "parameter 1 of group 0 is in another optimizer too"),
    ],
)
def test_refusals(optimizer, match):
    with pytest.raises(ValueError, match=match):
        GradientRelease(optimizer())


def test_what_becomes_refusable_later_is_refused_then():
    optimizer = adam()
    release = GradientRelease(optimizer)
    optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(ValueError, match="step hooks do not run"):
        release.backward(loss_of(optimizer))


def test_the_step_of_a_released_optimizer_is_refused():
    optimizer = adam()
    release = GradientRelease(optimizer)
    release.backward(loss_of(optimizer))
    with pytest.raises(RuntimeError, match=r"steps in GradientRelease\.backward"):
        optimizer.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(optimizer)
    release.remove()
    optimizer.step(loss=1.0)


def test_accumulation_is_refused():
    optimizer = adam()
    params = optimizer._parameters()
    release = GradientRelease(optimizer)
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match=r"outside of GradientRelease\.backward"):
        loss_of(optimizer).backward()
    with pytest.raises(RuntimeError, match=r"parameter \d of group 0 has a gradient already"):
        release.backward(loss_of(optimizer))
    assert all(map(torch.equal, before, params))
    assert not optimizer.state
    optimizer.zero_grad()
    release.backward(loss_of(optimizer))
    assert not any(map(torch.equal, before[1:3], params[1:3]))


def test_second_gradient_in_one_backward_pass_is_refused():
    weight = torch.nn.Parameter(torch.ones(3))
    release = GradientRelease(ARSAdamW([weight]))
    inputs = torch.ones(3, requires_grad=True)

    def twice(reentrant):
        hidden = inputs
        for _ in range(2):
            hidden = checkpoint(lambda x: x * weight, hidden, use_reentrant=reentrant)
        return hidden.sum()

    release.backward(twice(False))
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 has got a second gradient"):
        release.backward(twice(True))


def test_bad_losses_and_sparse_gradients():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    release = GradientRelease(ARSAdamW(embedding.parameters()))
    with pytest.raises(TypeError, match="must be a 0-d tensor, got float"):
        release.backward(1.0)
    with pytest.raises(ValueError, match="must be a scalar"):
        release.backward(embedding.weight)
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        release.backward(embedding(torch.tensor([1])).sum())
    release.remove()
    with pytest.raises(RuntimeError, match="was removed"):
        release.backward(embedding.weight.sum())


def test_an_interrupted_step_can_be_followed_by_another():
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise FloatingPointError("on purpose")

    optimizer = adam()
    release = GradientRelease(optimizer)
    first, second = optimizer._parameters()[:2]
    with pytest.raises(FloatingPointError):
        release.backward(Failing.apply(first).sum() + second.sum())
    with pytest.raises(RuntimeError, match="outside of"):
        second.sum().backward()
    optimizer.zero_grad()
    release.backward(first.sum())
    assert int(optimizer.state[first]["step"]) == 1


def test_a_loss_without_our_parameters_is_no_step():
    optimizer = adam()
    other = torch.ones(2, requires_grad=True)
    GradientRelease(optimizer).backward(other.sum())
    assert not optimizer.state
    assert int(optimizer.controller.counts[1]) == 0


def test_hooks_go_with_the_release():
    optimizer = adam()
    release = GradientRelease(optimizer)
    del release
    gc.collect()
    loss_of(optimizer).backward()
    optimizer.step(loss=1.0)


def test_groups_added_and_parameters_thawed_are_released_too():
    optimizer = adam()
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    release = GradientRelease(optimizer)
    optimizer.add_param_group({"params": [frozen]})
    release.backward(loss_of(optimizer))
    frozen.requires_grad_(True)
    release.backward(frozen.sum())
    assert frozen.grad is None
    assert int(optimizer.state[frozen]["step"]) == 1


def test_a_parameter_taken_out_of_the_optimizer_is_left_alone():
    optimizer = adam()
    lost = torch.nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [lost]})
    release = GradientRelease(optimizer)
    optimizer.param_groups.pop()
    release.backward(loss_of(optimizer) + lost.sum())
    assert lost.grad.tolist() == [1, 1]


def test_schedulers_checkpoints_and_compiled_models():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    optimizer = ARSAdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    compiled = torch.compile(model, backend="aot_eager")
    with GradientRelease(optimizer) as release:
        for lr in (0.1, 0.05):
            release.backward(compiled(torch.ones(2, 3)).square().mean())
            scheduler.step()  # torch would warn that the optimizer has not been stepped
            assert float(optimizer.diagnostics["lr"]) == pytest.approx(lr)
    other = ARSAdamW(model.parameters(), lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    assert int(other.state[model[0].weight]["step"]) == 2
    assert other._watches == "loss"
