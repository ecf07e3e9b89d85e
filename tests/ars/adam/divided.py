"""A small model under fully_shard, its training, and its states: the same for any number of ranks.

The gradients are given, so that training rounds alike however the model is divided.
"""

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ars import ARSAdamW, ARSConfig
from ars.regularizers import EWC
from ranks import placed, whole

# Saved just after an alarm: Phi is far below 1 for some steps more.
ALARMED = ARSConfig(window=12, threshold=6.0, first_release=3, release=9)
PAPER = ARSConfig.paper(window=5)
STEPS = 16


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 1))


def divide(model):
    """Shard a model over all ranks, its first layer by itself."""
    fully_shard(model[0], mesh=(mesh := init_device_mesh("cpu", (distributed.get_world_size(),))))
    return fully_shard(model, mesh=mesh)


def build(config, storage="full", seed=0, **settings):
    model = divide(network(seed))
    importance = {name: torch.ones(p.shape) for name, p in model.named_parameters()}
    penalty = EWC(model, importance, strength=0.1, storage=storage)
    optimizer = ARSAdamW(model.parameters(), lr=0.01, ars=config, penalty=penalty, **settings)
    return model, optimizer, penalty


def train(model, optimizer, steps, first=0):
    """Take steps, and return their Phis."""
    phis = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            gradient = torch.randn(param.shape, generator=generator)
            how = param.placements if isinstance(param, DTensor) else None
            mesh = None if how is None else param.device_mesh
            (param.grad,) = placed([gradient], mesh, [how])
        noise = 0.1 * torch.rand((), generator=generator) + 2.0 * (step == STEPS - 1)
        given = {"loss": 3.0 + noise} if isinstance(optimizer, ARSAdamW) else {}
        optimizer.step(**given)
        optimizer.zero_grad()
        if given:
            phis.append(float(optimizer.diagnostics["phi"]))
    return phis


def memory(optimizer):
    """Return copies of what the controller remembers."""
    state = optimizer.controller.state_dict()
    return {name: tensor.clone() for name, tensor in state.items()}


def summary(model, optimizer):
    """Return the whole weights and all of the optimizer's state."""
    states = [optimizer.state[p] for p in model.parameters()]
    return [whole(p) for p in model.parameters()] + [whole(s[k]) for s in states for k in sorted(s)]


def states_of(model, optimizer, penalty, options=None):
    weights, state = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": state, "penalty": penalty.state_dict()}


def set_states(model, optimizer, penalty, states, options=None):
    set_state_dict(
        model,
        optimizer,
        model_state_dict=states["model"],
        optim_state_dict=states["optimizer"],
        options=options,
    )
    penalty.load_state_dict(states["penalty"])
