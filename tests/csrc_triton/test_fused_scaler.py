"""Scaled gradients, and steps that an infinite one turns into nothing."""

import math
from typing import Any

import pytest
import torch
from fused_oracle import assert_step
from fused_problem import Problem, make_problem
from torch import Tensor

EVERYTHING: dict[str, Any] = {
    "group_count": 2, "controller": "conditioned", "penalty": "coupled", "amsgrad": True,
    "max_norm": 2.0, "unpenalized": (1,),
}  # fmt: skip
STATE = (
    "params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps", "products", "anchors",
    "importances",
)  # fmt: skip


def number(value: float, device: str) -> Tensor:
    return torch.full((1,), value, device=device)


def assert_unchanged(problem: Problem, before: Problem) -> None:
    assert problem.controller is not None
    assert before.controller is not None
    for name in STATE:
        for value, old in zip(getattr(problem, name), getattr(before, name), strict=True):
            assert (value is None and old is None) or torch.equal(value, old)
    assert torch.equal(problem.controller.window, before.controller.window)
    assert torch.equal(problem.controller.counts, before.controller.counts)
    assert torch.equal(problem.controller.gate_state, before.controller.gate_state)


@pytest.mark.parametrize("scale", [2.0**16, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("surprise", ["norm", "loss"])
def test_scaled_gradients_give_the_step_of_the_gradients(
    surprise: str, dtype: torch.dtype, scale: float, device: str
) -> None:
    problem = make_problem(device, [dtype], **EVERYTHING)
    fused = problem.fused()
    loss = torch.tensor(0.7, device=device) if surprise == "loss" else None
    for _ in range(2):
        assert_step(problem, fused, clip=True, scale=scale, loss=loss)


def test_scale_without_norm_controller_or_penalty(device: str) -> None:
    problem = make_problem(device, [torch.float16, torch.float32], maximize=True)
    assert_step(problem, problem.fused(), scale=1024.0)


@pytest.mark.parametrize("found", [1.0, math.nan])
@pytest.mark.parametrize("loss", [None, 0.4], ids=["norm", "loss"])
def test_nothing_moves_if_a_gradient_is_infinite(
    loss: float | None, found: float, device: str
) -> None:
    problem = make_problem(device, [torch.float32, torch.bfloat16], [(5,), (6,)], **EVERYTHING)
    fused = problem.fused()
    surprise = None if loss is None else torch.tensor(loss, device=device)
    scale, found_inf = number(64.0, device), number(0.0, device)

    def step(grads: list[Tensor]) -> None:
        fused.step(grads, loss=surprise, clip=True, grad_scale=scale, found_inf=found_inf)

    step(problem.gradients())
    before, diagnostics = problem.clone(), fused.diagnostics.clone()
    assert not diagnostics.isnan().any()
    found_inf.fill_(found)
    for value in (math.inf, math.nan, 1.0):  # the flag alone counts
        step([torch.full_like(param, value) for param in problem.params])
        assert_unchanged(problem, before)
        assert torch.equal(fused.diagnostics, diagnostics)

    found_inf.zero_()
    clone = problem.clone()
    step([64 * param for param in problem.params])
    other = clone.fused()
    other.step([64 * param for param in clone.params], loss=surprise, clip=True, grad_scale=scale)
    assert_unchanged(problem, clone)
    assert torch.equal(fused.diagnostics, other.diagnostics)
    assert not torch.equal(problem.params[0], before.params[0])


def test_a_step_without_the_flag_moves_after_one_that_did_not(device: str) -> None:
    problem = make_problem(device)
    fused = problem.fused()
    fused.step(problem.gradients(), loss=None, clip=False, found_inf=number(1.0, device))
    assert_step(problem, fused)


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_numbers_that_the_kernels_cannot_read_are_refused(name: str, device: str) -> None:
    problem = make_problem(device, **EVERYTHING)
    fused = problem.fused()
    before = problem.clone()
    invalid: list[tuple[Tensor, type[Exception], str]] = [
        (number(1.0, device).double(), TypeError, r"torch\.float64; pass a torch\.float32 tensor"),
        (torch.ones(2, device=device), ValueError, r"has shape \(2,\)"),
        (torch.ones(1, device="meta"), ValueError, "on meta; pass one number on"),
    ]
    for value, error, message in invalid:
        with pytest.raises(error, match=f"{name} .*{message}"):
            fused.step(problem.gradients(), loss=None, clip=True, **{name: value})
    assert_unchanged(problem, before)
