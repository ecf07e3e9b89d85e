"""torch's optimizer tests of gradient scaling, on a CPU.

Covers ``test_fused_does_not_step_if_foundinf``, and of ``TestCudaOptims`` in torch's test_cuda.py
``test_grad_scaling_autocast_fused_optimizers``.
"""

import copy
import math

import pytest
import torch
from torch_suite import (
    CLASSES,
    FLAGS,
    IMPLEMENTATIONS,
    KERNELS_TOO,
    affine,
    assert_same,
    cases,
    clones,
)


def memory(optimizer, params):
    """Copies of the parameters and of the controller's window and counts."""
    controller = optimizer.state_dict().get("controller", {})
    tensors = {name: controller[name] for name in ("window", "counts") if controller}
    return copy.deepcopy([param.detach() for param in params]), copy.deepcopy(tensors)


@pytest.mark.parametrize(("scale", "shape"), [(None, ()), (4.0, (1,))])
@cases(every_input=False)
def test_does_not_step_if_foundinf(case, scale, shape):
    """Nothing moves, at the first step or later; then the gradient is divided by the scale."""
    params, copies = ([torch.ones(3) for _ in range(5)] for _ in range(2))
    optimizer, expected = case.build(params), case.build(copies)

    def step(found):
        for i, (a, b) in enumerate(zip(params, copies, strict=True)):
            b.grad = torch.full((3,), i + 1.0)
            a.grad = math.inf * b.grad if found else b.grad * (scale or 1.0)
        optimizer.grad_scale = None if scale is None else torch.full(shape, scale)
        optimizer.found_inf = torch.full(shape, float(found))
        optimizer.step()
        if not found:
            expected.step()

    taken = 0
    for found in (True, False, True, False, False, True):
        before = memory(optimizer, params)
        step(found)
        taken += not found
        if found:
            assert_same(memory(optimizer, params), before)
        assert {int(state["step"]) for state in optimizer.state.values()} <= {taken}
        torch.testing.assert_close(memory(optimizer, params), memory(expected, copies))
    states = ([*o.state.values()] for o in (optimizer, expected))
    for ours, theirs in zip(*states, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("unscale_first", [False, True])
@cases(implementations=KERNELS_TOO, every_input=False)
def test_grad_scaler(case, unscale_first):
    """The parameters and the scaler are those of torch's optimizer, infinities on the way."""

    def run(build, params):
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=3)
        optimizer, scales = build(params), []
        for step in range(8):
            optimizer.zero_grad()
            loss = params[0].mv(given).add(params[1]).square().sum()
            scaler.scale(loss).backward()
            if step in (2, 3):
                params[1].grad[0] = math.inf
            if unscale_first:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return optimizer, scales

    given = torch.randn(5)
    params, _ = affine()
    copies = clones(params)
    ours, scales = run(case.build, params)
    assert {int(state["step"]) for state in ours.state.values()} == {6}
    if case.ars is None:
        _, expected = run(case.theirs, copies)
    else:  # the same class, and the scaler unscales and leaves steps out
        _, expected = run(lambda params: outside(case.build(params)), copies)
        assert int(ours.controller.counts[1]) == 6
    torch.testing.assert_close(params, copies)
    assert scales == expected == [128.0] * 2 + [64.0, 32.0, 32.0, 32.0, 64.0, 64.0]


def outside(optimizer):
    """Leave the scaling to the scaler."""
    optimizer._step_supports_amp_scaling = False
    return optimizer


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("implementation", ["", *IMPLEMENTATIONS])
def test_the_step_does_the_scaling(cls, implementation):
    """On a CPU every implementation can, so that no pass over the gradients is needed before."""
    optimizer = cls([torch.ones(3, requires_grad=True)], **FLAGS.get(implementation, {}))
    assert optimizer._step_supports_amp_scaling is True
