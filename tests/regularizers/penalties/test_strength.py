"""Strengths by schedule, ratio and layer against formulas in floats; strengths out of range."""

import math

import pytest
import torch
from ewc_models import move, random_importance, small_model

from ars import ARSAdamW
from ars.regularizers import (
    EWC,
    AdaptiveStrength,
    CombinedLoss,
    DiagonalFisher,
    Distillation,
    KroneckerPenalty,
    ProgressiveInheritance,
    SubspacePenalty,
    trace_strengths,
)


def ewc(model, strength=3.0, **options):
    return EWC(model, random_importance(model), strength, **options)


def subspace(model, strength=3.0):
    basis = torch.linalg.qr(torch.randn(4, 2)).Q
    return SubspacePenalty(model, {"2.weight": basis.to(model[2].weight.dtype)}, strength)


def gradient_norms(model, penalty):
    """Norms of the task's gradient and the penalty's, over the parameters it penalises."""
    params = list(model.parameters())
    task = [p.grad for p in params]
    pulls = torch.autograd.grad(penalty.value(), params, allow_unused=True)
    used = [(g, pull) for g, pull in zip(task, pulls, strict=True) if pull is not None]
    return (math.sqrt(sum(float(x[i].double().square().sum()) for x in used)) for i in (0, 1))


def backward(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    model.zero_grad()
    inputs = torch.randn(8, 3, generator=generator).to(model[0].weight.dtype)
    model(inputs).square().mean().backward()


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_schedule(power):
    model = small_model()
    penalty = ewc(model, 6.0)
    adaptive = AdaptiveStrength(penalty, total_steps=5, power=power)
    assert penalty.strength.item() == 6.0
    for t in range(8):
        adaptive.step()
        expected = 6.0 * max(0.0, 1 - t / 5) ** power
        assert penalty.strength.item() == pytest.approx(expected, rel=1e-6)


def kronecker(model, strength=3.0):
    root = torch.randn(4, 4)
    return KroneckerPenalty(model, {"2.weight": (root @ root.T, None)}, strength)


@pytest.mark.parametrize(
    "build", [ewc, subspace, kronecker, lambda model: ewc(model, storage="compact")]
)
def test_ratio_is_reached_at_once_without_smoothing(build):
    model = small_model()
    penalty = build(model)
    adaptive = AdaptiveStrength(penalty, ratio=0.25, smoothing=0.0)
    for seed in range(3):
        move(model, seed=seed)
        backward(model, seed)
        adaptive.step()
        task, pull = gradient_norms(model, penalty)
        assert pull == pytest.approx(0.25 * task, rel=1e-5)


def test_norms_of_float16_gradients_do_not_overflow():
    model = small_model(torch.float16)
    penalty = ewc(model)
    adaptive = AdaptiveStrength(penalty, ratio=0.25, smoothing=0.0, bounds=(1e-3, 1e9))
    move(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3e4)  # the first weight's norm is above the largest float16
    task, pull = gradient_norms(model, penalty)
    adaptive.step()
    assert penalty.strength.item() == pytest.approx(3.0 * 0.25 * task / pull, rel=1e-3)


def test_ratio_is_smoothed_in_the_logarithm_and_bounded():
    model = small_model(torch.float64)
    penalty = ewc(model, 3.0)
    adaptive = AdaptiveStrength(penalty, ratio=1.0, smoothing=0.8, bounds=(1.0, 20.0))
    move(model)
    backward(model)
    _, pull = gradient_norms(model, penalty)
    expected = 3.0
    for scale in (1.0, 1e9, 1e-9, 2.0):
        target = min(max(scale / (pull / 3.0), 1.0), 20.0)
        expected = expected**0.8 * target**0.2
        adaptive.step(torch.tensor(scale))
        assert penalty.strength.item() == pytest.approx(expected, rel=1e-5)
    for _ in range(100):
        adaptive.step(torch.tensor(1e9))
    assert penalty.strength.item() == pytest.approx(20.0)


def test_schedule_and_ratio_multiply():
    model = small_model()
    penalty = ewc(model, 3.0)
    adaptive = AdaptiveStrength(penalty, ratio=1.0, smoothing=0.0, total_steps=2)
    move(model)
    strengths = []
    for _ in range(3):
        adaptive.step(torch.tensor(1.0))
        strengths.append(penalty.strength.item())
    assert strengths[0] > 0
    assert strengths == pytest.approx([strengths[0], strengths[0] / 2, 0.0])


@pytest.mark.parametrize("grad_norm", [0.0, math.nan, math.inf])
def test_stays_where_a_norm_says_nothing(grad_norm):
    model = small_model()
    penalty = ewc(model)
    adaptive = AdaptiveStrength(penalty, ratio=1.0, smoothing=0.5)
    adaptive.step(torch.tensor(1.0))  # at the anchor: the penalty's gradient is 0
    assert penalty.strength.item() == 3.0
    adaptive.step()  # no parameter has a gradient
    move(model)
    adaptive.step(torch.tensor(grad_norm))
    assert penalty.strength.item() == 3.0


def test_the_tensor_is_the_penaltys_and_stays_the_same():
    model = small_model()
    penalty = ewc(model)
    adaptive = AdaptiveStrength(penalty, total_steps=4)
    address = penalty.strength.data_ptr()
    assert address == adaptive.strength.data_ptr()
    move(model)
    full = penalty.value().item()
    for _ in range(3):
        adaptive.step()
    assert penalty.strength.data_ptr() == address
    assert penalty.value().item() == pytest.approx(full / 2, rel=1e-6)


def test_state_round_trip():
    model = small_model()
    move(model)
    runs = [AdaptiveStrength(ewc(model), ratio=1.0, total_steps=50) for _ in range(2)]
    move(model, seed=5)
    for _ in range(3):
        runs[0].step(torch.tensor(2.0))
    address = runs[1].strength.data_ptr()
    runs[1].load_state_dict(runs[0].state_dict())
    assert runs[1].strength.item() == runs[0].strength.item() != 3.0
    for run in runs:
        run.step(torch.tensor(5.0))
    assert runs[1].strength.item() == runs[0].strength.item()
    assert runs[1].strength.data_ptr() == address
    with pytest.raises(ValueError, match="steps must be an integer >= 0, got -1"):
        runs[0].load_state_dict({"steps": -1, "level": 1.0, "strength": 1.0})
    with pytest.raises(ValueError, match=r"keys .*'level'"):
        runs[0].load_state_dict({"steps": 1})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "give total_steps for a schedule, ratio to"),
        ({"total_steps": 0}, "total_steps must be an integer >= 1"),
        ({"total_steps": 1.5}, "total_steps must be an integer >= 1"),
        ({"total_steps": 3, "power": 0.0}, "power must be finite and > 0"),
        ({"ratio": 0.0}, "ratio must be finite and > 0"),
        ({"ratio": math.inf}, "ratio must be finite and > 0"),
        ({"ratio": 1.0, "smoothing": 1.0}, r"smoothing must be in \[0, 1\)"),
        ({"ratio": 1.0, "bounds": (0.0, 1.0)}, "bounds must be 0 < low <= high"),
        ({"ratio": 1.0, "bounds": (5.0, 2.0)}, "bounds must be 0 < low <= high"),
        ({"ratio": 1.0, "bounds": (5.0, 9.0)}, "strength 3.0 is outside bounds"),
    ],
)
def test_refuses_wrong_options(options, match):
    penalty = ewc(small_model())
    with pytest.raises(ValueError, match=match):
        AdaptiveStrength(penalty, **options)
    assert penalty.strength == 3.0


