"""Penalties applied by the optimizer against the same penalties added to the loss."""

import copy

import pytest
import torch
from ewc_models import move, random_importance, small_model

from ars import ARSAdamW
from ars.regularizers import (
    EWC,
    AdaptiveStrength,
    KroneckerFisher,
    KroneckerPenalty,
    ProgressiveInheritance,
    SubspacePenalty,
)


def subspace(model, strength=0.3, **options):
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(4, 2, generator=generator, dtype=torch.float64)).Q
    bases = {"2.weight": basis, "0.weight": torch.tensor([1])}
    return SubspacePenalty(model, bases, strength, **options)


def ewc(model, **options):
    return EWC(model, random_importance(model), 0.2, **options)


def kronecker(model):
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    return KroneckerPenalty(
        model, KroneckerFisher(model, "exact").fit([(inputs, torch.arange(6) % 2)])
    )


KINDS = {
    "subspace": subspace,
    "outside": lambda model: subspace(model, protect="outside"),
    "ewc": ewc,
    "bfloat16": lambda model: ewc(model, storage="bfloat16"),
    "compact": lambda model: ewc(model, storage="compact"),
    "progressive": lambda model: ProgressiveInheritance(ewc(model), subspace(model)),
    "kronecker": kronecker,
}
PATHS = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def loss_of(model, step):
    generator = torch.Generator().manual_seed(100 + step)
    inputs = torch.randn(8, 3, generator=generator).to(model[0].weight.dtype)
    return (model(inputs) - 1.0).square().mean()


def loss_of_one_layer(model, step):
    """Now the first layer has no gradient, now the second."""
    return (model[2 * (step // 2 % 2)].weight - 1).square().sum()


@pytest.mark.parametrize("loss_of", [loss_of, loss_of_one_layer])
@pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_coupled_steps_are_those_of_the_penalty_in_the_loss(build, path, loss_of):
    """Layers that the loss does not use are pulled too, without weight decay."""
    ours = small_model(torch.float64)
    theirs = copy.deepcopy(ours)
    within, added = build(ours), build(theirs)
    decay = 0.0 if loss_of is loss_of_one_layer else 0.1
    for model in (ours, theirs) if loss_of is loss_of_one_layer else ():
        move(model)
    options = {"lr": 0.01, "weight_decay": decay}
    optimizer = ARSAdamW(ours.parameters(), penalty=within, ars=None, **options, **path)
    reference = torch.optim.AdamW(theirs.parameters(), **options)
    for step in range(6):
        optimizer.zero_grad()
        loss = loss_of(ours, step)
        loss.backward()
        value = within.value().item()
        optimizer.step(loss=loss.detach())
        assert float(optimizer.diagnostics["penalty"]) == pytest.approx(value, rel=1e-6, abs=1e-15)
        reference.zero_grad()
        (loss_of(theirs, step) + added.value()).backward()
        reference.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert value > 0


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_proximal_penalty_with_a_subspace_pulls_an_unused_layer_by_both(path):
    model = small_model(torch.float64)
    parts = ewc(model, mode="proximal"), subspace(model, 30.0)
    move(model)
    optimizer = ARSAdamW(
        model.parameters(), lr=0.01, weight_decay=0.0, ars=None,
        penalty=ProgressiveInheritance(*parts), **path,
    )  # fmt: skip
    model[2].weight.sum().backward()
    before = [part.value().item() for part in parts]
    for _ in range(30):
        optimizer.step()
        model[2].weight.grad.zero_()
    assert all(part.value().item() < 0.9 * value for part, value in zip(parts, before, strict=True))
    assert optimizer.state[model[0].weight]["step"] == 30  # the subspace's gradient is Adam's
    assert optimizer.state[model[0].bias]["step"] == 0


def test_clipping_does_not_touch_the_penalty():
    """With the task's gradient clipped to nothing the penalty's direction alone is left."""
    model = small_model(torch.float64)
    penalty = subspace(model, 1e3)
    move(model)
    optimizer = ARSAdamW(
        model.parameters(), lr=0.01, weight_decay=0.0, ars=None, penalty=penalty,
        max_grad_norm=1e-12,
    )  # fmt: skip
    loss_of(model, 0).backward()
    penalty.refresh()
    direction = [buffer.sign() for _, buffer in penalty.gradients()]
    before = [p.detach().clone() for p, _ in penalty.gradients()]
    optimizer.step(loss=torch.tensor(1.0))
    for old, sign, (p, buffer) in zip(before, direction, penalty.gradients(), strict=True):
        pulled = buffer.abs() > 1e-3
        assert pulled.any()
        moved = (p - old)[pulled]
        torch.testing.assert_close(moved, -0.01 * sign[pulled], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_proximal_ewc_with_a_subspace_stays_where_it_is_held(path):
    model = small_model()
    start = copy.deepcopy(model)
    weights_only = {n: t for n, t in random_importance(model).items() if n != "0.bias"}
    held = ProgressiveInheritance(EWC(model, weights_only, 1e12, "proximal"), subspace(model, 1.0))
    optimizer = ARSAdamW(model.parameters(), lr=0.05, weight_decay=0.0, penalty=held, **path)
    for step in range(5):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step(loss=loss.detach())
    moved = {
        n: (p - q).detach().abs().max().item()
        for (n, p), q in zip(model.named_parameters(), start.parameters(), strict=True)
    }
    assert moved.pop("0.bias") > 0.02
    assert max(moved.values()) < 1e-5


def test_projection_after_the_step_keeps_the_subspace_exactly():
    model = small_model(torch.float64)
    hard = subspace(model)
    optimizer = ARSAdamW(model.parameters(), lr=0.05, penalty=ewc(model))
    for step in range(5):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step(loss=loss.detach())
        hard.project_()
        assert hard.value().item() < 1e-25
    assert (model[2].weight - hard.anchor["2.weight"]).abs().max() > 0.01


@pytest.mark.parametrize("build", [ewc, subspace], ids=["ewc", "subspace"])
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_step_reads_an_adaptive_strength_where_it_is(build, path):
    ours = small_model(torch.float64)
    theirs = copy.deepcopy(ours)
    within, numbered = build(ours), build(theirs)
    full = within.strength
    adaptive = AdaptiveStrength(within, total_steps=4)
    options = {"lr": 0.01, "ars": None, **path}
    pairs = [
        (ours, ARSAdamW(ours.parameters(), penalty=within, **options)),
        (theirs, ARSAdamW(theirs.parameters(), penalty=numbered, **options)),
    ]
    for step in range(5):
        adaptive.step()
        numbered.strength = full * max(0.0, 1 - step / 4)
        for model, optimizer in pairs:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            optimizer.step(loss=loss.detach())
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
