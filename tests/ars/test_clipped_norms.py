"""Gradients that were clipped before the step blind a controller of their norm: it says so."""

import copy
import pickle
import warnings

import pytest
import torch
from optimizers import make

from ars import ARSAdamW, ARSConfig, ARSOptimizer, controller

WINDOW = 10
CONFIG = ARSConfig(window=WINDOW)
MESSAGE = r"the gradient norm, which the controller watches, has been .* so it sees nothing\. .*step\(loss=loss\), or clip in the step instead"  # noqa: E501 (as one sentence)


def build(name, params):
    if name == "wrapper":
        return ARSOptimizer(torch.optim.SGD(params, lr=0.01), CONFIG)
    return make(name, params, lr=0.01, ars=CONFIG)


def train(optimizer, params, steps, *, clip=None, scale=1.0, first=0, **arguments):
    """Step on noise, clipped as a trainer clips it; return the warnings of each step."""
    found = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        factor = scale * (2 + torch.rand((), generator=generator))
        for param in params:
            param.grad = (factor * torch.randn(param.shape, generator=generator)).to(param.dtype)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(params, clip)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step(**arguments)
        messages = [str(warning.message) for warning in caught]
        # Of the choice, which test_watch.py is about.
        found.append([text for text in messages if "got no loss" not in text])
        assert all(warning.filename == __file__ for warning in caught)
    return found


def parameters(dtype=torch.float32):
    return [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in ((30, 20), (40,))]


@pytest.mark.parametrize("clip", [0.1, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["loop", "foreach", "fused", "wrapper"])
def test_a_norm_that_is_clipped_outside_is_noticed_once(name, dtype, clip):
    params = parameters(dtype)
    optimizer = build(name, params)
    found = train(optimizer, params, 5 * WINDOW, clip=clip)
    assert [bool(messages) for messages in found] == [
        step == WINDOW - 1 for step in range(5 * WINDOW)
    ]
    assert float(optimizer.diagnostics["phi"]) == 1.0
    with pytest.warns(UserWarning, match=MESSAGE):
        warnings.warn(*found[WINDOW - 1], stacklevel=1)


def test_so_it_is_on_the_kernels_path():
    params = [torch.zeros(3, requires_grad=True)]
    found = train(build("triton", params), params, WINDOW, clip=1.0)
    assert [len(messages) for messages in found] == [0] * (WINDOW - 1) + [1]


@pytest.mark.parametrize("name", ["fused", "wrapper"])
def test_clipping_that_sets_in_later_is_noticed_later(name):
    params = parameters()
    optimizer = build(name, params)
    assert not any(train(optimizer, params, 3 * WINDOW, clip=None))
    found = train(optimizer, params, 6 * WINDOW, clip=1.0, first=3 * WINDOW)
    # It looks after 1, 2, 4, 8 windows.
    assert [index for index, messages in enumerate(found) if messages] == [WINDOW - 1]


@pytest.mark.parametrize(
    ("clip", "scale", "arguments"),
    [
        (None, 1.0, {}),  # it moves
        (60.0, 1.0, {}),  # some steps are clipped, others not
        (1.0, 1.0, {"loss": 2.0}),  # the norm is not watched, and a loss may stand still
        (None, 1e-8, {}),  # small, but it moves
        (None, 0.0, {}),  # nothing is left to learn
    ],
)
@pytest.mark.parametrize("name", ["fused", "wrapper"])
def test_other_training_has_no_warning(name, clip, scale, arguments):
    params = parameters()
    found = train(build(name, params), params, 9 * WINDOW, clip=clip, scale=scale, **arguments)
    assert not any(found)


def test_clipping_in_the_step_is_no_fault():
    params = parameters()
    optimizer = ARSAdamW(params, ars=CONFIG, max_grad_norm=1.0)
    assert not any(train(optimizer, params, 9 * WINDOW))


def constant(optimizer, param, steps, value=lambda step: 1.0):
    for step in range(steps):
        param.grad = torch.full((4,), value(step))
        optimizer.step()


@pytest.mark.parametrize("name", ["fused", "wrapper"])
def test_of_gradients_that_are_always_the_same(name):
    """A norm of exactly 1, as that of a single clipped number, is noticed where it began so."""
    param = torch.zeros(4, requires_grad=True)
    optimizer = build(name, [param])
    constant(optimizer, param, WINDOW - 1)
    with pytest.warns(UserWarning, match=MESSAGE):
        constant(optimizer, param, 1)
    constant(optimizer, param, 9 * WINDOW)


@pytest.mark.parametrize("name", ["fused", "wrapper"])
def test_neither_the_end_of_training_nor_a_benchmark_is_a_fault(name):
    param = torch.zeros(4, requires_grad=True)
    constant(build(name, [param]), param, 9 * WINDOW, lambda step: 1e-3 + max(0, WINDOW + 2 - step))
    optimizer = build(name, [param])
    param.grad = torch.ones(4)
    for _ in range(9 * WINDOW):
        optimizer.step()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_looks_for_itself(again):
    params = parameters()
    optimizer = build("fused", params)
    train(optimizer, params, WINDOW // 2, clip=1.0)
    optimizer = again(optimizer)
    params = optimizer.param_groups[0]["params"]
    found = train(optimizer, params, WINDOW, clip=1.0, first=WINDOW // 2)
    assert [len(messages) for messages in found] == [0] * (WINDOW - 1) + [1]


def test_a_copy_of_the_window_that_is_still_on_its_way_is_not_read(monkeypatch):
    """As on a GPU: the event says when."""

    class Event:
        arrived = False

        def query(self):
            return self.arrived

    def to_host(window):
        copied.append(torch.zeros_like(window))
        return copied[-1], event

    event, copied = Event(), []
    monkeypatch.setattr(controller, "_to_host", to_host)
    params = parameters()
    optimizer = build("fused", params)
    assert not any(train(optimizer, params, WINDOW + 3, clip=1.0))
    copied[0].fill_(1.0)
    event.arrived = True
    found = train(optimizer, params, 2, clip=1.0)
    assert [len(messages) for messages in found] == [1, 0]
    assert len(copied) == 1
