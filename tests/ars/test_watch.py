"""Losses that are noted before a step: `watch(loss)`, and what the controller watches without."""

import copy
import pickle
import warnings

import pytest
import torch

from ars import ARSAdamW, ARSConfig, ARSOptimizer, GradientRelease

FALLBACK = "the controller got no loss"


def adamw(weight, **settings):
    return ARSAdamW([weight], lr=0.1, **settings)


def wrapped(weight, ars=None, **_):
    base = torch.optim.AdamW([weight], lr=0.1)
    return ARSOptimizer(base) if ars is None else ARSOptimizer(base, ars)


KINDS = pytest.mark.parametrize("make", [adamw, wrapped])


def weight_with_gradient():
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    return weight


@KINDS
def test_one_noted_loss_is_that_of_the_step_bit_by_bit(make):
    losses = torch.rand(40, generator=torch.Generator().manual_seed(0))
    noted, passed = weight_with_gradient(), weight_with_gradient()
    first, second = make(noted), make(passed)
    for loss in losses:
        first.watch(loss)
        first.step()
        second.step(loss=loss)
        for name, value in second.diagnostics.items():
            assert torch.equal(first.diagnostics[name], value) or value.isnan(), name
    assert torch.equal(noted, passed)


@KINDS
def test_the_mean_of_micro_batches_is_watched_and_forgotten_by_the_step(make):
    optimizer = make(weight_with_gradient())
    for losses in ([1.0, 2.0, 6.0], [5.0]):  # the second as at the end of an epoch
        for loss in losses:
            optimizer.watch(torch.tensor(loss))
        optimizer.step()
        assert float(optimizer.diagnostics["surprise"]) == sum(losses) / len(losses)


def test_half_precision_losses_are_averaged_in_double():
    optimizer = adamw(weight_with_gradient())
    for _ in range(300):
        optimizer.watch(torch.tensor(1.0, dtype=torch.bfloat16))
    optimizer.step()
    assert float(optimizer.diagnostics["surprise"]) == 1.0


@KINDS
def test_what_is_noted_does_not_follow_the_loss(make):
    optimizer, loss = make(weight_with_gradient()), torch.tensor(8.0)
    optimizer.watch(loss)
    loss /= 4  # as some loops divide for accumulation
    optimizer.step()
    assert float(optimizer.diagnostics["surprise"]) == 8.0


@KINDS
def test_the_noted_loss_counts_and_not_the_closure_s(make):
    weight = weight_with_gradient()
    optimizer = make(weight)

    def closure():
        weight.grad = torch.ones(3)
        optimizer.watch(3.0)
        return torch.tensor(0.75)  # Lightning divides by the micro-batches

    optimizer.watch(1.0)
    assert float(optimizer.step(closure)) == 0.75
    assert float(optimizer.diagnostics["surprise"]) == 2.0


def test_further_evaluations_of_a_closure_are_not_of_the_next_step():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = ARSOptimizer(torch.optim.LBFGS([weight], lr=0.1))
    values = []

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        optimizer.watch(loss)
        values.append(loss.item())
        return loss

    for _ in range(2):
        first = len(values)
        optimizer.step(closure)
        assert len(values) > first + 1
        assert float(optimizer.diagnostics["surprise"]) == pytest.approx(values[first])


@KINDS
def test_two_losses_of_one_step_are_refused(make):
    weight = weight_with_gradient()
    optimizer = make(weight)
    optimizer.watch(1.0)
    with pytest.raises(ValueError, match="use one of the two"):
        optimizer.step(loss=1.0)
    assert torch.equal(weight, torch.ones(3))
    optimizer.step()  # what was noted is there still
    assert float(optimizer.diagnostics["surprise"]) == 1.0


@KINDS
@pytest.mark.parametrize(
    ("loss", "error"),
    [
        (None, TypeError),
        ("1", TypeError),
        (torch.ones(2), ValueError),
        (torch.tensor(1j), TypeError),
    ],
)
def test_what_is_no_loss_is_refused(make, loss, error):
    optimizer = make(weight_with_gradient())
    with pytest.raises(error):
        optimizer.watch(loss)


@KINDS
def test_copies_begin_without_what_was_noted(make):
    optimizer = make(weight_with_gradient())
    optimizer.watch(1.0)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        for param in other.param_groups[0]["params"]:
            param.grad = torch.ones(3)
        other.watch(5.0)
        other.step()
        assert float(other.diagnostics["surprise"]) == 5.0


def test_a_step_without_gradients_forgets_what_was_noted():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = adamw(weight)
    optimizer.watch(1.0)
    optimizer.step()
    weight.grad = torch.ones(3)
    optimizer.watch(5.0)
    optimizer.step()
    assert float(optimizer.diagnostics["surprise"]) == 5.0


def test_without_a_controller_noting_is_allowed():
    optimizer = adamw(weight_with_gradient(), ars=None)
    optimizer.watch(1.0)
    optimizer.step()


def test_a_compiled_step_watches_what_was_noted():
    weight = weight_with_gradient()
    optimizer = adamw(weight)
    step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    for loss in (2.0, 3.0):
        optimizer.watch(loss)
        step()
        assert float(optimizer.diagnostics["surprise"]) == loss

    @torch.compile(backend="eager")
    def both():
        optimizer.watch(4.0)
        optimizer.step()

    both()
    assert float(optimizer.diagnostics["surprise"]) == 4.0
    torch.compiler.reset()


def test_released_gradients_take_their_loss_from_backward():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = adamw(weight)
    with GradientRelease(optimizer) as release:
        optimizer.watch(1.0)
        with pytest.raises(ValueError, match=r"backward\(loss\) watches the loss"):
            release.backward(weight.sum())
    assert torch.equal(weight, torch.ones(3))


@KINDS
def test_the_fall_back_to_the_norm_is_said_once(make):
    weight = weight_with_gradient()
    optimizer = make(weight)
    with pytest.warns(UserWarning, match=FALLBACK) as said:
        optimizer.step()
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@KINDS
@pytest.mark.parametrize("how", ["noted", "passed", "closure", "norm"])
def test_nothing_is_said_where_the_choice_was_made(make, how):
    weight = weight_with_gradient()
    settings = {"ars": ARSConfig(gate=("lr",), surprise="grad_norm")} if how == "norm" else {}
    optimizer = make(weight, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if how == "noted":
            optimizer.watch(1.0)
        optimizer.step(
            (lambda: torch.tensor(1.0)) if how == "closure" else None,
            **({"loss": 1.0} if how == "passed" else {}),
        )


@KINDS
def test_a_reset_controller_begins_anew_and_may_watch_something_else(make):
    weight = weight_with_gradient()
    optimizer, fresh = make(weight), make(weight_with_gradient())
    for step in range(50):
        optimizer.step(loss=1.0 + (-1) ** step)
    with pytest.raises(ValueError, match="reset_controller"):
        optimizer.step()
    optimizer.reset_controller()
    state, new = optimizer.controller.state_dict(), fresh.controller.state_dict()
    assert all(torch.equal(value, new[name]) for name, value in state.items())
    optimizer.step()
    assert float(optimizer.diagnostics["surprise"]) == pytest.approx(3**0.5)
