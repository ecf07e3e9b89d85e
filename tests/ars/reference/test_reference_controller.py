"""The controller's definition against numpy, closed forms and hand-made signals."""

import itertools
import math

import numpy as np
import pytest
import torch

from ars import ARSConfig, ARSController, reference
from ars.reference import controller as definition
from ars.reference import scalars


def run(signal, **settings):
    controller = ARSController(ARSConfig(**settings))
    return [controller.observe(torch.tensor(float(s))) for s in signal], controller


def paper(**overrides):
    plain = {"standardize": False, "detrend": False, "threshold": 0.0, "significance": 0.0}
    plain |= {"alternating": False, "resonance": 0.0, "release": 1, "first_release": 1}
    return plain | overrides


def test_paper_equals_the_formula_at_every_step():
    """Psi, Phi and chi recomputed with numpy from the proposal's four equations."""
    signal = np.random.default_rng(0).gamma(2.0, 0.3, size=60)
    window, alpha, phi_min, eps, jitter, seed = 20, 1.7, 0.2, 1e-6, 0.3, 5
    settings = {"window": window, "alpha": alpha, "phi_min": phi_min, "eps": eps}
    steps, _ = run(signal, **paper(**settings, jitter=jitter, seed=seed))
    for t, signals in enumerate(steps):
        history = signal[max(0, t + 1 - window) : t + 1]
        rho = np.corrcoef(history[:-1], history[1:])[0, 1] if len(history) > 2 else 0.0
        psi = max(eps, 1 - rho**2)
        phi = phi_min + (1 - phi_min) * math.exp(-alpha * signal[t] / psi)
        chi = jitter * (2 * reference.philox_uniform(seed, t) - 1) * (1 - psi)
        assert float(signals.surprise) == pytest.approx(signal[t], rel=1e-6)
        assert float(signals.rho) == pytest.approx(rho, abs=1e-6)
        assert float(signals.psi) == pytest.approx(psi, abs=1e-6)
        assert float(signals.phi) == pytest.approx(phi, abs=1e-6)
        assert float(signals.chi) == pytest.approx(chi, abs=1e-6)


def test_paper_config_is_the_proposal():
    config = ARSConfig.paper()
    assert (config.window, config.alpha, config.phi_min) == (100, 1.0, 0.1)
    assert (config.eps, config.jitter) == (1e-6, 0.1)
    assert not config.standardize
    assert not config.detrend
    assert config.threshold == config.significance == config.resonance == 0.0
    assert (config.gate, config.surprise, config.release) == (("betas",), "auto", 1)
    assert not config.alternating
    assert config.first_release == 1


@pytest.mark.parametrize("detrend", [False, True])
@pytest.mark.parametrize("level", [0.0, 1.0, 0.1, -3e7, 1e-30])
def test_constant_signal_has_no_autocorrelation(level, detrend):
    """It varies by rounding at most, and rounding is not resonance."""
    steps, _ = run([level] * 30, **paper(window=10, detrend=detrend))
    assert all(float(s.rho) == 0.0 and float(s.psi) == 1.0 for s in steps)


def test_undefined_before_two_pairs():
    steps, _ = run([1.0, 2.0, 4.0], **paper())
    assert [float(s.rho) for s in steps[:2]] == [0.0, 0.0]
    assert float(steps[2].rho) == pytest.approx(1.0)


def test_alternation_is_resonance():
    steps, _ = run([1.0, -1.0] * 40, **paper(window=20))
    assert float(steps[-1].rho) == pytest.approx(-1.0)
    assert float(steps[-1].psi) == pytest.approx(1e-6)


def test_window_forgets():
    """After W further values nothing of the old signal is left."""
    noise = np.random.default_rng(1).normal(size=25)
    old, _ = run([1.0, -1.0] * 30 + list(noise), **paper(window=25))
    new, _ = run(noise, **paper(window=25))
    assert float(old[-1].rho) == pytest.approx(float(new[-1].rho), abs=1e-12)


def test_trend_equals_polyfit_and_its_prediction_interval():
    values = np.random.default_rng(2).normal(size=17).cumsum()
    ages = np.arange(17)
    slope, intercept = np.polyfit(ages, values, 1)
    window = torch.cat([torch.from_numpy(values), torch.zeros(5, dtype=torch.float64)])
    residuals, predicted, error = definition.trend(window, torch.tensor(17), linear=True)
    expected = values - (slope * ages + intercept)
    np.testing.assert_allclose(residuals[:17], expected, atol=1e-12)
    assert torch.count_nonzero(residuals[17:]) == 0
    assert float(predicted) == pytest.approx(slope * 17 + intercept, rel=1e-12)
    design = np.stack([np.ones(17), ages], axis=1)
    new = np.array([1.0, 17.0])
    leverage = 1 + new @ np.linalg.inv(design.T @ design) @ new
    assert float(error) == pytest.approx(math.sqrt(expected @ expected / 15 * leverage), rel=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 16])
