"""LossBudget: the rule against formulas in floats, where it lands, and what it refuses."""

import copy
import math

import pytest
import torch
from ewc_models import random_importance, small_model

from ars import ARSAdamW
from ars.regularizers import (
    EWC,
    DiagonalFisher,
    KroneckerPenalty,
    LossBudget,
    ProgressiveInheritance,
    SubspacePenalty,
)


class Losses:
    """Returns given losses one after the other, and counts."""

    def __init__(self, *values):
        self.values, self.calls = list(values), 0

    def __call__(self):
        assert not torch.is_grad_enabled()
        self.calls += 1
        return torch.tensor(self.values[min(self.calls, len(self.values)) - 1])


def ewc(strength=3.0):
    model = small_model()
    return EWC(model, random_importance(model), strength)


@pytest.mark.parametrize("gain", [0.1, 1.0])
def test_the_strength_follows_the_logarithm_of_rise_over_budget(gain):
    penalty = ewc()
    rises = [0.0, 0.05, 0.1, 0.12, 0.2, 5.0, -1.0, math.nan, math.inf]
    losses = Losses(*(2.0 + rise for rise in rises))
    budget = LossBudget(penalty, losses, 0.1, every=1, gain=gain)
    factor = 1.0
    budget.step()  # the first step is from where it was measured
    assert penalty.strength.item() == 3.0
    for rise in rises[1:]:
        budget.step()
        ratio = math.inf if math.isnan(rise) else rise / 0.1
        change = -1.0 if ratio <= 0 else max(-1.0, min(math.log(4), math.log(ratio)))
        factor *= math.exp(gain * change)
        expected = 3.0 * factor * min(4.0, max(0.25, ratio)) ** 2
        assert penalty.strength.item() == pytest.approx(expected, rel=1e-4), rise
    assert penalty.strength.data_ptr() == budget._strengths[0].data_ptr()


def test_it_measures_every_so_many_steps_and_stays_inside_its_bounds():
    losses = Losses(1.0, 1.2)
    penalty = ewc(2.0)
    budget = LossBudget(penalty, losses, 0.1, every=3, gain=1.0, bounds=(0.5, 7.0))
    seen = []
    for _ in range(13):
        budget.step()
        seen.append(round(penalty.strength.item(), 3))
    grown = [2.0 * 2.0**k * 4 for k in (1, 2)]  # the ratio is 2, its square 4
    assert seen == [2.0] * 3 + grown[:1] * 3 + grown[1:] * 3 + [2.0 * 7 * 4] * 4
    assert losses.calls == 1 + 4
    low = LossBudget(ewc(2.0), Losses(1.0, 0.5), 0.1, every=1, gain=1.0, bounds=(0.5, 10.0))
    for _ in range(4):
        low.step()
    assert low.penalty.strength.item() == 2.0 * 0.5 / 16


def test_both_strengths_of_a_pair_keep_their_ratio():
    model = small_model()
    basis = torch.linalg.qr(torch.randn(4, 2)).Q
    pair = ProgressiveInheritance(
        EWC(model, random_importance(model), 3.0), SubspacePenalty(model, {"2.weight": basis}, 12.0)
    )
    budget = LossBudget(pair, Losses(1.0, 1.2), 0.1, every=1, gain=1.0)
    for _ in range(2):
        budget.step()
    assert pair.ewc.strength.item() == pytest.approx(3.0 * 2 * 4, rel=1e-5)
    assert pair.subspace.strength.item() == pytest.approx(12.0 * 2 * 4, rel=1e-5)


