"""Proximal EWC (9): stable for every strength, Adam's own step where nothing is important."""

import math

import compiling
import pytest
import torch
from compiling import SHAPES
from optimizers import IMPLEMENTATIONS, make, parameters

from ars import ARSAdamW, GradientRelease, reference

# The interpreter computes in NumPy, which warns of an infinity; on a GPU it is one like any other.
OVERFLOW = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
pytestmark = [*compiling.WARNINGS, OVERFLOW]
fresh_dynamo = compiling.fresh_dynamo

# Every third entry is free, every third pulled a little, every third held.
KINDS = (0.0, 1e-3, 10.0)


def ulps(actual, expected, magnitude):
    spacing = torch.finfo(actual.dtype).eps * torch.exp2(
        torch.frexp(magnitude.clamp(min=torch.finfo(actual.dtype).tiny))[1].double() - 1
    )
    return float(((actual.double() - expected).abs() / spacing).max())


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_closed_form_for_all_magnitudes(dtype, anchored):
    """In units in the last place: of the larger operand, or with the anchor at 0 of the result."""
    generator = torch.Generator().manual_seed(0)
    size = 20_000

    def spread(low, high):
        exponents = torch.empty(size, dtype=torch.float64).uniform_(low, high, generator=generator)
        return 10**exponents

    theta = (torch.randn(size, generator=generator) * spread(-6, 6)).to(dtype).float()
    anchor = torch.randn(size, generator=generator) * anchored
    importance = spread(-20, 20).float() * (torch.rand(size, generator=generator) < 0.9)
    denominator = spread(-30, 18).float()
    for metric in (1e-20, 1e-3, 1.0, 1e18, 3e38, 1e60, math.inf):
        found = reference.ewc_proximal(theta, anchor, importance, metric, denominator)
        q = min(metric, torch.finfo(torch.float32).max) * importance.double()
        unbounded = q > torch.finfo(torch.float32).max
        q[unbounded] = math.inf
        shrunk = (theta.double() - anchor) / (1 + q / denominator.double())
        # Rounded are the difference, the sum, the quotient, two products and the result. A factor
        # below the smallest normal number is rounded to a multiple of its spacing.
        expected, delta = anchor + shrunk, (theta.double() - anchor).abs()
        magnitude = (
            torch.maximum(theta.abs(), anchor.abs()).double() if anchored else expected.abs()
        )
        tiny = torch.finfo(torch.float32).tiny
        assert ulps(found, expected, torch.maximum(magnitude, delta * tiny)) <= 6
        assert torch.equal(found[importance == 0], theta[importance == 0])
        assert torch.equal(found[unbounded], anchor[unbounded])
        assert bool(unbounded.any()) == (metric > 1e18)
    by_product = reference.ewc_proximal(theta, anchor, importance, 0.5 / denominator)
    wanted = reference.ewc_proximal(theta, anchor, importance, 0.5, denominator)
    assert ulps(by_product, wanted.double(), torch.maximum(theta.abs(), anchor.abs())) <= 6


class Held:
    """A proximal penalty whose importance has all KINDS, of a model that has moved since."""

    mode = "proximal"

    def __init__(self, params, strength):
        self.strength = strength
        kinds = torch.tensor(KINDS)
        self.rows = [
            (p, p.detach() - 0.5, kinds[torch.arange(p.numel()) % 3].view(p.shape)) for p in params
        ]

    def terms(self):
        return self.rows


def loss_of(params):
    # Each entry's gradient is its own matter, and 0 for the first tensor's: v stays 0 there.
    return sum((0.0 if i == 0 else 1.0) * p.sin().sum() for i, p in enumerate(params))


def step_by(way, optimizer, steps):
    params = optimizer._parameters()
    step = (
        torch.compile(lambda: optimizer.step(), backend="aot_eager") if way == "compile" else None
    )
    release = GradientRelease(optimizer) if way == "release" else None
    for _ in range(steps):
        optimizer.zero_grad()
        if release is not None:
            release.backward(loss_of(params))
            continue
        loss_of(params).backward()
        (step or optimizer.step)()
    if release is not None:
        release.remove()


