"""What only a GPU shows: races, graphs, waiting, and tensors of more than 2^31 elements."""

from typing import Any

import pytest
import torch
from fused_oracle import MOMENT_ULPS, PARAM_ULPS, PENALTY_TOLERANCE, assert_step, ulps
from fused_problem import HYPER, Problem, make_problem, plain_numbers
from torch import Tensor

from ars import reference
from ars.csrc_triton.layout import Diagnostic
from ars.csrc_triton.step import FusedAdam
from ars.csrc_triton.tiles import CAPTURES
from waiting import waiting_refused

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
EVERYTHING: dict[str, Any] = {
    "controller": "conditioned", "penalty": "coupled", "max_norm": 5.0, "amsgrad": True,
    "group_count": 2, "unpenalized": (1,),
}  # fmt: skip


def assert_same_bits(a: Problem, b: Problem) -> None:
    for name in ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps", "products"):
        assert all(map(torch.equal, getattr(a, name), getattr(b, name)))
    assert a.controller is not None
    assert b.controller is not None
    assert torch.equal(a.controller.window, b.controller.window)
    assert torch.equal(a.controller.counts, b.controller.counts)
    assert torch.equal(a.controller.gate_state, b.controller.gate_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_large_and_many_tensors_equal_the_reference(dtype: torch.dtype) -> None:
    shapes = [(2**20 + 3,), (4096, 257), *[(64,)] * 300, (1,)]
    problem = make_problem(DEVICE, [dtype], shapes, **EVERYTHING)
    fused = problem.fused()
    for _ in range(3):
        assert_step(problem, fused, clip=True)


def test_reductions_over_many_programs_have_no_races() -> None:
    problem = make_problem(DEVICE, shapes=[(2**24 + 1,), (2**22,)], penalty="coupled", max_norm=1.0)
    grads = problem.gradients()
    penalty = sum(
        float(reference.ewc_value(*(t.double() for t in operands), HYPER["strength"]))
        for operands in zip(problem.params, problem.anchors or (), problem.importances or (),
                            strict=True)
    )  # fmt: skip
    norm = float(reference.grad_norm(grads))
    seen = set()
    for _ in range(50):
        again = problem.clone()
        fused = again.fused()
        fused.step(grads, loss=None, clip=True)
        seen.add(tuple(fused.diagnostics[[Diagnostic.GRAD_NORM, Diagnostic.PENALTY]].tolist()))
    assert len(seen) == 1
    assert seen.pop() == pytest.approx((norm, penalty), rel=PENALTY_TOLERANCE)


def test_steps_never_wait_for_the_device() -> None:
    problem = make_problem(DEVICE, [torch.float32, torch.bfloat16], [(5000,), (7,)], **EVERYTHING)
    fused = problem.fused()
    fused.step(problem.gradients(), loss=None, clip=True)
    torch.cuda.synchronize()
    with waiting_refused():
        for _ in range(5):
            loss = torch.rand((), device=DEVICE)
            fused.step(problem.gradients(), loss=loss, clip=True)  # the gradients have moved
        another = problem.fused()
        another.step(problem.gradients(), loss=None, clip=True)


def test_a_step_is_two_kernels_on_the_device() -> None:
    problem = make_problem(DEVICE, shapes=[(300,)] * 100, **EVERYTHING)
    fused = problem.fused()
    grads = problem.gradients()
    fused.step(grads, loss=None, clip=True)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        fused.step(grads, loss=None, clip=True)
        torch.cuda.synchronize()
    kernels = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and "kernel" in event.name
    ]
    assert kernels == ["control_kernel", "adam_kernel"]


def capture(fused: FusedAdam, grads: list[Tensor], loss: Tensor) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused.step(grads, loss=loss, clip=True)
    return graph


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.float32, torch.bfloat16]])
def test_a_graph_replays_with_live_numbers(dtypes: list[torch.dtype]) -> None:
    problem = make_problem(DEVICE, dtypes, [(5000,), (7,), (33, 65)], **EVERYTHING)
    eager, warm = problem.clone(), problem.clone()
    static = problem.gradients()
    loss = torch.ones((), device=DEVICE)
    warm.fused().step(static, loss=loss, clip=True)  # compiles
    fused, other = problem.fused(), eager.fused()
    graph = capture(fused, static, loss)
    for index in range(30):
        grads = problem.gradients()
        for target, grad in zip(static, grads, strict=True):
            target.copy_(grad)
        loss.fill_(1 / (1 + index % 7))
        for each in (problem, eager):
            each.hyper.mul_(0.97)
        if index == 15:  # a step outside of the graph must not disturb the graph's addresses
            fused.step(grads, loss=loss, clip=True)
        else:
            graph.replay()
        other.step(grads, loss=loss.clone(), clip=True)
        assert_same_bits(problem, eager)
        torch.testing.assert_close(fused.diagnostics, other.diagnostics, rtol=0, atol=0)