def test_masked_form_equals_the_exact_one(n, monkeypatch):
    """Devices other than the CPU keep the count on the device, and mask what does not count."""
    values = torch.randn(16, dtype=torch.float64)
    exact, masked = values[:n], torch.where(torch.arange(16) < n, values, 0.0)
    scale = float(values.abs().max())
    rho = definition.autocorrelation(exact, n, scale)
    trends = [definition.trend(exact, n, linear=linear) for linear in (False, True)]
    monkeypatch.setattr(scalars, "is_host", lambda tensor: False)
    padded_rho = definition.autocorrelation(masked, torch.tensor(n), scale)
    assert float(padded_rho) == pytest.approx(rho, rel=1e-12)
    for linear, (residuals, *rest) in enumerate(trends):
        padded, *others = definition.trend(masked, torch.tensor(n), linear=bool(linear))
        torch.testing.assert_close(padded[:n], residuals)
        assert torch.count_nonzero(padded[n:]) == 0
        for a, b in zip(others, rest, strict=True):
            assert float(a) == pytest.approx(b, rel=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        paper(),
        {"resonance": 2.0, "release": 5, "significance": 0.5},
        {"threshold": 1.0, "release": 50, "first_release": 3},
    ],
    ids=["default", "paper", "resonance", "back-off"],
)
def test_a_device_that_must_not_be_waited_for_gets_the_same_signals(settings, monkeypatch):
    """There every scalar stays a tensor; made so on a CPU, nothing may change."""
    signal = np.random.default_rng(3).gamma(2.0, 0.3, size=40)
    signal[20], signal[30] = math.nan, 9.0
    numbers, _ = run(signal, window=12, **settings)
    for module in (definition, scalars):
        monkeypatch.setattr(module, "is_host", lambda tensor: False)
    tensors, _ = run(signal, window=12, **settings)
    assert min(s.phi for s in numbers) < 0.5
    for ours, theirs in zip(tensors, numbers, strict=True):
        assert all(isinstance(value, torch.Tensor) for value in ours)
        assert list(map(float, ours)) == pytest.approx(list(theirs), rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("level", [1e155, 1e160, 1e170])
def test_squares_that_overflow_are_no_resonance(level):
    """On a CPU, where a power of a number raises, and on a device alike."""
    values = level * (1 + torch.arange(6, dtype=torch.float64) % 2)
    assert definition.autocorrelation(values, 6, float(values.amax())) == 0.0
    assert float(definition.autocorrelation(values, torch.tensor(6), values.amax())) == 0.0
    controller = ARSController(ARSConfig.paper(window=6))
    assert all(controller.observe(float(value)).phi == 0.1 for value in values)


def test_trend_without_slope_is_the_mean():
    values = torch.tensor([1.0, 3.0, 8.0], dtype=torch.float64)
    residuals, predicted, error = definition.trend(values, torch.tensor(3), linear=False)
    assert residuals.tolist() == pytest.approx([-3.0, -1.0, 4.0])
    assert float(predicted) == pytest.approx(4.0)
    assert float(error) == pytest.approx(math.sqrt(26 / 2 * (1 + 1 / 3)))


def test_standardized_surprise_by_hand():
    def surprise(value, valid=50, threshold=3.0):
        args = (torch.tensor(x, dtype=torch.float64) for x in (value, 2.0, 0.5))
        return float(definition.standardized_surprise(*args, torch.tensor(valid), threshold))

    assert surprise(2.0 + 5 * (0.5 + 2e-6)) == pytest.approx(2.0)  # the error has a floor
    assert surprise(2.0 + 2.9 * 0.5) == 0.0
    assert surprise(-100.0) == 0.0  # better than expected is no surprise
    assert surprise(100.0, valid=9) == 0.0  # too few values to expect anything
    assert surprise(100.0, valid=10) > 0.0


def test_shrink_by_hand():
    rho = torch.tensor(-0.5, dtype=torch.float64)
    assert float(definition.shrink(rho, torch.tensor(100), 3.0)) == pytest.approx(-0.2)
    assert float(definition.shrink(rho, torch.tensor(16), 3.0)) == 0.0
    assert float(definition.shrink(rho, torch.tensor(16), 0.0)) == -0.5


def descent(kind):
    noise = np.random.default_rng(3).normal(size=500)
    t = np.arange(500)
    return {
        "exponential": 1.2 + 4.3 * np.exp(-t / 50) + 0.05 * noise,
        "power": 1 + 4.5 / np.sqrt(1 + t / 10) + 0.05 * noise,
        "plateau": 2 + 0.05 * noise,
        "smooth": 1.2 + 4.3 * np.exp(-t / 50),
    }[kind]


@pytest.mark.parametrize("kind", ["exponential", "power", "plateau", "smooth"])
def test_default_stays_open_in_healthy_descent(kind):
    steps, _ = run(descent(kind))
    assert np.mean([float(s.phi) for s in steps]) > 0.98


def test_paper_brakes_for_ever_on_a_healthy_loss():
    """What the default is there to avoid: a plain loss keeps the proposal's gate nearly shut."""
    steps, _ = run(descent("exponential"), **paper())
    assert np.mean([float(s.phi) for s in steps]) < 0.35


def test_default_brakes_on_an_abrupt_shift():
    signal = descent("exponential")
    signal[300:] += 2.0
    steps, _ = run(signal)
    assert float(steps[299].phi) == pytest.approx(1.0)
    assert float(steps[300].phi) < 0.2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("settings", [{}, paper()], ids=["default", "paper"])
def test_non_finite_surprise_closes_the_gate_and_is_not_remembered(bad, settings):
    signal = descent("plateau")[:40]
    _, controller = run(signal, **settings)
    window, written = controller.window.clone(), int(controller.counts[0])
    signals = controller.observe(torch.tensor(bad))
    assert float(signals.phi) == controller.config.phi_min
    assert torch.equal(controller.window, window)
    assert int(controller.counts[0]) == written
    assert int(controller.counts[1]) == 41  # the step still draws its own jitter
    assert math.isfinite(float(signals.rho))
    assert str(float(signals.surprise)) == str(bad)  # and it is reported, not hidden


def test_phi_and_chi_stay_in_their_ranges():
    rng = np.random.default_rng(4)
    for scale, config in itertools.product((1e-8, 1.0, 1e8), ({}, paper())):
        steps, _ = run(scale * rng.standard_cauchy(120), **config)
        assert all(0.1 <= float(s.phi) <= 1.0 for s in steps)
        assert all(abs(float(s.chi)) <= 0.1 and 1e-6 <= float(s.psi) <= 1 for s in steps)


def test_observe_leaves_no_autograd_graph():
    controller = ARSController(ARSConfig())
    loss = torch.ones((), requires_grad=True) * 2
    assert not any(isinstance(signal, torch.Tensor) for signal in controller.observe(loss))
    assert not controller.window.requires_grad


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"window": 2}, ValueError), ({"window": 10.0}, TypeError), ({"alpha": -1.0}, ValueError),
        ({"alpha": math.inf}, ValueError), ({"phi_min": 1.1}, ValueError),
        ({"eps": 0.0}, ValueError), ({"jitter": 1.0}, ValueError), ({"jitter": "a"}, TypeError),
        ({"threshold": -1.0}, ValueError), ({"significance": math.nan}, ValueError),
        ({"resonance": -0.1}, ValueError), ({"release": 0.5}, ValueError),
        ({"release": math.inf}, ValueError), ({"first_release": 0.5}, ValueError),
        ({"alternating": 1}, TypeError), ({"gate": "lr"}, TypeError),
        ({"gate": ("lr", "lr")}, ValueError), ({"gate": ("momentum",)}, ValueError),
        ({"surprise": "accuracy"}, ValueError), ({"surprise": 3}, TypeError),
        ({"seed": -1}, ValueError), ({"seed": True}, TypeError), ({"detrend": 1}, TypeError),
    ],
)  # fmt: skip
def test_config_refuses(settings, error):
    with pytest.raises(error, match=f"ARSConfig: {next(iter(settings))} must"):
        ARSConfig(**settings)


