"""Step counters: they lie together so that one call advances many, and stay where they are."""

import copy
import io
import pickle

import pytest
import torch
import torch.multiprocessing
from optimizers import IMPLEMENTATIONS, make, train

from ars import ARSAdamW, ARSConfig
from ars.step.cpu import Counters
from ars.step.state import TOGETHER

CONFIGS = {"plain": None, "rate": ARSConfig(), "betas": ARSConfig.paper()}


def parameters(count):
    return [torch.nn.Parameter(torch.ones(2)) for _ in range(count)]


def trained(count, steps=1, **settings):
    params = parameters(count)
    optimizer = ARSAdamW(params, **settings)
    train(optimizer, params, steps, loss=1.0)
    return params, optimizer


def calls_of(optimizer):
    """How many memories a step advances the step counters in."""
    counters = optimizer._steppers.cpu._counters
    assert isinstance(counters, Counters)
    return len(counters._steps)


def counted(optimizer):
    return [float(state["step"]) for state in optimizer.state.values()]


def count_in_another_process(optimizer, params, lock):
    torch.set_num_threads(1)
    for index in range(5):
        for param in params:
            param.grad = torch.full_like(param, 1.0 + index)
        with lock:  # torch's addition is not atomic
            optimizer.step(loss=1.0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("implementation", ["loop", "foreach", "fused"])
@pytest.mark.parametrize("before", [0, 2])
def test_processes_count_in_shared_counters(implementation, config, before):
    """Hogwild: each takes five steps, with parameters and state in shared memory."""
    params = parameters(3)
    optimizer = make(implementation, params, ars=config)
    if before:
        train(optimizer, params, before, loss=1.0)
    else:  # as A3C's optimizers make their state themselves
        for param in params:
            optimizer.state[param] = {
                "step": torch.zeros(1),
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }
    for param in params:
        param.grad = None
        param.share_memory_()
        for value in optimizer.state[param].values():
            value.share_memory_()
    context = torch.multiprocessing.get_context("fork")
    lock = context.Lock()
    workers = [
        context.Process(target=count_in_another_process, args=(optimizer, params, lock))
        for _ in range(2)
    ]
    start = params[0].detach().clone()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert counted(optimizer) == [before + 10.0] * 3
    assert all(state["step"].is_shared() for state in optimizer.state.values())
    assert not torch.equal(params[0], start)
    count_in_another_process(optimizer, params, lock)  # and here it goes on
    assert counted(optimizer) == [before + 15.0] * 3
    if config is not None and "betas" in config.gate and before:
        for state in optimizer.state.values():
            assert float(state["beta_products_step"]) == before + 15


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_step_moves_no_counter(config):
    params, optimizer = trained(3, ars=config)
    views = [
        {name: value.view(-1) for name, value in state.items()}
        for state in optimizer.state.values()
    ]
    train(optimizer, params, 3, loss=1.0)
    for view, state in zip(views, optimizer.state.values(), strict=True):
        for name, value in state.items():
            assert view[name].data_ptr() == value.data_ptr()
        assert view["step"].item() == 4


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_counters_are_advanced_together(config):
    """Also those of a copy, and those that come from a file."""
    count = 2 * TOGETHER + 3
    params, optimizer = trained(count, ars=config)
    assert calls_of(optimizer) == 3
    other = copy.deepcopy(optimizer)
    train(other, other.param_groups[0]["params"], 1, loss=1.0)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    params = parameters(count)
    loaded = ARSAdamW(params, ars=config)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    train(loaded, params, 1, loss=1.0)
    for one in (other, loaded):
        assert calls_of(one) == 3
        assert counted(one) == [2.0] * count
    assert counted(optimizer) == [1.0] * count


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_counters_that_lie_apart_are_advanced_too(config):
    params, optimizer = trained(5, ars=config)
    state = optimizer.state[params[2]]
    for name in ("step", "beta_products", "beta_products_step"):
        if name in state:
            state[name] = state[name].clone()
    params[0].grad = None
    for param in params[1:]:
        param.grad = torch.ones(2)
    optimizer.step(loss=1.0)
    assert counted(optimizer) == [1.0, 2.0, 2.0, 2.0, 2.0]
    optimizer.state[params[3]]["step"].data = torch.tensor(7.0)  # its memory moved
    train(optimizer, params, 1, loss=1.0)
    assert counted(optimizer) == [2.0, 3.0, 3.0, 8.0, 3.0]
    assert calls_of(optimizer) == 4  # the first two; the third, the fourth and the last alone


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_memory_that_a_counter_shares_with_others_is_left_alone(implementation):
    memory = torch.arange(10.0)
    params = parameters(3)
    optimizer = make(implementation, params)
    for param, place in zip(params, (2, 3, 7), strict=True):
        moments = {name: torch.zeros(2) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[param] = {"step": memory[place], **moments}
    train(optimizer, params, 2, loss=1.0)
    assert memory.tolist() == [0, 1, 4, 5, 4, 5, 6, 9, 8, 9]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_pickles_do_not_grow_with_the_square_of_the_tensors(config):
    def size(tensors):
        return len(pickle.dumps(trained(tensors, ars=config)[1].state_dict()))

    assert size(4 * TOGETHER) < 4.5 * size(TOGETHER)