def test_a_graph_skips_and_unscales_by_the_numbers_at_replay() -> None:
    problem = make_problem(DEVICE, shapes=[(5000,), (7,)], **EVERYTHING)
    scale, found_inf = torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    static = problem.gradients()

    def step(fused: FusedAdam) -> None:
        fused.step(static, loss=None, clip=True, grad_scale=scale, found_inf=found_inf)

    step(problem.clone().fused())  # compiles
    eager = problem.clone()
    fused, other = problem.fused(), eager.fused()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(fused)
    for index in range(12):
        scale.fill_(2.0**index)
        found_inf.fill_(index % 3 == 1)
        for target, grad in zip(static, problem.gradients(), strict=True):
            target.copy_(grad * scale)
        before, diagnostics = problem.clone(), fused.diagnostics.clone()
        graph.replay()
        step(other)
        assert_same_bits(problem, eager)
        torch.testing.assert_close(fused.diagnostics, other.diagnostics, rtol=0, atol=0)
        if index % 3 == 1:
            assert_same_bits(problem, before)
            torch.testing.assert_close(fused.diagnostics, diagnostics, rtol=0, atol=0)
        else:
            assert not torch.equal(problem.params[0], before.params[0])


def test_captures_that_cannot_be_right_are_refused() -> None:
    problem = make_problem(DEVICE, shapes=[(9,)], **EVERYTHING | {"unpenalized": ()})
    loss = torch.ones((), device=DEVICE)
    grads = problem.gradients()
    fused = problem.fused()
    fused.step(grads, loss=loss, clip=True)
    graphs = [capture(fused, [grad.clone() for grad in grads], loss) for _ in range(CAPTURES)]
    work = torch.zeros(3, device=DEVICE)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        work.add_(1)  # an empty capture would warn
        with pytest.raises(RuntimeError, match="take one step outside of a capture"):
            fused.step(grads, loss=loss, clip=True)
        with pytest.raises(RuntimeError, match="before capturing"):
            problem.fused()
    fused.step(grads, loss=loss, clip=True)
    graphs.append(capture(fused, grads, loss))
    for graph in graphs:
        before = problem.steps[0].item()
        graph.replay()
        assert problem.steps[0].item() == before + 1


@pytest.mark.parametrize("mode", ["master", "stochastic"])
@pytest.mark.parametrize("penalty_dtype", [torch.float32, torch.uint8])
def test_large_bfloat16_tensors_equal_the_reference(mode: str, penalty_dtype: torch.dtype) -> None:
    options = EVERYTHING | {"penalty_dtypes": (penalty_dtype,), "pulled": (0, 2), mode: True}
    shapes = [(2**20 + 3,), (4096, 257), *[(64,)] * 300, (1,)]
    problem = make_problem(DEVICE, [torch.bfloat16], shapes, **options)
    fused = problem.fused()
    for _ in range(3):
        assert_step(problem, fused, clip=True, scale=64.0)


def test_stochastic_rounding_is_the_references_on_the_device() -> None:
    problem = make_problem(DEVICE, [torch.bfloat16], [(2**20 + 5,), (77,)], stochastic=True)
    plain_numbers(problem)
    expected = problem.clone()
    fused, grads = problem.fused(), problem.gradients()
    fused.step(grads, loss=None, clip=False)
    expected.reference_step_(grads, loss=None, clip=False, reported=fused.diagnostics)
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        assert all(map(torch.equal, getattr(problem, name), getattr(expected, name)))


def test_master_weights_take_100_steps_of_float32() -> None:
    problem = make_problem(
        DEVICE, [torch.bfloat16], [(2**18 + 3,), (5,)], controller="conditioned", max_norm=5.0,
        master=True,
    )  # fmt: skip
    full = problem.clone()
    full.params, full.remainders = [problem.weight(i) for i in range(2)], None
    fused, other = problem.fused(), full.fused()
    for index in range(100):
        grads = problem.gradients()
        loss = torch.rand((), device=DEVICE) + index % 2
        fused.step(grads, loss=loss, clip=False)
        other.step([grad.float() for grad in grads], loss=loss, clip=False)
    for i in range(2):
        assert torch.equal(problem.weight(i), full.params[i])
        assert torch.equal(problem.exp_avgs[i], full.exp_avgs[i])


def test_more_elements_than_an_int32_counts() -> None:
    """Needs 35 GB: bfloat16 with float32 moments, compared at the start, the middle and the end."""
    numel = 2**31 + 4097
    problem = make_problem(DEVICE, [torch.bfloat16], [(1,)])
    sample = torch.randn(4099, device=DEVICE)

    def fill(dtype: torch.dtype) -> Tensor:
        return torch.full((numel,), 0.25, dtype=dtype, device=DEVICE)

    param, grad = fill(torch.bfloat16), fill(torch.bfloat16)
    exp_avg, exp_avg_sq = fill(torch.float32), fill(torch.float32)
    places = [slice(0, 4099), slice(2**30 + 5, 2**30 + 4104), slice(numel - 4099, numel)]
    for place in places:
        param[place] = sample
        grad[place] = sample.flip(0)
    problem.params, problem.exp_avgs, problem.exp_avg_sqs = [param], [exp_avg], [exp_avg_sq]
    row = HYPER
    expected = [
        reference.adam_step(
            param[place].clone(), grad[place].clone(), exp_avg[place].clone(),
            exp_avg_sq[place].clone(), lr=row["lr"], beta1=row["beta1"], beta2=row["beta2"],
            correction1=1 - row["beta1"], correction2=1 - row["beta2"], eps=row["eps"],
            weight_decay=row["weight_decay"],
        )
        for place in places
    ]  # fmt: skip
    problem.fused().step([grad], loss=None, clip=False)
    for place, result in zip(places, expected, strict=True):
        assert ulps(exp_avg[place], result.exp_avg, sample) <= MOMENT_ULPS[torch.float32]
        assert ulps(param[place], result.param, sample) <= PARAM_ULPS[torch.bfloat16]
    untouched = exp_avg[5000 : 2**30]
    assert untouched.eq(untouched[0]).all()