@pytest.mark.parametrize(("eps", "strength"), [(1e-30, 1e12), (1e-8, 1e38)])
@pytest.mark.parametrize("way", ["step", "compile", "release"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_path_is_stable_at_every_strength(implementation, way, eps, strength):
    settings = {"lr": 10.0, "eps": eps, "ars": None, "weight_decay": 0.0}
    params, free = parameters(shapes=SHAPES), parameters(shapes=SHAPES)
    penalty = Held(params, strength)
    step_by(way, optimizer := make(implementation, params, penalty=penalty, **settings), 2)
    step_by(way, make(implementation, free, **settings), 2)
    for (p, anchor, importance), other in zip(penalty.rows, free, strict=True):
        assert torch.equal(p[importance == 0], other[importance == 0])
        assert torch.equal(p[importance == 10.0], anchor[importance == 10.0])
        assert p.isfinite().all()
    assert float(optimizer.diagnostics["penalty"]) < math.inf


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("dtype", "strength"), [(torch.float32, 1e38), (torch.float64, 1e38), (torch.float16, 6e4)]
)
def test_a_learning_rate_times_strength_beyond_its_dtype_still_holds(
    implementation, dtype, strength
):
    params = parameters(shapes=SHAPES)
    penalty = Held(params, torch.tensor(strength, dtype=dtype))
    optimizer = make(implementation, params, penalty=penalty, lr=1e3, ars=None, eps=1e-20)
    step_by("step", optimizer, 2)
    for p, anchor, importance in penalty.rows:
        held = importance > 1.0
        torch.testing.assert_close(p[held], anchor[held], rtol=1e-5, atol=1e-5)
        assert p.isfinite().all()


def test_a_differentiable_step_has_finite_gradients_at_every_strength():
    lr = torch.tensor(0.1, requires_grad=True)
    weight = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    moved = weight.clone()
    rows = [(moved, torch.zeros(3), torch.tensor([0.0, 1e-3, 10.0]))]
    penalty = Held([], 1e38)
    penalty.rows = rows
    optimizer = ARSAdamW(
        [moved], lr=lr, eps=1e-30, penalty=penalty, ars=None, differentiable=True, weight_decay=0.0
    )
    moved.grad = torch.tensor([0.0, 1.0, 1.0])
    optimizer.step()
    moved.sum().backward()
    assert lr.grad.isfinite()
    assert weight.grad.tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-30)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_coupled_ewc_at_the_anchor_is_adams_step_whatever_strength_times_importance_is(
    implementation,
):
    """Of 1e38 times an importance of 1e3 the product overflows; times a difference of 0 it is 0."""
    params, free = parameters(shapes=SHAPES), parameters(shapes=SHAPES)
    penalty = Held(params, 1e38)
    penalty.mode = "coupled"
    penalty.rows = [(p, p.detach().clone(), torch.full_like(p, 1e3)) for p in params]
    settings = {"lr": 0.1, "ars": None}
    step_by("step", make(implementation, params, penalty=penalty, **settings), 1)
    step_by("step", make(implementation, free, **settings), 1)
    assert all(map(torch.equal, params, free))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "loop"])
def test_tensors_that_have_taken_different_numbers_of_steps_have_their_own_metric(
    implementation, dtype
):
    """They are updated together on a CPU, but their second moments are corrected by their steps."""
    steps, made = (0, 2, 0, 1), []
    for name in (implementation, "loop"):
        params = parameters(dtype, shapes=((5,), (3, 2), (4,), (1,)))
        optimizer = make(name, params, penalty=Held(params, 20.0), lr=0.1, ars=None)
        for index in range(5):
            generator = torch.Generator().manual_seed(index)
            for param, first in zip(params, steps, strict=True):
                gradient = torch.randn(param.shape, generator=generator).to(dtype)
                param.grad = gradient if index >= first else None
            optimizer.step()
        made.append((params, float(optimizer.diagnostics["penalty"])))
    (ours, penalty), (theirs, expected) = made
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)
    # The interpreter cuts bfloat16 where the reference rounds: a difference of the anchor's size.
    tolerance = 5e-2 if dtype == torch.bfloat16 and implementation == "triton" else 1e-5
    assert penalty == pytest.approx(expected, rel=tolerance)
