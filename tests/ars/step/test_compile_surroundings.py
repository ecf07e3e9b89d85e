"""What Python does around a compiled step: copies, changes, schedulers, hooks, errors."""

import copy
import pickle

import compiling
import pytest
import torch
from compiling import SHAPES, assert_same, loss_of, pair, prepare, run, step_on_loss, step_on_norm
from optimizers import gradients, parameters
from torch._dynamo.testing import CompileCounterWithBackend

from ars import ARSAdam, ARSAdamW

pytestmark = compiling.WARNINGS
fresh_dynamo = compiling.fresh_dynamo


def test_two_optimizers_in_one_graph():
    first, second = pair(), pair(cls=ARSAdam, penalty=False)
    prepare((*first, *second), 0)

    def function():
        first[0].step(loss=loss_of(0))
        second[0].step()

    torch.compile(function, backend="aot_eager", fullgraph=True)()
    first[1].step(loss=loss_of(0))
    second[1].step()
    assert_same(*first)
    assert_same(*second)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_steps_its_own_parameters(duplicate):
    compiled, eager = pair()
    run(compiled, eager, step_on_loss, 2)
    other = duplicate(compiled)
    run(other, duplicate(eager), step_on_loss, 2)
    assert_same(compiled, eager)


def test_loading_and_growing_an_optimizer():
    compiled, eager = pair()
    run(compiled, eager, step_on_loss, 2)
    compiled.load_state_dict(copy.deepcopy(compiled.state_dict()))
    run(compiled, eager, step_on_loss, 2)
    for optimizer in (compiled, eager):
        optimizer.add_param_group({"params": parameters(shapes=((5,),)), "lr": 0.5})
    run(compiled, eager, step_on_loss, 2)
    assert len(compiled.state) == len(SHAPES) + 1


def change_group(optimizer, loss):
    optimizer.param_groups[0]["lr"] = 0.3
    optimizer.step(loss=loss)


def change_penalty(optimizer, loss):
    optimizer.penalty.strength = 0.7
    optimizer.step(loss=loss)


@pytest.mark.parametrize("function", [change_group, change_penalty])
def test_changes_inside_the_compiled_function_are_in_time(function):
    """Dynamo applies them after the graph; so the graph must end before the step."""
    compiled, eager = pair()
    run(compiled, eager, function, 3, fullgraph=False)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="changes a group or the penalty"):
        run(*pair(), function, 1)


def test_attributes_that_dynamo_forgets_are_refused():
    def function(optimizer, loss):
        optimizer.penalty = None
        optimizer.step(loss=loss)

    mine = "forgets changes of an optimizer's attributes"
    dynamos = "Attempted setattr on a user-defined object"  # torch < 2.13
    with pytest.raises(Exception, match=f"{mine}|{dynamos}"):
        run(*pair(), function, 1, fullgraph=False)


def test_closure_and_differentiable_break_the_graph_and_run():
    compiled, eager = pair()
    run(compiled, eager, lambda optimizer, loss: optimizer.step(lambda: loss), 2, fullgraph=False)
    weight = torch.ones(3, requires_grad=True)
    inner = weight.clone()
    optimizer = ARSAdamW([inner], lr=0.1, differentiable=True)
    inner.grad = torch.ones(3)
    torch.compile(optimizer.step, backend="eager")()
    inner.sum().backward()
    assert weight.grad.tolist() == pytest.approx([0.999] * 3)


def test_schedulers_and_hooks():
    compiled, eager = pair()
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=9) for o in (compiled, eager)
    ]
    calls = []
    for optimizer in (compiled, eager):
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
    graph = torch.compile(step_on_loss, backend="aot_eager")
    for step in range(4):
        for optimizer, function in ((compiled, graph), (eager, step_on_loss)):
            gradients(optimizer._parameters(), step)
            function(optimizer, loss_of(step))
        assert_same(compiled, eager)
        for scheduler in schedulers:
            scheduler.step()
    assert len(calls) == 8


def test_numbers_as_losses_do_not_compile_for_ever():
    compiled, eager = pair()
    counter = CompileCounterWithBackend("aot_eager")
    graph = torch.compile(step_on_loss, backend=counter, fullgraph=True)
    for step in range(6):
        prepare((compiled, eager), step)
        graph(compiled, 0.1 * step)
        eager.step(loss=0.1 * step)
        assert_same(compiled, eager)
    assert counter.frame_count <= 3  # a constant, then an input; Dynamo starts that one twice


def test_errors_are_those_of_eager():
    optimizer, _ = pair()
    graph = torch.compile(step_on_loss, backend="aot_eager")
    prepare((optimizer,), 0)
    graph(optimizer, loss_of(0))
    with pytest.raises(ValueError, match="must be a scalar"):
        graph(optimizer, torch.ones(2))
    with pytest.raises(ValueError, match="has watched the loss and now gets the grad_norm"):
        torch.compile(step_on_norm, backend="aot_eager")(optimizer, None)
    gone = ([], torch.zeros(10), [], None, None, [], "none")
    with pytest.raises(RuntimeError, match="an optimizer that is no more"):
        torch.ops.ars.step_(*gone)


def test_another_list_of_groups_is_refused():
    """The graph would copy the old parameters over the new ones."""
    params, others = parameters(shapes=SHAPES), parameters(shapes=SHAPES)
    optimizer = ARSAdamW(params, lr=0.1)
    graph = torch.compile(step_on_norm, backend="eager")
    gradients(params, 0)
    graph(optimizer, None)
    before = [param.detach().clone() for param in params]
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": others}]
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"in place, as in optimizer\.param_gro"),
    ):
        graph(optimizer, None)
    assert all(map(torch.equal, params, before))