def test_refuses_what_has_not_one_strength():
    model = small_model()
    with pytest.raises(TypeError, match=r"has two strengths; adapt its \.ewc"):
        AdaptiveStrength(ProgressiveInheritance(ewc(model), subspace(model)), total_steps=3)
    with pytest.raises(TypeError, match="penalty Linear has no strength"):
        AdaptiveStrength(torch.nn.Linear(1, 1), total_steps=3)


def test_trace_strengths_level_the_layers():
    model = small_model()
    fisher = DiagonalFisher(model, "exact").fit([(torch.randn(5, 3), torch.arange(5) % 2)])
    factors = trace_strengths(fisher)
    penalty = EWC(model, fisher, layer_strengths=factors)
    traces = [float(omega.sum()) for omega in penalty.importance.values()]
    mean = sum(float(o.sum()) for o in fisher.importance.values()) / 4
    assert traces == pytest.approx([mean] * 4, rel=1e-5)
    assert max(factors.values()) > 2 * min(factors.values())
    bounded = trace_strengths(fisher, bounds=(0.9, 1.1))
    assert bounded == {name: min(max(factor, 0.9), 1.1) for name, factor in factors.items()}
    assert {0.9, 1.1} <= set(bounded.values())  # both bounds are met
    with pytest.raises(ValueError, match="bounds must be"):
        trace_strengths(fisher, bounds=(1.0, math.inf))


