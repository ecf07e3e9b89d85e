"""Pairs of equal optimizers: one stepped by a compiled function, one by the same in eager."""

import pytest
import torch
from optimizers import Pull, gradients, make, parameters
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from ars import ARSAdamW

SHAPES = ((4, 3), (7,), ())
# torch's own, inside of its compiler.
WARNINGS = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    # In this process, and not out of a cache on disk.
    with (
        torch._inductor.config.patch(compile_threads=1, fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    torch._dynamo.reset()


def pair(implementation="fused", cls=ARSAdamW, penalty=True, **settings):
    """Return two equal optimizers of equal parameters: one to compile, one to compare with."""
    optimizers = []
    for _ in range(2):
        params = parameters(shapes=SHAPES)
        pull = Pull(params) if penalty else None
        settings = {"lr": 0.05, **settings}
        optimizers.append(make(implementation, params, cls, penalty=pull, **settings))
    return optimizers


def loss_of(step):
    return torch.tensor(3.0 + (step % 3), dtype=torch.float32)


def prepare(optimizers, step, skip=()):
    """Give both optimizers the gradients of a step, and other hyperparameters than before."""
    for optimizer in optimizers:
        gradients(optimizer._parameters(), step)
        for index in skip:
            optimizer._parameters()[index].grad = None
        optimizer.param_groups[0]["lr"] = 0.05 / (1 + step)
        optimizer.param_groups[0]["betas"] = (0.8 + 0.01 * step, 0.99)


def assert_same(mine, other):
    assert all(map(torch.equal, mine._parameters(), other._parameters()))
    for state, expected in zip(mine.state.values(), other.state.values(), strict=True):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)
    assert torch.equal(mine._buffer.nan_to_num(-1.0), other._buffer.nan_to_num(-1.0))


def run(compiled, eager, function, steps, backend="aot_eager", fullgraph=True, skips=None):
    """Step one optimizer by a compiled function and one by the same in eager; count the graphs."""
    counter = CompileCounterWithBackend(backend)
    graph = torch.compile(function, backend=counter, fullgraph=fullgraph)
    for step in range(steps):
        prepare((compiled, eager), step, skips[step] if skips else ())
        mine, expected = graph(compiled, loss_of(step)), function(eager, loss_of(step))
        assert mine is expected or torch.equal(mine, expected)
        assert_same(compiled, eager)
    return counter.frame_count


def step_on_loss(optimizer, loss):
    optimizer.step(loss=loss)


def step_on_norm(optimizer, _):
    optimizer.step()
