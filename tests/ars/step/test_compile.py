"""The step inside torch.compile: no graph break, no second compilation, the numbers of eager."""

import copy
import re

import compiling
import pytest
import torch
from compiling import SHAPES, assert_same, loss_of, pair, prepare, run, step_on_loss, step_on_norm
from optimizers import IMPLEMENTATIONS, gradients
from torch._dynamo.utils import counters

from ars import ARSAdam, ARSAdamW

pytestmark = compiling.WARNINGS
fresh_dynamo = compiling.fresh_dynamo


@pytest.mark.parametrize("function", [step_on_loss, step_on_norm])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_graph_for_all_steps_equals_eager(implementation, function):
    compiled, eager = pair(implementation, max_grad_norm=1.0)
    assert run(compiled, eager, function, 10) == 1
    assert counters["stats"]["unique_graphs"] == 1
    assert float(compiled.diagnostics["penalty"]) > 0


def test_inductor_gives_the_operator_the_parameters_themselves():
    from torch._inductor.utils import run_and_get_code

    compiled, eager = pair(cls=ARSAdam)
    assert run(compiled, eager, step_on_loss, 3, backend="inductor") == 1
    torch._dynamo.reset()
    prepare((compiled, eager), 3)
    graph = torch.compile(step_on_loss, fullgraph=True)
    _, (code,) = run_and_get_code(graph, compiled, loss_of(3))
    step_on_loss(eager, loss_of(3))
    assert_same(compiled, eager)
    assert code.count("torch.ops.ars.step_.default(") == 1
    assert not re.search(r"\bbuf\d+ = |copy_\(", code)  # nothing is allocated or copied


def test_operator_passes_torchs_checks():
    optimizer, _ = pair()
    params = optimizer._parameters()
    gradients(params, 0)
    arguments = (
        params, optimizer._buffer, [p.grad for p in params], loss_of(0), None, [0, 1, 2],
        optimizer._traced.name,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.ars.step_, arguments)
    assert torch.Tag.cudagraph_unsafe in torch.ops.ars.step_.default.tags


def breaks_of(function, *arguments):
    explanation = torch._dynamo.explain(function)(*arguments)
    return [str(reason.reason) for reason in explanation.break_reasons]


def test_only_dynamos_own_graph_breaks_remain_in_a_training_step():
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    optimizer = ARSAdamW(model.parameters())

    def train(inputs, steps):
        loss = model(inputs).square().mean()
        loss.backward()
        if steps:
            optimizer.step(loss=loss)

    own = breaks_of(train, torch.ones(2, 4), False)
    assert own
    assert all("backward" in reason for reason in own)
    assert breaks_of(train, torch.ones(2, 4), True) == own
    assert breaks_of(pair()[0].step) == []


@pytest.mark.parametrize("whole", [False, True])
def test_training_step_equals_eager(whole):
    """Whole: Dynamo traces the backward pass too, and all of the step is one graph."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    twin = copy.deepcopy(model)

    def train(model, optimizer, inputs):
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
        return loss.detach()

    graph = torch.compile(train, backend="eager", fullgraph=whole)
    optimizer, expected = (ARSAdamW(m.parameters(), lr=0.1) for m in (model, twin))
    with torch._dynamo.config.patch(trace_autograd_ops=whole):
        for _ in range(3):
            inputs = torch.randn(8, 4)
            optimizer.zero_grad()
            expected.zero_grad()
            mine = graph(model, optimizer, inputs)
            assert torch.equal(mine, train(twin, expected, inputs))
            assert_same(optimizer, expected)


@pytest.mark.parametrize("penalty", [False, True])
def test_parameters_without_a_gradient_stay_unless_a_penalty_pulls_at_them(penalty):
    compiled, eager = pair(penalty=penalty)
    skips = [(), (1,), (1,), (), (0, 1, 2)]
    assert run(compiled, eager, step_on_loss, 5, skips=skips) == len(set(skips))
    assert int(compiled.state[compiled._parameters()[1]]["step"]) == (4 if penalty else 2)

    def without_the_second(optimizer, loss):
        optimizer._traced.groups[0]["params"][1].grad = None
        optimizer.step(loss=loss)

    compiled, eager = pair(penalty=penalty)
    run(compiled, eager, without_the_second, 2)
    assert len(compiled.state) == len(SHAPES) - (0 if penalty else 1)


def test_the_graph_around_the_step_is_in_order():
    def function(optimizer, loss):
        weight = optimizer._traced.groups[0]["params"][0]
        with torch.no_grad():
            weight.mul_(0.5)
            weight.grad.add_(weight)
        optimizer.step(loss=loss)
        return weight.detach() * 2 + optimizer.diagnostics["surprise"]

    compiled, eager = pair()
    assert run(compiled, eager, function, 3) == 1
    prepare((compiled,), 3)
    grad = compiled._parameters()[0].grad
    torch.compile(function, backend="aot_eager")(compiled, loss_of(3))
    assert compiled._parameters()[0].grad is grad


def test_the_graph_around_the_step_is_in_order_for_inductor():
    """Matrix products are torch's own: this test needs no compiler either."""

    def function(optimizer, loss):
        weight = optimizer._traced.groups[0]["params"][0]
        with torch.no_grad():
            before = weight @ weight.T
            weight.grad = before @ weight.grad
            optimizer.step(loss=loss)
            return before @ weight

    assert run(*pair(), function, 3, backend="inductor") == 1


def test_autograd_notices_the_step():
    optimizer, _ = pair()
    weight = optimizer._parameters()[0]
    prepare((optimizer,), 0)
    square = weight.square().sum()
    torch.compile(step_on_loss, backend="aot_eager", fullgraph=True)(optimizer, loss_of(0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()
