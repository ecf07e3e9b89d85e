"""EWC against its float64 closed form, its contract with the optimizer, its states."""

import copy
import math

import pytest
import torch
from ewc_models import move, random_importance, small_model
from torch import nn

from ars.regularizers import EWC, DiagonalFisher, dequantize, quantize

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", ["full", "bfloat16", "compact"])
def test_what_is_stored_its_value_and_its_gradient(storage, dtype):
    """Anchors and importances are rounded once; the rest is computed in float32 at least."""
    model = small_model(dtype)
    start, importance = copy.deepcopy(model.state_dict()), random_importance(model)
    penalty = EWC(model, importance, 3.0, storage=storage)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kept = wide if storage == "full" else torch.bfloat16
    assert (penalty.value() == 0) == (storage == "full" or dtype == torch.bfloat16)
    move(model)
    value = penalty.value()
    value.backward()
    total = 0.0
    # One rounding to the parameter's dtype, and for the rest float32's.
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 1e-2)
    named = dict(model.named_parameters())
    for (name, omega), (p, anchor, *stored) in zip(
        importance.items(), penalty.terms(), strict=True
    ):
        assert p is named[name]
        assert anchor.dtype == kept
        assert torch.equal(anchor, start[name].to(kept))
        expected = quantize(omega) if storage == "compact" else [omega.to(wide).to(kept)]
        assert all(map(torch.equal, stored, expected))
        assert [t.dtype for t in stored] == [t.dtype for t in expected]
        omega = dequantize(*stored) if storage == "compact" else stored[0]
        delta = p.detach().double() - anchor.double()
        pull = 3.0 * omega.double() * delta
        torch.testing.assert_close(p.grad, pull.to(dtype), rtol=tolerance, atol=0.0)
        total += 0.5 * float((pull * delta).sum())
    assert value.shape == ()
    assert value.dtype == wide
    assert value.item() == pytest.approx(total, rel=1e-14 if wide == torch.float64 else 1e-6)


@pytest.mark.parametrize("storage", ["full", "bfloat16"])
def test_stored_tensors_have_the_strides_of_the_parameter(storage):
    model = nn.Conv2d(2, 4, 3, bias=False).to(memory_format=torch.channels_last)
    penalty = EWC(model, {"weight": torch.rand(4, 2, 3, 3)}, storage=storage)
    ((p, anchor, importance),) = penalty.terms()
    assert p.stride() == anchor.stride() == importance.stride()
    assert not p.is_contiguous()
    move(model)
    penalty.value().backward()
    pull = importance.float() * (p.detach() - anchor.float())
    torch.testing.assert_close(p.grad, pull, rtol=1e-6, atol=0.0)


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


def put(**changes):
    return lambda state: state | changes


def put_in(part, name, value):
    """Change an entry of a part; None takes it out."""
    if value is None:
        return lambda state: state | {part: without(state[part], name)}
    return lambda state: state | {part: state[part] | {name: value}}


BREAKAGES = {
    "not a mapping": (lambda s: None, ValueError, "got NoneType"),
    "no storage": (lambda s: without(s, "storage"), ValueError, "with keys .*'storage'"),
    "no mode": (lambda s: without(s, "mode"), ValueError, "with keys .*'mode'"),
    "extra key": (put(step=1), ValueError, "'step'"),
    "estimator": (put(estimator=torch.ones(1)), TypeError, "estimator must be a name"),
    "strength": (put(strength=-1.0), ValueError, "strength must be"),
    "nan strength": (put(strength=math.nan), ValueError, "strength must be"),
    "large strength": (put(strength=1e39), ValueError, "strength must be"),
    "constant": (put(constant=math.inf), ValueError, "the state's constant must be finite"),
    "mode": (put(mode="hard"), ValueError, "unknown mode 'hard'"),
    "anchor type": (put(anchor=1), TypeError, "anchor must be a mapping"),
    "no anchor": (put_in("anchor", "2.bias", None), ValueError, "anchor lacks '2.bias'"),
    "anchor's shape": (
        put_in("anchor", "2.bias", torch.ones(3)), ValueError,
        r"anchor of '2.bias' has shape \(3,\).* has \(2,\)",
    ),
    "anchor": (
        put_in("anchor", "2.bias", torch.tensor([1.0, math.nan])), ValueError,
        "anchor of '2.bias' .*not finite",
    ),
    "no importance": (
        put_in("importance", "0.weight", None), ValueError, "importance lacks '0.weight'",
    ),
    "more importance": (
        put_in("importance", "4.bias", torch.ones(1)), ValueError, "importance has '4.bias'",
    ),
    "importance": (
        put_in("importance", "2.bias", -torch.ones(2)), ValueError,
        "importance of '2.bias' .*negative",
    ),
    "layer strength": (
        put_in("layer_strengths", "2.bias", -1.0), ValueError,
        "must be finite and >= 0, got -1.0",
    ),
    "no layer strength": (
        put_in("layer_strengths", "2.bias", None), ValueError, "layer_strengths lacks '2.bias'",
    ),
}  # fmt: skip


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
