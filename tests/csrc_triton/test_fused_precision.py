"""bfloat16 parameters: master weights, stochastic rounding; pulls and compact importances."""

import math
from typing import Any

import pytest
import torch
from fused_oracle import assert_step
from fused_problem import make_problem, plain_numbers

from ars import reference
from ars.csrc_triton import adam
from ars.csrc_triton import rounding as kernel
from ars.csrc_triton.layout import Hyper
from ars.csrc_triton.tiles import TILE
from ars.reference import penalties, rounding

BF16 = torch.bfloat16
MODES: dict[str, dict[str, Any]] = {"master": {"master": True}, "stochastic": {"stochastic": True}}
VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "amsgrad-adam": {"amsgrad": True, "decoupled": False},
    "coupled-clip": {"penalty": "coupled", "max_norm": 3.0, "unpenalized": (1,)},
    "proximal": {"penalty": "proximal"},
    "pulled": {"pulled": (0, 2)},
    "pulled-maximize-clip": {"pulled": (2,), "maximize": True, "max_norm": 2.0},
    "pulled-coupled": {"pulled": (1, 2), "penalty": "coupled", "unpenalized": (0, 1)},
    "compact": {"penalty": "coupled", "penalty_dtypes": (torch.uint8,), "unpenalized": (1,)},
    "compact-proximal-pulled": {
        "penalty": "proximal", "penalty_dtypes": (torch.uint8,), "pulled": (2,),
    },
    "two-storages": {"penalty": "coupled", "penalty_dtypes": (torch.uint8, torch.float32)},
    "gated": {"controller": "conditioned", "group_count": 2, "max_norm": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_bf16_step_equals_the_reference(
    variant: dict[str, Any], mode: dict[str, Any], device: str
) -> None:
    problem = make_problem(device, [BF16], **variant, **mode)
    fused = problem.fused()
    for _ in range(2):
        assert_step(problem, fused, clip=math.isfinite(variant.get("max_norm", math.inf)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, BF16])
@pytest.mark.parametrize("name", [name for name in VARIANTS if "pulled" in name or "comp" in name])
def test_pulls_and_compact_importances_in_any_dtype(
    name: str, dtype: torch.dtype, device: str
) -> None:
    problem = make_problem(device, [dtype], **VARIANTS[name])
    assert_step(problem, problem.fused(), clip="max_norm" in VARIANTS[name])


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_other_dtypes_beside_them_are_as_before(mode: dict[str, Any], device: str) -> None:
    problem = make_problem(device, [torch.float32, BF16, torch.float64], [(65,), (3,)], **mode)
    plain = problem.clone()
    plain.remainders, plain.stochastic = None, False
    for i in (2, 3):
        plain.exp_avgs[i], plain.exp_avg_sqs[i] = (
            t[i].float() for t in (plain.exp_avgs, plain.exp_avg_sqs)
        )
    fused = problem.fused()
    grads = [0.5 * param for param in problem.params]
    other = plain.fused()
    assert_step(problem, fused, grads=grads)
    other.step(grads, loss=None, clip=False)
    for i in (0, 1, 4, 5):
        assert torch.equal(problem.params[i], plain.params[i])
        assert torch.equal(problem.exp_avgs[i], plain.exp_avgs[i])


def test_master_weights_take_the_steps_of_float32(device: str) -> None:
    """Exactly: the same gradients give the same bits after ten steps."""
    problem = make_problem(device, [BF16], [(33, 65)], master=True)
    full = problem.clone()
    full.params, full.remainders = [problem.weight(0)], None
    fused, other = problem.fused(), full.fused()
    for _ in range(10):
        grads = problem.gradients()
        fused.step(grads, loss=None, clip=False)
        other.step([grad.float() for grad in grads], loss=None, clip=False)
        assert torch.equal(problem.weight(0), full.params[0])
    assert torch.equal(problem.exp_avgs[0], full.exp_avgs[0])


@pytest.mark.parametrize("seed", [0, 2**64 - 1, -(2**50) - 3])
def test_stochastic_rounding_is_the_references_bit_by_bit(seed: int, device: str) -> None:
    problem = make_problem(device, [BF16], [(2 * TILE + 2047,), (3, 50)], stochastic=True)
    plain_numbers(problem)
    problem.seed, problem.numbers = seed, [0, 2**32 - 1]
    expected, before = problem.clone(), problem.exp_avgs[0].float()
    fused, grads = problem.fused(), problem.gradients()
    fused.step(grads, loss=None, clip=False)
    expected.reference_step_(grads, loss=None, clip=False, reported=fused.diagnostics)
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        assert all(map(torch.equal, getattr(problem, name), getattr(expected, name)))
    nearest = (0.5 * (before + grads[0].float())).to(BF16)
    differ = (problem.exp_avgs[0] != nearest).float().mean()
    assert 0.1 < differ < 0.5  # half of those that are between two numbers


def test_the_kernels_constants_are_the_references() -> None:
    assert kernel.ROUNDS.value == rounding.ROUNDS
    assert kernel.SERVED.value == 8
    assert adam.SCALED.value == penalties.SCALED


def test_stochastic_rounding_does_not_depend_on_the_geometry(device: str) -> None:
    """A misaligned view takes another path; a transposed one is the same memory."""
    problem = make_problem(device, [BF16], [(64, 97)], stochastic=True)
    plain_numbers(problem)
    moved, turned = problem.clone(), problem.clone()
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        (value,) = getattr(problem, name)
        room = torch.empty(value.numel() + 1, dtype=BF16, device=device)[1:].view_as(value)
        setattr(moved, name, [room.copy_(value)])
        setattr(turned, name, [value.clone().t()])
    (grad,) = problem.gradients()
    problem.fused().step([grad], loss=None, clip=False)
    moved.fused().step([grad], loss=None, clip=False)
    turned.fused().step([grad.t()], loss=None, clip=False)
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        (value,) = getattr(problem, name)
        assert torch.equal(value, getattr(moved, name)[0])
        assert torch.equal(value, getattr(turned, name)[0].t())


@pytest.mark.parametrize("mode", ["master", "stochastic"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_no_number_stays_so(value: float, mode: str, device: str) -> None:
    problem = make_problem(device, [BF16], [(1030,)], **MODES[mode])
    if problem.remainders is not None:
        problem.remainders[0].zero_()
    problem.params[0].fill_(value)
    problem.exp_avgs[0].zero_()
    problem.fused().step([torch.zeros_like(problem.params[0])], loss=None, clip=False)
    expected = torch.full_like(problem.params[0], value)
    assert torch.equal(problem.params[0].nan_to_num(7), expected.nan_to_num(7))
    problem.exp_avgs[0].fill_(value)
    problem.params[0].fill_(1.0)
    problem.fused().step([torch.zeros_like(problem.params[0])], loss=None, clip=False)
    assert not problem.params[0].isfinite().any()
    assert not problem.exp_avgs[0].isfinite().any()


@pytest.mark.parametrize("mode", ["master", "stochastic"])
def test_a_nan_that_rounding_would_turn_into_zero_stays_nan(mode: str, device: str) -> None:
    """0x7FFFFFFF, which GPUs produce: one more is the pattern of -0."""
    problem = make_problem(device, [BF16], [(1030,)], pulled=(0,), **MODES[mode])
    assert problem.pulls is not None
    nan = torch.full((1030,), 0x7FFFFFFF, dtype=torch.int32, device=device).view(torch.float32)
    problem.pulls = [nan]
    if problem.remainders is not None:
        problem.params[0].fill_(-0.0)
        problem.remainders[0].fill_(-1)
        assert torch.equal(problem.weight(0).view(torch.int32), nan.view(torch.int32))
    problem.fused().step(problem.gradients(), loss=None, clip=False)
    for values in (problem.params, problem.exp_avgs, problem.exp_avg_sqs):
        assert values[0].isnan().all()


def test_a_pull_is_not_scaled_clipped_or_turned_round(device: str) -> None:
    problem = make_problem(device, [torch.float32], [(600,)], pulled=(0,), maximize=True)
    problem.hyper[:, Hyper.MAX_NORM] = 1e-3
    free = problem.clone()
    free.hyper[:, Hyper.MAX_NORM], free.hyper[:, Hyper.SIGN] = math.inf, 1.0
    zero = [torch.zeros_like(problem.params[0])]
    scale = torch.full((1,), 1024.0, device=device)
    problem.fused().step(zero, loss=None, clip=True, grad_scale=scale)
    free.fused().step(zero, loss=None, clip=False)
    assert torch.equal(problem.params[0], free.params[0])
    assert reference.grad_norm(zero) == 0
