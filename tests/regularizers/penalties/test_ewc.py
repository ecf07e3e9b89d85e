"""EWC against its float64 closed form, its contract with the optimizer, its states."""

import copy
import math

import pytest
import torch
from ewc_models import move, random_importance, small_model
from torch import nn

from ars.regularizers import EWC, DiagonalFisher


def closed_form(model, start, importance, strength):
    total = 0.0
    for name, p in model.named_parameters():
        if name in importance:
            delta = p.detach().double() - start[name].double()
            total += float((importance[name].double() * delta.pow(2)).sum())
    return strength / 2 * total


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 1e-6)]
)
def test_value_is_the_closed_form(dtype, tolerance):
    model = small_model(dtype)
    start = copy.deepcopy(model.state_dict())
    importance = random_importance(model)
    penalty = EWC(model, importance, strength=3.0)
    assert penalty.value().item() == 0.0
    move(model)
    value = penalty.value()
    assert value.shape == ()
    assert value.item() == pytest.approx(closed_form(model, start, importance, 3.0), rel=tolerance)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_gradient_is_strength_times_importance_times_displacement():
    model = small_model(torch.float64)
    importance = random_importance(model)
    penalty = EWC(model, importance, strength=3.0)
    move(model)
    penalty.value().backward()
    for name, p in model.named_parameters():
        expected = 3.0 * importance[name] * (p.detach() - penalty.anchor[name])
        torch.testing.assert_close(p.grad, expected, rtol=1e-14, atol=0.0)


def test_accepts_a_fitted_fisher():
    model = small_model()
    fisher = DiagonalFisher(model, "exact").fit([(torch.randn(5, 3), torch.arange(5) % 2)])
    penalty = EWC(model, fisher, strength=2)
    move(model)
    start = penalty.anchor
    expected = closed_form(model, start, fisher.importance, 2.0)
    assert expected > 0
    assert penalty.value().item() == pytest.approx(expected, rel=1e-6)
    assert list(penalty.importance) == list(fisher.importance)


def test_anchor_and_importance_are_copies():
    model = small_model()
    start = copy.deepcopy(model.state_dict())
    importance = {n: t.float() for n, t in random_importance(model).items()}
    penalty = EWC(model, importance)
    original = {n: t.clone() for n, t in importance.items()}
    move(model)
    for tensor in importance.values():
        tensor.zero_()
    for name in start:
        assert torch.equal(penalty.anchor[name], start[name])
        assert torch.equal(penalty.importance[name], original[name])
        assert not penalty.anchor[name].requires_grad
        assert not penalty.importance[name].requires_grad


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtype_of_anchor_and_importance(dtype, stored):
    model = small_model(dtype)
    penalty = EWC(model, random_importance(model))
    for p, anchor, importance in penalty.terms():
        assert p.dtype == dtype
        assert anchor.dtype == importance.dtype == stored
        assert torch.equal(anchor, p.detach().to(stored))


def test_terms_are_the_live_parameters_in_the_models_order():
    model = small_model()
    importance = random_importance(model)
    del importance["0.bias"]
    penalty = EWC(model, dict(reversed(importance.items())))
    named = dict(model.named_parameters())
    names = ["0.weight", "2.weight", "2.bias"]
    assert list(penalty.anchor) == list(penalty.importance) == names
    for name, (p, anchor, omega) in zip(names, penalty.terms(), strict=True):
        assert p is named[name]
        assert anchor is penalty.anchor[name]
        assert omega is penalty.importance[name]


def test_parameters_that_are_not_named_are_free():
    model = small_model()
    penalty = EWC(model, {"0.weight": torch.ones(4, 3)})
    with torch.no_grad():
        model[2].weight += 5.0
        model[0].bias += 5.0
    assert penalty.value().item() == 0.0


def test_importance_may_be_zero():
    model = small_model()
    penalty = EWC(model, {"0.bias": torch.tensor([0.0, 0.0, 2.0, 0.0])})
    with torch.no_grad():
        model[0].bias += 3.0
    assert penalty.value().item() == pytest.approx(9.0, rel=1e-6)


def test_stored_tensors_have_the_strides_of_the_parameter():
    model = nn.Conv2d(2, 4, 3, bias=False).to(memory_format=torch.channels_last)
    ((p, anchor, importance),) = EWC(model, {"weight": torch.rand(4, 2, 3, 3)}).terms()
    assert p.stride() == anchor.stride() == importance.stride()
    assert not p.is_contiguous()