def test_goes_on_in_a_penalty_that_loaded_a_state():
    model = small_model()
    penalty, other = ewc(model), ewc(model)
    adaptive = AdaptiveStrength(penalty, total_steps=4)
    adaptive.step()
    resumed = AdaptiveStrength(other, total_steps=4)
    resumed.load_state_dict(adaptive.state_dict())
    other.load_state_dict(penalty.state_dict())
    for _ in range(2):
        adaptive.step()
        resumed.step()
        assert float(other.strength) == float(penalty.strength)
    assert float(other.strength) < 3.0


def progressive(strength):
    model = small_model()
    penalty = ProgressiveInheritance(ewc(model), subspace(model))
    penalty.strength = strength
    return penalty


BUILT = {
    "ewc": lambda strength: ewc(small_model(), strength),
    "kronecker": lambda strength: kronecker(small_model(), strength),
    "subspace": lambda strength: subspace(small_model(), strength),
    "progressive": progressive,
    "distillation": lambda strength: Distillation(small_model(), strength),
}
WAYS = {
    **{name: ("strength", build) for name, build in BUILT.items()},
    "layer": (
        r"layer_strengths\['0.*'\]", lambda x: ewc(small_model(), layer_strengths={"0.*": x}),
    ),
    "l2": ("l2", lambda x: CombinedLoss(l2=x, model=small_model())),
    "group": (
        "penalty_strength",
        lambda x: ARSAdamW([{"params": [torch.ones(1)], "penalty_strength": x}]),
    ),
    "bounds": (
        "bounds", lambda x: AdaptiveStrength(ewc(small_model(), 1.0), ratio=0.1, bounds=(1e-3, x)),
    ),
    "traces": (
        "bounds", lambda x: trace_strengths({"a": torch.ones(1)}, bounds=(1e-3, x)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("strength", [1e39, 2e38, 10**400, math.inf, math.nan, -1.0])
@pytest.mark.parametrize(("name", "build"), WAYS.values(), ids=WAYS)
def test_a_strength_out_of_range_is_refused_by_name(name, build, strength):
    with pytest.raises(ValueError, match=name):
        build(strength)


NO_STRENGTHS = ["1", None, True, torch.ones(1), torch.tensor(1)]
WRONG = [*((wrong, TypeError) for wrong in NO_STRENGTHS)]
WRONG += [(wrong, ValueError) for wrong in (1e39, -0.1, *map(torch.tensor, (2e38, math.inf, -1.0)))]


@pytest.mark.parametrize("build", BUILT.values(), ids=BUILT)
def test_a_wrong_strength_is_refused_when_built_and_later_and_the_old_one_kept(build):
    penalty = build(3.0)
    for wrong, error in WRONG:
        with pytest.raises(error, match="strength must be"):
            build(wrong)
        with pytest.raises(error, match="strength must be"):
            penalty.strength = wrong
        assert penalty.strength == 3.0


@pytest.mark.parametrize("name", ["ewc", "kronecker", "subspace"])
def test_a_strength_is_read_at_every_call_also_from_a_tensor(name):
    strength = torch.tensor(1.0)
    penalty = BUILT[name](strength)
    for param, *_ in [*penalty.terms(), *getattr(penalty, "gradients", list)()]:
        param.data += 0.5

    def pulls():
        """The value, and what else depends on the strength."""
        seen = [penalty.value().detach(), *torch.autograd.grad(penalty.value(), param)]
        if name == "ewc":
            return seen
        return [*seen, penalty.refresh(), *(buffer.clone() for _, buffer in penalty.gradients())]

    before = pulls()
    strength.fill_(4.0)
    assert penalty.state_dict()["strength"] == 4.0
    for new, old in zip(pulls(), before, strict=True):
        assert old.any()
        torch.testing.assert_close(new, 4 * old)
    penalty.strength = 7
    assert isinstance(penalty.strength, float)
    for new, old in zip(pulls(), before, strict=True):
        torch.testing.assert_close(new, 7 * old)


@pytest.mark.parametrize("name", ["ewc", "kronecker", "subspace"])
def test_at_the_anchor_the_largest_strength_changes_nothing(name):
    """Its products with importances overflow, but all of them are of a difference of 0."""
    penalty = BUILT[name](1e38)
    params = [pair[0] for pair in [*penalty.terms(), *getattr(penalty, "gradients", list)()]]
    optimizer = ARSAdamW(params, lr=0.1, weight_decay=0.0, ars=None, penalty=penalty)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p, old - 0.1, rtol=1e-6, atol=1e-6)
