"""What the controller watches: each kind, what it refuses, and the entropy of predictions."""

import copy
import math

import pytest
import torch
from optimizers import IMPLEMENTATIONS, gradients, make, parameters

from ars import ARSAdamW, ARSConfig, GradientRelease, prediction_entropy


def watching(surprise, implementation="fused", **settings):
    params = parameters()
    gradients(params, 0)
    return make(implementation, params, ars=ARSConfig(surprise=surprise), **settings), params


def seen(optimizer):
    return float(optimizer.diagnostics["surprise"])


def norm_of(params):
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in params))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_each_kind_watches_its_own(implementation):
    loss, value = torch.tensor(1.5), torch.tensor(2.5)
    optimizer, params = watching("auto", implementation)
    optimizer.step()
    assert seen(optimizer) == pytest.approx(norm_of(params), rel=1e-6)
    optimizer, params = watching("grad_norm", implementation)
    optimizer.step(loss=loss)
    assert seen(optimizer) == pytest.approx(norm_of(params), rel=1e-6)
    optimizer, params = watching("loss", implementation)
    optimizer.step(loss=loss)
    assert seen(optimizer) == 1.5
    optimizer, params = watching("entropy", implementation)
    optimizer.step(loss=loss, surprise=value)
    assert seen(optimizer) == 2.5
    values = iter([3.5, torch.tensor([4.5])])
    optimizer, params = watching(lambda: next(values), implementation)
    for expected in (3.5, 4.5):
        optimizer.step()
        assert seen(optimizer) == expected


def test_a_closures_loss_is_one_but_not_the_norm():
    for kind, expected in (("loss", 0.75), ("grad_norm", None)):
        optimizer, params = watching(kind)
        optimizer.step(lambda: torch.tensor(0.75))
        assert seen(optimizer) == pytest.approx(expected or norm_of(params), rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        ("auto", {"surprise": 1.0}, ValueError, "watches 'auto': use ARSConfig"),
        (lambda: 1.0, {"surprise": 1.0}, ValueError, "watches the value of a callable"),
        ("loss", {}, ValueError, r"watches the loss: pass step\(loss=loss\)"),
        ("entropy", {"loss": 1.0}, ValueError, r"pass step\(surprise=ars.prediction_entropy"),
        ("entropy", {"surprise": torch.ones(2)}, ValueError, r"the surprise must be a scalar"),
        ("entropy", {"surprise": "1"}, TypeError, "the surprise must be a 0-d tensor"),
        (lambda: torch.ones(2), {}, ValueError, r"what ARSConfig\(surprise=...\) returned"),
    ],
)
def test_refusals_change_nothing(kind, arguments, error, message):
    optimizer, params = watching(kind)
    before = copy.deepcopy(params)
    with pytest.raises(error, match=message):
        optimizer.step(**arguments)
    assert all(map(torch.equal, params, before))
    assert int(optimizer.controller.counts[1]) == 0
    assert not optimizer.state


def test_without_a_controller_a_surprise_is_refused():
    params = parameters()
    gradients(params, 0)
    with pytest.raises(ValueError, match=r"with ars=None there is no controller .*: leave it out"):
        ARSAdamW(params, ars=None).step(surprise=1.0)


def test_a_checkpoint_of_another_surprise_is_refused_at_the_step():
    old, _ = watching("entropy")
    old.step(surprise=1.0)
    new, _ = watching("loss")
    new.load_state_dict(old.state_dict())
    with pytest.raises(ValueError, match=r"the entropy and now gets the loss: use the ARSConfig"):
        new.step(loss=1.0)


def test_inside_a_compiled_function():
    optimizer, params = watching("entropy")
    eager, others = watching("entropy")
    compiled = torch.compile(lambda s: optimizer.step(surprise=s), backend="aot_eager")
    for value in (1.0, 5.0):
        compiled(torch.tensor(value))
        eager.step(surprise=torch.tensor(value))
        assert seen(optimizer) == value
    assert all(map(torch.equal, params, others))


def test_released_gradients():
    for kind, arguments, expected in (
        ("entropy", {"surprise": 2.0}, 2.0),
        (lambda: 3.0, {}, 3.0),
        ("loss", {}, 4.0),
    ):
        weight = torch.nn.Parameter(torch.ones(4))
        optimizer = ARSAdamW([weight], ars=ARSConfig(surprise=kind))
        with GradientRelease(optimizer) as release:
            release.backward(weight.sum(), **arguments)
        assert seen(optimizer) == expected
        GradientRelease(optimizer).remove()  # it goes on watching what it has watched
    optimizer = ARSAdamW([weight], ars=ARSConfig(surprise="grad_norm"))
    with pytest.raises(ValueError, match=r"surprise='grad_norm'.*needs all gradients"):
        GradientRelease(optimizer)


def test_entropy_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    found = prediction_entropy((p.log() + 7).requires_grad_())
    assert float(found) == pytest.approx(1.5 * math.log(2) / 2)
    assert found.dtype == torch.float64
    assert not found.requires_grad
    logits = 1e4 * torch.randn(2, 3, 5)  # whose exponentials overflow
    assert 0 <= float(prediction_entropy(logits)) < 0.1
    half = prediction_entropy(torch.zeros(2, 3, 8, dtype=torch.bfloat16))
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(math.log(8), rel=1e-6)
    for bad in (torch.tensor(1.0), torch.ones(0, 4)):
        with pytest.raises(ValueError, match="logits must have shape"):
            prediction_entropy(bad)