def test_controller_state_round_trip_and_refusal():
    _, controller = run(descent("plateau")[:30], window=20)
    other = ARSController(ARSConfig(window=20))
    other.load_state_dict({k: v.clone() for k, v in controller.state_dict().items()})
    a, b = (c.observe(torch.tensor(2.5)) for c in (controller, other))
    assert [float(x) for x in a] == [float(x) for x in b]
    with pytest.raises(ValueError, match=r"window.*shape \(20,\).*\(30,\)"):
        ARSController(ARSConfig(window=30)).load_state_dict(controller.state_dict())
    with pytest.raises(ValueError, match="lacks 'counts'"):
        other.load_state_dict({"window": other.window})
    assert float(other.gate_state[0]) < 1
    old = {name: t for name, t in controller.state_dict().items() if name != "gate_state"}
    other.load_state_dict(old | {"last_phi": torch.tensor(0.3, dtype=torch.float64)})
    assert other.gate_state.tolist() == [0.3, 1.0, 0.0, 0.0, 0.0]
    other.load_state_dict(old)  # as saved by version 0.1.0
    assert other.gate_state.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_a_controller_goes_on_bit_by_bit_from_any_step_of_a_relapse():
    signal = 2 + 0.05 * np.random.default_rng(3).normal(size=120)
    signal[40:] += 3 * np.exp(-np.arange(80) / 10)
    signal[56:62] += 1.0
    whole, _ = run(signal)
    for stop in (39, 40, 41, 50, 57, 58, 59, 90):
        _, first = run(signal[:stop])
        second = ARSController(ARSConfig())
        second.load_state_dict({name: t.clone() for name, t in first.state_dict().items()})
        assert [second.observe(torch.tensor(float(s))) for s in signal[stop:]] == whole[stop:]