def test_strength_may_change_at_any_time():
    model = small_model()
    penalty = EWC(model, random_importance(model), strength=1)
    move(model)
    value = penalty.value().item()
    penalty.strength = 7
    assert isinstance(penalty.strength, float)
    assert penalty.value().item() == pytest.approx(7 * value, rel=1e-6)


def test_strength_may_be_a_tensor_that_is_read_live():
    model = small_model()
    strength = torch.tensor(1.0)
    penalty = EWC(model, random_importance(model), strength=strength)
    move(model)
    value = penalty.value().item()
    strength.fill_(7.0)
    assert penalty.value().item() == pytest.approx(7 * value, rel=1e-6)
    assert penalty.state_dict()["strength"] == 7.0


@pytest.mark.parametrize(
    ("strength", "error"),
    [
        ("1", TypeError),
        (None, TypeError),
        (True, TypeError),
        (torch.ones(1), TypeError),
        (torch.tensor(1), TypeError),
        (torch.tensor(-1.0), ValueError),
    ],
)
def test_refuses_wrong_strength(strength, error):
    model = small_model()
    with pytest.raises(error, match="strength must be"):
        EWC(model, random_importance(model), strength=strength)


@pytest.mark.parametrize("mode", ["Coupled", None, ["coupled"]])
def test_refuses_unknown_mode(mode):
    model = small_model()
    with pytest.raises(
        ValueError, match=r"unknown mode .* choose one of \['coupled', 'proximal'\]"
    ):
        EWC(model, random_importance(model), mode=mode)


@pytest.mark.parametrize(
    ("importance", "error", "match"),
    [
        ({}, ValueError, "fisher is empty"),
        ([("0.bias", torch.ones(4))], TypeError, "got list"),
        (
            {"3.bias": torch.ones(4)},
            ValueError,
            r"'3.bias', which is not a parameter of Sequential",
        ),
        ({"0.bias": [1.0] * 4}, TypeError, "'0.bias' must be a tensor, got list"),
        ({"0.bias": torch.ones(4).long()}, TypeError, "'0.bias' must be floating point"),
        ({"0.bias": torch.ones(4, 1)}, ValueError, r"'0.bias' has shape \(4, 1\).* has \(4,\)"),
        ({"0.bias": torch.full((4,), math.nan)}, ValueError, "'0.bias' .*not finite"),
        ({"0.bias": torch.full((4,), math.inf)}, ValueError, "'0.bias' .*not finite"),
        (
            {"0.bias": torch.full((4,), 1e300, dtype=torch.float64)},
            ValueError,
            r"not finite in torch\.float32",
        ),
        ({"0.bias": torch.tensor([1.0, 1.0, -1e-30, 1.0])}, ValueError, "'0.bias' .*negative"),
    ],
)
def test_refuses_wrong_importance(importance, error, match):
    with pytest.raises(error, match=match):
        EWC(small_model(), importance)


def test_refuses_wrong_model_and_unfitted_fisher():
    model = small_model()
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got dict"):
        EWC({}, random_importance(model))
    with pytest.raises(ValueError, match="not fitted; call fit"):
        EWC(model, DiagonalFisher(model))


def test_names_the_first_name_of_a_tied_weight(tied_gpt):
    model = tied_gpt()
    with pytest.raises(ValueError, match=r"'lm_head.weight' is tied to 'wte.weight'"):
        EWC(model, {"lm_head.weight": torch.ones_like(model.lm_head.weight)})


@pytest.mark.parametrize("storage", ["full", "bfloat16", "compact"])
def test_state_round_trip(storage, tmp_path):
    model = small_model()
    saved = EWC(model, random_importance(model), 3.0, "proximal", storage=storage)
    saved.add_task(random_importance(model, seed=4))
    torch.save(saved.state_dict(), tmp_path / "ewc.pt")
    move(model)
    loaded = EWC(model, random_importance(model, seed=9), storage=storage)
    addresses = [t.data_ptr() for term in loaded.terms() for t in term]
    loaded.load_state_dict(torch.load(tmp_path / "ewc.pt", weights_only=True))
    assert loaded.strength == 3.0
    assert loaded.mode == "proximal"
    assert loaded.constant == saved.constant
    for ours, theirs in zip(loaded.terms(), saved.terms(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
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
