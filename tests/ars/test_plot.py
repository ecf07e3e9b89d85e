"""Pictures: the history of a controller, and the importance by parameter."""

import math

import pytest
import torch

from ars import ARSAdamW, ARSOptimizer
from ars.plot import History, plot_history, plot_importance
from ars.regularizers import EWC, DiagonalFisher


def recorded(losses, **settings):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = ARSAdamW([weight], lr=0.01, **settings)
    history = History(optimizer)
    for loss in losses:
        weight.grad = torch.ones(3)
        optimizer.step(loss=loss)
    return optimizer, history


STEADY = [3.0 + 0.01 * math.sin(k) for k in range(60)]


def test_a_history_has_every_diagnostic_of_every_step():
    optimizer, history = recorded([3.0, 2.0, 1.0])
    values = history.values()
    assert values["surprise"] == [3.0, 2.0, 1.0]
    assert values.keys() == optimizer.diagnostics.keys()
    assert {len(column) for column in values.values()} == {3}
    history.stop()
    optimizer.step(loss=9.0)
    assert len(history.values()["surprise"]) == 3


def test_a_history_is_of_any_gated_optimizer_and_of_no_other():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = ARSOptimizer(torch.optim.SGD([weight], lr=0.1))
    history = History(optimizer)
    assert history.values() == {name: [] for name in optimizer.diagnostics}
    weight.grad = torch.ones(3)
    optimizer.step(loss=2.0)
    assert history.values()["surprise"] == [2.0]
    with pytest.raises(TypeError, match="got SGD"):
        History(optimizer.base)


def test_the_figure_shows_each_step_and_shades_where_the_gate_brakes():
    _, history = recorded([*STEADY, 3000.0, *STEADY[:5]])
    phi = history.values()["phi"]
    assert phi[:60] == [1.0] * 60
    assert phi[60] < 0.2
    panels = plot_history(history).axes
    surprise, gate = panels[:2]
    assert surprise.lines[0].get_ydata().tolist() == history.values()["surprise"]
    assert gate.lines[0].get_ydata().tolist() == phi
    spans = [
        patch.get_extents().transformed(panels[0].transData.inverted()) for patch in gate.patches
    ]
    assert len(spans) == 1
    assert (round(spans[0].x0, 3), round(spans[0].x1, 3)) == (60.5, 66.5)
    assert len(panels) == 2 + any(history.values()["rho"])  # no panel of a penalty


def test_a_penalty_has_a_panel():
    model = torch.nn.Linear(3, 1)
    penalty = EWC(model, {name: torch.ones_like(p) for name, p in model.named_parameters()})
    optimizer = ARSAdamW(model.parameters(), lr=0.1, penalty=penalty)
    history = History(optimizer)
    for _ in range(3):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step(loss=1.0)
    labels = [panel.get_ylabel() for panel in plot_history(history).axes]
    assert "penalty" in labels


def test_a_figure_without_a_step_is_refused():
    _, history = recorded([])
    with pytest.raises(ValueError, match="no step yet"):
        plot_history(history)


def test_importance_by_parameter():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    fisher = DiagonalFisher(model, "exact").fit([(torch.randn(8, 4), torch.zeros(8).long())])
    panel = plot_importance(fisher).axes[0]
    assert [label.get_text() for label in panel.get_yticklabels()] == list(fisher.importance)
    dots = [line.get_xdata()[0] for line in panel.lines if len(line.get_xdata()) == 1]
    means = [float(value.double().mean()) for value in fisher.importance.values()]
    assert dots == pytest.approx(means)
    bars = [line.get_xdata() for line in panel.lines if len(line.get_xdata()) == 2]
    for (low, high), value in zip(bars, fisher.importance.values(), strict=True):
        assert value[value > 0].min() <= low <= high <= value.max()


def test_the_most_important_are_shown_and_what_is_0_has_no_bar():
    importance = {"a": torch.ones(2), "b": torch.full((2,), 3.0), "c": torch.zeros(2)}
    panel = plot_importance(importance, top=2).axes[0]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["a", "b"]
    assert "2 of 3" in panel.get_xlabel()
    assert len(plot_importance(importance).axes[0].lines) == 4
    with pytest.raises(ValueError, match="at least one"):
        plot_importance({})
    with pytest.raises(ValueError, match="top >= 1"):
        plot_importance(importance, top=0)
