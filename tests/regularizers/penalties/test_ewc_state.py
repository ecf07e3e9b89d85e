"""Saving and loading an EWC penalty."""

import copy
import math

import pytest
import torch
from ewc_models import move, random_importance, small_model

from ars.regularizers import EWC


def test_state_round_trip(tmp_path):
    model = small_model()
    saved = EWC(model, random_importance(model), strength=3.0, mode="proximal")
    torch.save(saved.state_dict(), tmp_path / "ewc.pt")
    move(model)
    loaded = EWC(model, random_importance(model, seed=9))
    addresses = [t.data_ptr() for term in loaded.terms() for t in term]
    loaded.load_state_dict(torch.load(tmp_path / "ewc.pt", weights_only=True))
    assert loaded.strength == 3.0
    assert loaded.mode == "proximal"
    for name in saved.anchor:
        assert torch.equal(loaded.anchor[name], saved.anchor[name])
        assert torch.equal(loaded.importance[name], saved.importance[name])
    assert loaded.value().item() == saved.value().item() > 0
    # The optimizer may hold the tensors: they are filled, not replaced.
    assert [t.data_ptr() for term in loaded.terms() for t in term] == addresses


def test_layer_strengths_come_along():
    model = small_model()
    first, second = random_importance(model), random_importance(model, seed=4)
    saved = EWC(model, first, layer_strengths={"0.*": 3.0})
    loaded = EWC(model, first, layer_strengths={"2.*": 5.0})
    loaded.load_state_dict(saved.state_dict())
    move(model)
    for penalty in (saved, loaded):
        penalty.add_task(second)
    for name, omega in saved.importance.items():
        assert torch.equal(loaded.importance[name], omega)
    loaded.load_state_dict(EWC(model, first, layer_strengths={"0.*": 3.0}).state_dict())
    loaded.consolidate(second, decay=0.0)
    assert torch.equal(loaded.importance["0.bias"], 3.0 * second["0.bias"].float())
    assert torch.equal(loaded.importance["2.bias"], second["2.bias"].float())


@pytest.mark.parametrize("storage", ["full", "bfloat16", "compact"])
def test_another_storage_is_refused_by_name(storage):
    model = small_model()
    state = EWC(model, random_importance(model), storage=storage).state_dict()
    assert state["storage"] == storage
    for other in {"full", "bfloat16", "compact"} - {storage}:
        penalty = EWC(model, random_importance(model), storage=other)
        with pytest.raises(ValueError, match=f"the state has storage='{storage}', .* '{other}'"):
            penalty.load_state_dict(state)


def without(mapping, key):
    return {k: v for k, v in mapping.items() if k != key}


BREAKAGES = {
    "estimator": (
        lambda s: {**s, "estimator": torch.ones(1)},
        TypeError,
        "estimator must be a name",
    ),
    "no storage": (lambda s: without(s, "storage"), ValueError, "with keys .*'storage'"),
    "layer strength": (
        lambda s: s | {"layer_strengths": s["layer_strengths"] | {"2.bias": -1.0}},
        ValueError,
        "must be finite and >= 0, got -1.0",
    ),
    "missing layer strength": (
        lambda s: s | {"layer_strengths": without(s["layer_strengths"], "2.bias")},
        ValueError,
        "layer_strengths lacks '2.bias'",
    ),
    "not a mapping": (lambda s: None, ValueError, "got NoneType"),
    "missing key": (lambda s: without(s, "mode"), ValueError, "with keys .*'mode'"),
    "extra key": (lambda s: s | {"step": 1}, ValueError, "'step'"),
    "strength": (lambda s: s | {"strength": -1.0}, ValueError, "strength"),
    "mode": (lambda s: s | {"mode": "hard"}, ValueError, "unknown mode 'hard'"),
    "anchor type": (lambda s: s | {"anchor": 1}, TypeError, "anchor must be a mapping"),
    "missing anchor": (
        lambda s: s | {"anchor": without(s["anchor"], "2.bias")},
        ValueError,
        "anchor lacks '2.bias'",
    ),
    "missing importance": (
        lambda s: s | {"importance": without(s["importance"], "0.weight")},
        ValueError,
        "importance lacks '0.weight'",
    ),
    "extra importance": (
        lambda s: s | {"importance": s["importance"] | {"4.bias": torch.ones(1)}},
        ValueError,
        "importance has '4.bias'",
    ),
    "shape": (
        lambda s: s | {"anchor": s["anchor"] | {"2.bias": torch.ones(3)}},
        ValueError,
        r"anchor of '2.bias' has shape \(3,\).* has \(2,\)",
    ),
    "nan": (
        lambda s: s | {"anchor": s["anchor"] | {"2.bias": torch.tensor([1.0, math.nan])}},
        ValueError,
        "anchor of '2.bias' .*not finite",
    ),
    "negative": (
        lambda s: s | {"importance": s["importance"] | {"2.bias": -torch.ones(2)}},
        ValueError,
        "importance of '2.bias' .*negative",
    ),
}


@pytest.mark.parametrize(("breakage", "error", "match"), BREAKAGES.values(), ids=BREAKAGES)
def test_refuses_a_state_that_does_not_fit_before_changing_anything(breakage, error, match):
    model = small_model()
    other = EWC(model, random_importance(model, seed=5), strength=9.0, mode="proximal")
    with torch.no_grad():
        other.anchor["0.weight"].fill_(-2.0)  # anchors may be negative
    penalty = EWC(model, random_importance(model))
    before = copy.deepcopy(penalty.state_dict())
    with pytest.raises(error, match=match):
        penalty.load_state_dict(breakage(other.state_dict()))
    assert (penalty.strength, penalty.mode) == (before["strength"], before["mode"])
    for part in ("anchor", "importance"):
        for name, tensor in before[part].items():
            assert torch.equal(getattr(penalty, part)[name], tensor)
    penalty.load_state_dict(other.state_dict())
    assert (penalty.anchor["0.weight"] == -2.0).all()
