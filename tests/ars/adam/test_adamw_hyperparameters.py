"""The numbers on the device follow the groups' without a step, as a replayed graph needs it."""

import pytest
import torch
from optimizers import Pull, gradients, make, parameters

from ars.csrc_triton.layout import Hyper


def test_floats_are_sent_without_a_step():
    params = parameters()
    optimizer = make("triton", [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}])
    gradients(params, 0)
    optimizer.step(loss=1.0)
    before = [param.detach().clone() for param in params]
    for index, group in enumerate(optimizer.param_groups):
        group["lr"], group["betas"], group["weight_decay"] = 0.1 + index, (0.5, 0.7), 0.25
    optimizer.write_hyperparameters()
    sent = optimizer._steppers.triton._hyper
    assert sent[:, Hyper.LR].tolist() == [0.1, 1.1]
    assert sent[:, Hyper.BETA2].tolist() == [0.7, 0.7]
    assert sent[:, Hyper.WEIGHT_DECAY].tolist() == [0.25, 0.25]
    assert all((a == b).all() for a, b in zip(params, before, strict=True))
    assert optimizer.state[params[0]]["step"].item() == 1


@pytest.mark.parametrize("implementation", ["loop", "foreach", "fused"])
def test_elsewhere_there_is_nothing_to_send(implementation):
    optimizer = make(implementation, parameters())
    optimizer.write_hyperparameters()
    assert optimizer._steppers.triton._hyper is None


@pytest.mark.parametrize("name", ["lr", "penalty_strength"])
@pytest.mark.parametrize("implementation", ["loop", "fused", "triton"])
def test_a_number_may_take_a_tensors_place(implementation, name):
    """Even 0, which no upload has ever brought there."""
    params = parameters()
    optimizer = make(implementation, params, ars=None, weight_decay=0.0, penalty=Pull(params))
    group = optimizer.param_groups[0]
    for value in (torch.tensor(0.5), 0.0, 0.0, torch.tensor(0.25), 0.5):
        group[name] = value
        gradients(params, 0)
        optimizer.step(loss=1.0)
        seen = float(optimizer.diagnostics["lr" if name == "lr" else "penalty"])
        assert (seen > 0) == (float(value) > 0)
        if name == "lr":
            assert seen == float(value)


def test_sending_numbers_leaves_the_penalty_alone():
    """Its buffers are filled at every step, by the graph too: they may cost a forward pass."""
    params = parameters()
    penalty = Refreshed(params)
    optimizer = make("triton", params, penalty=penalty)
    gradients(params, 0)
    optimizer.step(loss=1.0)
    optimizer.write_hyperparameters()
    assert penalty.refreshed == 1


class Refreshed:
    strength, mode, refreshed = 1.0, "coupled", 0

    def __init__(self, params):
        self.buffers = [(param, torch.zeros_like(param)) for param in params]

    def terms(self):
        return []

    def gradients(self):
        return self.buffers

    def refresh(self):
        self.refreshed += 1
        return torch.zeros(())
