"""The optimizers under test: every implementation of the step behind one constructor."""

import torch

from ars import ARSAdamW

IMPLEMENTATIONS = ("loop", "foreach", "fused", "triton")
FORCED = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def make(implementation, params, cls=ARSAdamW, **settings):
    """Build an optimizer on the CPU; its Triton kernels run in the interpreter there."""
    optimizer = cls(params, **settings, **FORCED.get(implementation, {}))
    if implementation == "triton":
        optimizer._implementation = "triton"
    assert optimizer._implementation == implementation
    return optimizer


def parameters(dtype=torch.float32, shapes=((3,), (), (17, 5), (0,), (129,))):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def gradients(params, seed, scale=1.0):
    """Give every parameter a gradient that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        gradient = scale * torch.randn(param.shape, generator=generator)
        param.grad = gradient.to(param.dtype)


def train(optimizer, params, steps, first=0, **step):
    for index in range(first, first + steps):
        gradients(params, index)
        optimizer.step(**step)
    return [param.detach().clone() for param in params]


class Pull:
    """The smallest penalty there is: the optimizer's protocol and nothing else."""

    def __init__(self, params, strength=3.0, mode="coupled", skip=()):
        self.strength, self.mode = strength, mode
        generator = torch.Generator().manual_seed(9)
        self.rows = [
            (p, p.detach().float() - 0.5, torch.rand(p.shape, generator=generator))
            for i, p in enumerate(params)
            if i not in skip
        ]

    def terms(self):
        return self.rows
