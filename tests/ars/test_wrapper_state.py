"""Checkpoints of ARSOptimizer: resumed, of the base alone, and refused whole."""

import io

import pytest
import torch
from optimizers import gradients, parameters
from test_wrapper import BASES, run, wrapped

from ars import ARSConfig, ARSOptimizer

RATE = ARSConfig.paper(window=6, gate=("lr",))


def saved(state):
    """Through a file, as only data and tensors."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", BASES)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(name):
    config = ARSConfig.paper(window=6, gate=("lr", "betas"), release=9)
    opt, params = wrapped(name, config)
    expected = run(opt, params, 16)
    first, _ = wrapped(name, config)
    others = [p for group in first.param_groups for p in group["params"]]
    run(first, others, 8)
    second = ARSOptimizer(BASES[name](others), config)
    second.load_state_dict(saved(first.state_dict()))
    assert all(map(torch.equal, run(second, others, 8, first=8), expected))
    assert torch.equal(second.controller.window, opt.controller.window)
    assert float(second.controller.gate_state[0]) == float(opt.controller.gate_state[0]) < 1


def test_a_state_of_the_base_alone_starts_the_controller_afresh():
    opt, params = wrapped("adamw")
    run(opt, params, 5)
    opt.load_state_dict(opt.base.state_dict())
    assert opt.controller.counts.tolist() == [0, 0]
    assert float(opt.controller.gate_state[0]) == 1
    gradients(params, 5)
    opt.step()  # the norm now


class LowRank(torch.optim.SGD):
    """Another package's optimizer, whose moments have a shape of their own."""

    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            self.state[param]["exp_avg"] = torch.zeros(1, 1)


def test_other_optimizers_keep_moments_of_any_shape():
    params = parameters(shapes=((4, 3),))
    opt = ARSOptimizer(LowRank(params, lr=0.1), RATE)
    gradients(params, 0)
    opt.step(loss=1.0)
    opt.load_state_dict(saved(opt.state_dict()))
    assert opt.state[params[0]]["exp_avg"].shape == (1, 1)
