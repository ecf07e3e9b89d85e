"""Penalties in the step: strengths of groups, compressed importances, gradients of other kinds."""

import math

import pytest
import torch
from optimizers import IMPLEMENTATIONS, Pull, gradients, make, parameters, train

from ars import ARSAdamW, reference
from ars.step.cpu import BLOCK

SHAPES = ((5,), (9, 16), (3,))


class Other:
    """A penalty that is not elementwise: half the square of each parameter's sum, times 3."""

    mode = "coupled"

    def __init__(self, params, also=None):
        self.strength, self.also = 3.0, also
        self.rows = [(p, torch.full(p.shape, math.nan)) for p in params]

    def terms(self):
        return [] if self.also is None else self.also.terms()

    def gradients(self):
        return self.rows

    def refresh(self):
        assert not torch.is_grad_enabled()
        for param, buffer in self.rows:
            buffer.fill_(self.strength * param.sum())
        return sum(0.5 * self.strength * param.sum() ** 2 for param, _ in self.rows)


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_other_gradients_join_after_clipping(implementation, elementwise):
    """Against autograd's gradient of the penalty, added by hand to the clipped one."""
    params, plain = parameters(shapes=SHAPES), parameters(shapes=SHAPES)
    also = Pull(params[1:]) if elementwise else None
    penalty = Other(params[:2], also)
    ours = make(implementation, params, lr=0.01, penalty=penalty, max_grad_norm=0.5, ars=None)
    theirs = torch.optim.AdamW(plain, lr=0.01)
    for seed in range(4):
        gradients(params, seed)
        gradients(plain, seed)
        torch.nn.utils.clip_grad_norm_(plain, 0.5)
        value = sum(1.5 * p.sum() ** 2 for p in plain[:2])
        if elementwise:
            rows = zip(plain[1:], also.terms(), strict=True)
            value = value + sum(1.5 * (o * (p - a) ** 2).sum() for p, (_, a, o) in rows)
        for param, more in zip(
            plain, torch.autograd.grad(value, plain, allow_unused=True), strict=True
        ):
            param.grad += 0 if more is None else more
        ours.step()
        theirs.step()
        assert float(ours.diagnostics["penalty"]) == pytest.approx(value.item(), rel=1e-5)
    assert_equal(params, plain)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_other_gradients_pull_also_when_ascending(implementation):
    param = torch.ones(4, requires_grad=True)
    optimizer = make(implementation, [param], lr=0.1, penalty=Other([param]), maximize=True)
    param.grad = torch.zeros(4)
    optimizer.step()
    assert float(param.detach().max()) < 0.95


def test_other_gradients_follow_a_parameter_that_was_moved_by_hand():
    param = torch.ones(4, requires_grad=True)
    optimizer = ARSAdamW([param], lr=0.1, penalty=Other([param]), ars=None)
    param.grad = torch.zeros(4)
    optimizer.step()
    with torch.no_grad():
        param.fill_(-1.0)
    optimizer.step()
    assert float(optimizer.diagnostics["penalty"]) == pytest.approx(0.5 * 3 * 16)


