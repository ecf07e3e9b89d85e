"""EWC over several tasks, layers of different strength, and models that grow."""

import copy
import math

import pytest
import torch
from ewc_models import move, random_importance, small_model
from torch import nn

from ars.regularizers import EWC, DiagonalFisher


def tasks(model, count=4):
    """Importance and anchor of each task; the model ends elsewhere than any of them."""
    for seed in range(count):
        move(model, seed=10 + seed)
        importance = random_importance(model, seed=20 + seed)
        importance["0.weight"][0] = 0.0  # no task cares
        if seed:
            importance["0.weight"][1] = 0.0  # only the first does
        yield importance, {n: p.detach().clone() for n, p in model.named_parameters()}


def test_separate_tasks_in_the_memory_of_one_are_the_sum_of_all():
    model = small_model(torch.float64)
    penalty, separate = None, []
    for importance, anchor in tasks(model):
        separate.append((importance, anchor))
        if penalty is None:
            penalty = EWC(model, importance, 3.0)
            addresses = [t.data_ptr() for term in penalty.terms() for t in term]
        else:
            penalty.add_task(importance)
    assert [t.data_ptr() for term in penalty.terms() for t in term] == addresses
    move(model, seed=99)
    total = sum(
        1.5 * (f[n] * (p - a[n]).square()).sum()
        for f, a in separate
        for n, p in model.named_parameters()
    )
    expected = torch.autograd.grad(total, list(model.parameters()))
    ours = torch.autograd.grad(penalty.value(), list(model.parameters()))
    for gradient, closed in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, closed, rtol=1e-12, atol=1e-12)
    assert penalty.constant > 0
    value = penalty.value().item() + 3.0 * penalty.constant
    assert value == pytest.approx(total.item(), rel=1e-12)
    # Where no task cares there is no pull, and nothing undefined.
    assert all(t.isfinite().all() for t in (*penalty.anchor.values(), *ours))


def test_online_decays_the_importance_and_moves_the_anchor():
    model = small_model(torch.float64)
    expected, penalty = None, None
    for importance, anchor in tasks(model):
        if penalty is None:
            penalty, expected = EWC(model, importance), importance
            addresses = [t.data_ptr() for term in penalty.terms() for t in term]
        else:
            penalty.consolidate(importance, decay=0.7)
            expected = {n: 0.7 * expected[n] + importance[n] for n in importance}
        for name in expected:
            torch.testing.assert_close(penalty.importance[name], expected[name], rtol=1e-14, atol=0)
            assert torch.equal(penalty.anchor[name], anchor[name])
        assert penalty.value().item() == 0.0
    assert [t.data_ptr() for term in penalty.terms() for t in term] == addresses
    assert penalty.constant == 0.0


def test_a_fitted_fisher_may_follow():
    model = small_model()
    batches = [(torch.randn(5, 3), torch.arange(5) % 2)]
    first = DiagonalFisher(model, "exact").fit(batches)
    penalty = EWC(model, first)
    assert penalty.estimator == "exact"
    penalty.consolidate(first, decay=0.5)
    for name, omega in penalty.importance.items():
        torch.testing.assert_close(omega, 1.5 * first.importance[name])


@pytest.mark.parametrize("method", ["consolidate", "add_task"])
def test_the_recorded_estimator_is_of_all_importances(method):
    model = small_model()
    batches = [(torch.randn(5, 3), torch.arange(5) % 2)]
    fishers = {e: DiagonalFisher(model, e).fit(batches) for e in ("exact", "empirical")}
    penalty = EWC(model, fishers["exact"])
    getattr(penalty, method)(fishers["exact"])
    assert penalty.estimator == "exact"
    getattr(penalty, method)(fishers["empirical"])
    assert penalty.estimator is None
    penalty.consolidate(fishers["empirical"], decay=0.0)  # nothing else is left
    assert penalty.estimator == "empirical"
    getattr(penalty, method)(fishers["empirical"].importance)
    assert penalty.estimator is None


@pytest.mark.parametrize("method", ["consolidate", "add_task"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda f: f | {"4.bias": torch.ones(1)}, "fisher names '4.bias', which is not a param"),
        (lambda f: f | {"2.bias": torch.ones(3)}, r"'2.bias' has shape \(3,\)"),
        (lambda f: f | {"2.bias": -torch.ones(2)}, "'2.bias' holds a negative value"),
        (lambda f: {}, "fisher is empty"),
    ],
)
def test_refuses_another_models_fisher_before_changing_anything(method, change, match):
    model = small_model()
    penalty = EWC(model, random_importance(model))
    before = copy.deepcopy(penalty.state_dict())
    move(model)
    with pytest.raises(ValueError, match=match):
        getattr(penalty, method)(change(random_importance(model, seed=5)))
    for part in ("anchor", "importance"):
        for name, tensor in before[part].items():
            assert torch.equal(getattr(penalty, part)[name], tensor)


@pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan, "1", True, None])
def test_refuses_wrong_decay(decay):
    model = small_model()
    with pytest.raises(ValueError, match=r"decay must be a number in \[0, 1\]"):
        EWC(model, random_importance(model)).consolidate(random_importance(model), decay=decay)


def test_layer_strengths_are_folded_into_the_importance():
    model = small_model(torch.float64)
    importance = random_importance(model)
    strengths = {"*.weight": 2.0, "0.*": 3.0, "0.bias": 5.0, "2.weight": 0.0}
    factors = {"0.weight": 2.0, "0.bias": 5.0, "2.weight": 0.0, "2.bias": 1.0}
    penalty = EWC(model, importance, layer_strengths=strengths)
    for name, factor in factors.items():
        assert torch.equal(penalty.importance[name], factor * importance[name])
    penalty.consolidate(importance)  # a further task has the same factors
    for name, factor in factors.items():
        assert torch.equal(penalty.importance[name], 2 * factor * importance[name])


def test_factors_multiply_in_float32_at_least():
    model = torch.nn.Linear(2, 1)
    importance = {"weight": torch.full((1, 2), 4e4, dtype=torch.float16)}
    penalty = EWC(model, importance, layer_strengths={"weight": 8.0})
    assert (penalty.importance["weight"] == 8 * importance["weight"].float()).all()
    with pytest.raises(
        ValueError, match=r"'weight', times its layer strength, holds .* not finite"
    ):
        EWC(model, importance, layer_strengths={"weight": 1e38})


@pytest.mark.parametrize(
    ("strengths", "error", "match"),
    [
        ([1.0], TypeError, "must be a mapping from name or pattern to number, got list"),
        ({"0.*": "1"}, TypeError, r"layer_strengths\['0\.\*'\] must be a number, got '1'"),
        ({"0.*": -1.0}, ValueError, "must be finite and >= 0, got -1.0"),
        ({"0.*": math.inf}, ValueError, "must be finite"),
        ({"head.*": 1.0}, ValueError, r"layer_strengths\['head\.\*'\] matches none of"),
    ],
)
def test_refuses_wrong_layer_strengths(strengths, error, match):
    model = small_model()
    with pytest.raises(error, match=match):
        EWC(model, random_importance(model), layer_strengths=strengths)


def test_a_grown_head_is_held_where_it_was_and_free_where_it_is_new():
    old = small_model(torch.float64)
    penalty = EWC(old, random_importance(old), 3.0, "proximal", layer_strengths={"2.*": 2.0})
    new = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    with torch.no_grad():
        new[0].load_state_dict(old[0].state_dict())
        new[2].weight[:2], new[2].bias[:2] = old[2].weight, old[2].bias
    grown = penalty.grown(new)
    assert (grown.strength, grown.mode) == (3.0, "proximal")
    assert grown.value().item() == 0.0
    with torch.no_grad():
        new[2].weight[2:] += 7.0
        new[2].bias[2:] += 7.0
    assert grown.value().item() == 0.0
    for model in (old, new):
        with torch.no_grad():
            model[0].bias += 0.5
            model[2].weight[1] += 0.25
            model[2].bias[:2] -= 0.25
    assert penalty.value().item() > 0
    assert grown.value().item() == pytest.approx(penalty.value().item(), rel=1e-14)
    # The layer factors come along.
    grown.consolidate({n: torch.ones_like(p) for n, p in new.named_parameters()}, decay=0.0)
    assert (grown.importance["2.bias"] == 2.0).all()
    assert (grown.importance["0.bias"] == 1.0).all()


def test_refuses_a_model_that_does_not_hold_the_old_one():
    model = small_model()
    penalty = EWC(model, random_importance(model))
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(4, 2\), which does not hold"):
        penalty.grown(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)))
    with pytest.raises(ValueError, match=r"this penalty names '2\.weight', which is not a param"):
        penalty.grown(nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(4, 3, 1\)"):
        penalty.grown(nn.Sequential(nn.Conv1d(3, 4, 1), nn.Tanh(), nn.Linear(4, 2)))


@pytest.mark.parametrize("storage", ["full", "bfloat16", "compact"])
@pytest.mark.parametrize("method", ["consolidate", "add_task"])
def test_a_sum_that_overflows_changes_nothing(storage, method):
    model = torch.nn.Linear(2, 1)
    penalty = EWC(
        model, {"weight": torch.ones(1, 2), "bias": torch.full((1,), 3e38)}, storage=storage
    )
    before = repr(penalty.state_dict())
    with torch.no_grad():
        model.weight.add_(1.0)
    more = {"weight": torch.ones(1, 2), "bias": torch.full((1,), 3e38)}
    with pytest.raises(ValueError, match="importances of 'bias' overflows"):
        getattr(penalty, method)(more)
    assert repr(penalty.state_dict()) == before