def _two_tasks():
    """Regressions of one linear model whose minima lie apart, on correlated inputs."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(6, 6, generator=generator)
    inputs = torch.randn(256, 6, generator=generator) @ mixing
    old, new = torch.randn(2, 6, 3, generator=generator)
    return inputs, (inputs @ old).argmax(1), (inputs @ new).argmax(1)


@pytest.mark.parametrize("kind", ["ewc", "proximal", "kronecker"])
@pytest.mark.parametrize("budget", [0.05, 0.2])
def test_it_lands_on_what_was_asked(kind, budget):
    torch.manual_seed(0)
    inputs, old, new = _two_tasks()
    model = torch.nn.Linear(6, 3)
    cross_entropy = torch.nn.functional.cross_entropy

    def train(labels, steps, penalty=None, chosen=None):
        opt = ARSAdamW(model.parameters(), lr=0.02, weight_decay=0.0, ars=None, penalty=penalty)
        for step in range(steps):
            opt.param_groups[0]["lr"] = 0.02 * min(1.0, 2 * (1 - step / steps))
            opt.zero_grad()
            cross_entropy(model(inputs), labels).backward()
            if chosen is not None:
                chosen.step()
            opt.step()

    train(old, 400)
    before = cross_entropy(model(inputs), old).item()
    unprotected = copy.deepcopy(model)
    fisher = DiagonalFisher(model, "exact").fit([(inputs, old)])
    if kind == "kronecker":
        weight = torch.cat((inputs, torch.ones(256, 1)), 1)
        factors = {"weight": (weight.T @ weight / 256, torch.eye(3) / 3)}
        penalty = KroneckerPenalty(model, factors, 1.0)
    else:
        penalty = EWC(model, fisher, 1.0, "proximal" if kind == "proximal" else "coupled")
    chosen = LossBudget(penalty, lambda: cross_entropy(model(inputs), old), budget, every=5)
    train(new, 700, penalty, chosen)
    rise = cross_entropy(model(inputs), old).item() - before
    assert rise == pytest.approx(budget, rel=0.2)
    assert chosen.rise.item() == pytest.approx(rise, abs=0.02)
    model.load_state_dict(unprotected.state_dict())
    train(new, 700)
    assert cross_entropy(model(inputs), old).item() - before > 10 * budget


def test_a_state_goes_on_alike():
    losses = [1.0, 1.3, 1.05, 1.2, 1.4, 1.1]
    straight = LossBudget(ewc(), Losses(*losses), 0.1, every=1)
    for _ in range(6):
        straight.step()
    first = LossBudget(ewc(), Losses(*losses), 0.1, every=1)
    for _ in range(3):
        first.step()
    state = copy.deepcopy(first.state_dict())
    # The model has moved: what is measured anew at the start is not the old start.
    second = LossBudget(ewc(), Losses(7.0, *losses[3:]), 0.1, every=1)
    address = second.penalty.strength.data_ptr()
    second.load_state_dict(state)
    assert second.penalty.strength.data_ptr() == address
    assert second.penalty.strength.item() == pytest.approx(first.penalty.strength.item())
    for _ in range(3):
        second.step()
    assert second.penalty.strength.item() == pytest.approx(straight.penalty.strength.item())
    for name, value, error in (
        ("steps", -1, "steps must be an integer >= 0"),
        ("start", math.inf, "start must be finite"),
        ("factor", 1e9, "outside bounds"),
        ("factor", -1.0, "factor"),
    ):
        with pytest.raises(ValueError, match=error):
            second.load_state_dict({**state, name: value})
    with pytest.raises(TypeError, match="start must be a number"):
        second.load_state_dict({**state, "start": "1"})
    with pytest.raises(ValueError, match="keys"):
        second.load_state_dict({"steps": 1})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"penalty": EWC}, TypeError, "that is the class, so build one"),
        ({"penalty": [1]}, TypeError, "list has no strength"),
        ({"measure": 1.0}, TypeError, "measure must be callable, got float"),
        ({"measure": lambda: 1.0}, TypeError, "0-d floating-point tensor, got float"),
        ({"measure": lambda: torch.ones(2)}, TypeError, r"got \(2,\)"),
        ({"measure": lambda: torch.tensor(math.nan)}, ValueError, "old loss must be finite"),
        ({"budget": 0.0}, ValueError, "budget must be finite and > 0"),
        ({"budget": "0.1"}, TypeError, "budget must be a number"),
        ({"gain": math.inf}, ValueError, "gain must be finite and > 0"),
        ({"every": 0}, ValueError, "every must be an integer >= 1"),
        ({"every": True}, ValueError, "every must be an integer >= 1"),
        ({"bounds": (2.0, 3.0)}, ValueError, "0 < low <= 1 <= high"),
        ({"bounds": (0.1, 1e38)}, ValueError, "lower them"),
        ({"penalty": 0.0}, ValueError, "strength is 0, which no factor changes"),
    ],
)
def test_bad_input_changes_nothing(changes, error, message):
    penalty = ewc(0.0 if changes.get("penalty") == 0.0 else 3.0)
    given = {"penalty": penalty, "measure": Losses(1.0), "budget": 0.1}
    given |= {name: value for name, value in changes.items() if (name, value) != ("penalty", 0.0)}
    options = {name: given[name] for name in given.keys() - {"penalty", "measure", "budget"}}
    with pytest.raises(error, match=message):
        LossBudget(given["penalty"], given["measure"], given["budget"], **options)
    assert isinstance(penalty.strength, float)
