"""Every way by which a strength comes in refuses one that float32 cannot compute with."""

import math

import pytest
import torch
from ewc_models import random_importance, small_model

from ars import ARSAdamW
from ars.regularizers import (
    EWC,
    AdaptiveStrength,
    CombinedLoss,
    Distillation,
    KroneckerPenalty,
    ProgressiveInheritance,
    SubspacePenalty,
    trace_strengths,
)


def ewc(strength, **options):
    model = small_model()
    return EWC(model, random_importance(model), strength, **options)


def kronecker(strength):
    model = small_model()
    weight = model[0].weight
    return KroneckerPenalty(
        model, {"0.weight": (torch.eye(weight.shape[1]), torch.eye(len(weight)))}, strength
    )


def subspace(strength):
    return SubspacePenalty(small_model(), {"0.weight": torch.tensor([1])}, strength)


def progressive(strength):
    penalty = ProgressiveInheritance(ewc(1.0), subspace(1.0))
    penalty.strength = strength
    return penalty


BUILT = {
    "ewc": ewc,
    "kronecker": kronecker,
    "subspace": subspace,
    "progressive": progressive,
    "distillation": lambda strength: Distillation(small_model(), strength),
}
WAYS = {
    **{name: ("strength", build) for name, build in BUILT.items()},
    "layer": (r"layer_strengths\['0.*'\]", lambda x: ewc(1.0, layer_strengths={"0.*": x})),
    "l2": ("l2", lambda x: CombinedLoss(l2=x, model=small_model())),
    "group": (
        "penalty_strength",
        lambda x: ARSAdamW([{"params": [torch.ones(1)], "penalty_strength": x}]),
    ),
    "bounds": (
        "bounds", lambda x: AdaptiveStrength(ewc(1.0), ratio=0.1, bounds=(1e-3, x)),
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


@pytest.mark.parametrize("build", BUILT.values(), ids=BUILT)
def test_a_strength_set_later_is_refused_and_the_old_one_kept(build):
    penalty = build(3.0)
    for wrong in (1e39, torch.tensor(2e38), torch.tensor(math.inf), -0.1):
        with pytest.raises(ValueError, match="strength must be"):
            penalty.strength = wrong
        assert penalty.strength == 3.0


def test_a_state_with_such_a_strength_is_refused_and_nothing_changes():
    penalty = ewc(3.0)
    for wrong in (1e39, math.nan):
        with pytest.raises(ValueError, match="strength must be"):
            penalty.load_state_dict({**penalty.state_dict(), "strength": wrong})
    with pytest.raises(ValueError, match="the state's constant must be finite"):
        penalty.load_state_dict({**penalty.state_dict(), "constant": math.inf})
    assert penalty.strength == 3.0


def test_a_layer_strength_whose_product_overflows_names_the_parameter():
    model = small_model()
    importance = {"0.weight": torch.full_like(model[0].weight, 1e3)}
    with pytest.raises(ValueError, match=r"'0.weight', times its layer strength, .* not finite"):
        EWC(model, importance, layer_strengths={"0.weight": 1e38})


@pytest.mark.parametrize("build", [ewc, kronecker, subspace], ids=["ewc", "kronecker", "subspace"])
def test_at_the_anchor_the_largest_strength_changes_nothing(build):
    """Its products with importances overflow, but all of them are of a difference of 0."""
    penalty = build(1e38)
    params = [pair[0] for pair in [*penalty.terms(), *getattr(penalty, "gradients", list)()]]
    optimizer = ARSAdamW(params, lr=0.1, weight_decay=0.0, ars=None, penalty=penalty)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p, old - 0.1, rtol=1e-6, atol=1e-6)