def test_other_gradients_have_no_strength_of_a_group():
    params = parameters(shapes=SHAPES)
    groups = [{"params": params, "penalty_strength": 1.0}]
    optimizer = ARSAdamW(groups, penalty=Other(params))
    gradients(params, 0)
    with pytest.raises(ValueError, match="set penalty_strength to None"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("mode", ["coupled", "proximal"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_group_may_have_its_own_strength(implementation, mode):
    """Equal to one optimizer for each group."""
    params = parameters(shapes=SHAPES)
    rows = Pull(params, strength=3.0, mode=mode)
    groups = [{"params": params[:1]}, {"params": params[1:2], "penalty_strength": 0.5},
              {"params": params[2:], "penalty_strength": 0}]  # fmt: skip
    optimizer = make(implementation, groups, ars=None, lr=0.01, penalty=rows)
    train(optimizer, params, 3)
    value = float(optimizer.diagnostics["penalty"])
    total = 0.0
    for index, strength in enumerate((3.0, 0.5, 0.0)):
        alone = parameters(shapes=SHAPES)
        penalty = Pull(alone, strength=strength, mode=mode)
        penalty.rows = penalty.rows[index : index + 1]
        single = make("loop", alone[index : index + 1], ars=None, lr=0.01, penalty=penalty)
        for seed in range(3):
            gradients(alone, seed)
            single.step()
        total += float(single.diagnostics["penalty"])
        assert_equal(params[index : index + 1], alone[index : index + 1])
    assert value == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("implementation", ["loop", "fused", "triton"])
def test_the_strength_may_be_a_tensor_and_is_read_at_every_step(implementation):
    a, b = parameters(shapes=SHAPES), parameters(shapes=SHAPES)
    strength = torch.tensor(2.0)
    first = make(implementation, a, penalty=Pull(a, strength=strength))
    second = make("loop", b, penalty=Pull(b, strength=2.0))
    train(first, a, 2)
    train(second, b, 2)
    strength.fill_(7.0)
    second.penalty.strength = 7.0
    assert_equal(train(first, a, 2, first=2), train(second, b, 2, first=2))


class Compressed(Pull):
    """The importance in uint8 with a scale for 64 elements, values that come back exactly."""

    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        generator = torch.Generator().manual_seed(3)
        self.plain = []
        rows = []
        for param, anchor, _ in self.rows:
            values = torch.randint(0, 256, param.shape, generator=generator, dtype=torch.uint8)
            scale = torch.rand((param.numel() + 63) // 64, generator=generator) + 0.5
            rows.append((param, anchor, values, scale))
            root = values.flatten().double() / 255
            omega = scale.double()[torch.arange(param.numel()) // 64] * root * root
            self.plain.append((param, anchor, omega.view(param.shape).float()))
        self.rows = rows


@pytest.mark.parametrize("mode", ["coupled", "proximal"])
@pytest.mark.parametrize(
    ("implementation", "shapes"),
    [*((name, SHAPES) for name in IMPLEMENTATIONS), ("fused", ((5,), (2 * BLOCK + 70,)))],
    ids=[*IMPLEMENTATIONS, "fused-in-blocks"],
)
def test_a_compressed_importance_equals_the_plain_one(implementation, mode, shapes):
    a, b = parameters(shapes=shapes), parameters(shapes=shapes)
    penalty, plain = Compressed(a, mode=mode), Pull(b, mode=mode)
    plain.rows = [(p, *row[1:]) for p, row in zip(b, penalty.plain, strict=True)]
    first, second = make(implementation, a, penalty=penalty), make("loop", b, penalty=plain)
    assert_equal(train(first, a, 3), train(second, b, 3))
    for name, value in second.diagnostics.items():
        assert float(first.diagnostics[name]) == pytest.approx(float(value), rel=1e-5, nan_ok=True)


def test_the_reference_decodes_by_hand():
    values = torch.full((2, 33), 51, dtype=torch.uint8)
    expected = torch.tensor([25.0] * 64 + [50.0] * 2).view(2, 33) / 25
    torch.testing.assert_close(
        reference.decode_importance(values, torch.tensor([25.0, 50.0])), expected
    )


@pytest.mark.parametrize(
    ("buffer", "match"),
    [
        (torch.zeros(4), r"pull of b has shape \(4,\)"),
        (torch.zeros(5).double(), "pull of b must be torch.float32 .* is torch.float64"),
        (torch.zeros(5, device="meta"), "pull of b is on meta"),
    ],
    ids=["shape", "dtype", "device"],
)
def test_a_bad_buffer_is_refused_by_name(buffer, match):
    params = parameters(shapes=((3,), (5,)))
    penalty = Other(params)
    penalty.rows[1] = (params[1], buffer)
    with pytest.raises(ValueError, match=match):
        ARSAdamW(list(zip("ab", params, strict=True)), penalty=penalty)


def test_two_buffers_for_one_parameter_and_none_to_fill_them():
    params = parameters(shapes=((3,), (5,)))
    penalty = Other(params)
    penalty.rows.append(penalty.rows[0])
    with pytest.raises(ValueError, match="two gradients for parameter 0 of group 0"):
        ARSAdamW(params, penalty=penalty)

    class Unfilled(Pull):
        def gradients(self):
            return []

    with pytest.raises(TypeError, match=r"Unfilled has gradients\(\) but no refresh"):
        ARSAdamW(params, penalty=Unfilled(params))
