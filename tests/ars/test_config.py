"""EntropyGuard, SurpriseGate and ChronosJitter: by hand, in the controller, and switched off."""

import itertools
import math

import numpy as np
import pytest
import torch

from ars import ARSConfig, ARSController, ChronosJitter, EntropyGuard, SurpriseGate


def trajectory(signal, **settings):
    controller = ARSController(ARSConfig(**settings))
    return [controller.observe(float(s)) for s in signal], controller


NOISE = np.random.default_rng(0).gamma(2.0, 0.3, size=60)
RESONANT = 1.0 + 0.5 * np.cos(math.pi * np.arange(60)) + 0.01 * NOISE


def test_gate_with_resonance_by_hand():
    gate = SurpriseGate(alpha=1.5, phi_min=0.2, resonance=0.7)
    for surprise, psi in [(0.0, 1.0), (0.4, 1.0), (0.0, 0.5), (0.4, 0.01), (-3.0, 0.5)]:
        strained = (max(surprise, 0.0) + 0.7) / psi - 0.7
        expected = 0.2 + 0.8 * math.exp(-1.5 * strained)
        assert gate(surprise, psi) == pytest.approx(expected, rel=1e-12)
        pair = (torch.tensor(x, dtype=torch.float64) for x in (surprise, psi))
        assert float(gate(*pair)) == pytest.approx(expected, rel=1e-12)
    assert gate(0.4, 1.0) == SurpriseGate(alpha=1.5, phi_min=0.2)(0.4, 1.0)


def test_a_gate_without_release_has_no_memory():
    """Bit by bit, whatever Phi was: the proposal."""
    gate = SurpriseGate(phi_min=0.0)
    for previous in (0.0, 0.1, 1 / 3, 0.9999999, 1.0, *np.random.default_rng(1).random(200)):
        assert gate(0.0, 1.0, previous=previous) == 1.0
        assert gate(0.3, 0.9, previous=previous) == gate(0.3, 0.9)


def test_release_opens_the_gate_over_its_steps_and_closes_it_at_once():
    gate = SurpriseGate(phi_min=0.2, release=4)
    closed = gate(1e9, 1.0, previous=1.0)
    assert closed == pytest.approx(0.2)
    phi = closed
    for step in range(1, 9):
        phi = gate(0.0, 1.0, previous=phi)
        assert phi == pytest.approx(1 - 0.8 * 0.75**step)
    assert gate(1e9, 1.0, previous=phi) == closed
    tensors = (torch.tensor(x, dtype=torch.float64) for x in (0.0, 1.0, 0.2))
    assert float(gate(*tensors)) == pytest.approx(0.4)


def test_the_controller_remembers_its_gate():
    """After a spike the loss is as before, and the gate needs its release to open."""
    signal = 2 + 0.05 * np.random.default_rng(3).normal(size=60)
    signal[40] = 9.0
    at_once, _ = trajectory(signal, release=1)
    slow, controller = trajectory(signal, release=10)
    assert at_once[40].phi == slow[40].phi < 0.2
    assert at_once[41].phi == 1.0
    for step in range(41, 60):
        assert slow[step].phi == pytest.approx(1 - (1 - slow[40].phi) * 0.9 ** (step - 40))
    assert float(controller.gate_state[0]) == slow[-1].phi


def relapse(*rises):
    """A plateau, a jump that falls back, and rises of one unit for six steps."""
    signal = 2 + 0.05 * np.random.default_rng(3).normal(size=120)
    signal[40:] += 3 * np.exp(-np.arange(80) / 10)
    for start in rises:
        signal[start : start + 6] += 1.0
    return signal


def test_a_first_alarm_releases_soon_and_one_while_the_gate_opens_late():
    first, one = trajectory(relapse())
    again, two = trajectory(relapse(56))
    assert first[40].phi < 0.11
    for step in range(41, 60):  # over 20 steps
        assert first[step].phi == pytest.approx(1 - (1 - first[40].phi) * 0.95 ** (step - 40))
    assert one.gate_state[:3].tolist() == [first[-1].phi, 0.0, 0.0]
    assert first[-1].phi > 0.98
    shut = next(t for t in range(56, 60) if again[t].phi < again[t - 1].phi)
    assert again[:56] == first[:56]
    assert again[shut].phi == 0.1
    for step in range(shut + 1, shut + 20):  # over 400
        assert again[step].phi == pytest.approx(1 - 0.9 * (399 / 400) ** (step - shut))
    assert two.gate_state[1] == 1.0
    assert two.gate_state[2] > 0


def test_a_rise_once_the_gate_is_open_is_no_second_alarm():
    plain, _ = trajectory(relapse())
    late, controller = trajectory(relapse(90))
    assert plain[89].phi > 0.9
    assert [s.phi for s in late] == [s.phi for s in plain]
    assert controller.gate_state[2] == 0.0


def test_a_surprise_after_the_gate_has_opened_is_a_first_alarm_again():
    signal = np.concatenate((relapse(56), np.full(900, 2.0), [5.0], np.full(9, 2.0)))
    signal[120:] += 0.05 * np.random.default_rng(5).normal(size=910)
    signals, _ = trajectory(signal)
    assert signals[130].phi < 0.3 < 0.9 < signals[1019].phi
    assert signals[1020].phi < 0.11
    assert signals[1029].phi == pytest.approx(1 - (1 - signals[1020].phi) * 0.95**9)


def test_resonance_releases_late_at_once():
    signals, controller = trajectory(np.concatenate((RESONANT, 1 + NOISE, 1 + NOISE)))
    lowest = min(range(180), key=lambda t: signals[t].phi)
    assert signals[lowest].phi < 0.2
    assert signals[-1].psi == 1.0
    assert signals[-1].phi < 0.5
    assert controller.gate_state[1] == 1.0


@pytest.mark.parametrize("settings", [{"first_release": 400}, {"standardize": False, "alpha": 9}])
def test_without_a_first_release_the_gate_has_one_release(settings):
    signals, controller = trajectory(relapse(56), resonance=0.0, **settings)
    assert min(s.phi for s in signals) < 0.2
    assert controller.gate_state.tolist() == [signals[-1].phi, 0.0, 0.0, 0.0, 0.0]
    assert all(
        now.phi <= before.phi + (1 - before.phi) / 400 + 1e-15
        for before, now in itertools.pairwise(signals)
    )


def test_a_non_finite_surprise_is_remembered_by_the_gate_too():
    _, controller = trajectory(NOISE[:20], release=4)
    controller.observe(math.nan)
    assert float(controller.gate_state[0]) == 0.1
    assert controller.observe(float(NOISE[20])).phi <= 0.1 + 0.9 / 4 + 1e-12


def test_the_default_brakes_on_resonance_where_nothing_surprises():
    """An oscillation of falling amplitude never exceeds its trend's error."""
    shrinking = 5 - np.arange(60) / 20 + 0.5 * np.exp(-np.arange(60) / 40) * (-1) ** np.arange(60)
    plain, _ = trajectory(shrinking, resonance=0.0)
    braked, _ = trajectory(shrinking)
    assert all(s.phi == 1.0 for s in plain)
    assert braked[-1].psi < 0.85
    assert braked[-1].phi == pytest.approx(0.1 + 0.9 * math.exp(30 - 30 / braked[-1].psi))
    assert braked[-1].phi < 0.12


@pytest.mark.parametrize("sign", [-1, 1])
def test_only_alternation_is_resonance_to_the_default(sign):
    """Curvature that a line leaves makes rho positive, in every descent."""
    noise = np.random.default_rng(2).normal(size=120)
    signal = noise.copy()
    for t in range(1, 120):
        signal[t] += 0.95 * sign * signal[t - 1]
    signals, _ = trajectory(signal, alternating=True)
    both, _ = trajectory(signal, alternating=False)
    strongest = max(signals, key=lambda s: abs(s.rho))
    assert abs(strongest.rho) > 0.2
    assert math.copysign(1, strongest.rho) == sign
    assert [s.rho for s in signals] == [s.rho for s in both]
    assert min(s.phi for s in both) < 0.5
    assert min(s.psi for s in both) < 0.95
    if sign > 0:
        assert all((s.psi, s.phi, s.chi) == (1.0, 1.0, 0.0) for s in signals)
    else:
        assert signals == both


def test_noise_hardly_brakes_the_default():
    """Four standard errors of rho: false alarms cost less than a per mille of the rate."""
    signals, _ = trajectory(np.random.default_rng(4).normal(size=5000))
    assert np.mean([s.phi for s in signals]) > 0.999


def test_the_controller_is_its_parts():
    settings = {"jitter": 0.3, "seed": 5, "resonance": 0.2, "release": 3}
    signals, controller = trajectory(RESONANT, significance=3.0, **settings)
    assert controller.entropy_guard == EntropyGuard(eps=1e-6, alternating=True)
    assert controller.surprise_gate == SurpriseGate(resonance=0.2, release=3)
    assert controller.chronos_jitter == ChronosJitter(jitter=0.3, seed=5)
    assert any(s.chi != 0 for s in signals)
    for step, (before, now) in enumerate(itertools.pairwise(signals), start=1):
        assert now.psi == controller.entropy_guard(now.rho)
        assert now.chi == controller.chronos_jitter(now.psi, step)
        if now.psi == 1.0:
            assert now.phi <= controller.surprise_gate(0.0, now.psi, before.phi)


@pytest.mark.parametrize(
    ("off", "name", "value"),
    [({"eps": 1.0}, "psi", 1.0), ({"phi_min": 1.0}, "phi", 1.0), ({"jitter": 0.0}, "chi", 0.0)],
)
def test_each_part_can_be_switched_off_alone(off, name, value):
    """The other two go on as they would, given what it says."""
    whole, _ = trajectory(RESONANT, resonance=0.5, significance=0.5)
    without, _ = trajectory(RESONANT, resonance=0.5, significance=0.5, **off)
    assert any(getattr(s, name) != value for s in whole)
    assert all(getattr(s, name) == value for s in without)
    assert [s.rho for s in whole] == [s.rho for s in without]
    if name != "psi":
        others = {"phi", "chi"} - {name}
        for other in others:
            assert [getattr(s, other) for s in whole] == [getattr(s, other) for s in without]
    else:
        assert all(s.chi == 0.0 for s in without)
        standardized, _ = trajectory(RESONANT, significance=1e9)  # which says Psi = 1 as well
        assert [s.phi for s in without] == [s.phi for s in standardized]


@pytest.mark.parametrize(
    ("part", "settings", "error"),
    [
        (EntropyGuard, {"eps": 0.0}, ValueError),
        (SurpriseGate, {"phi_min": -0.1}, ValueError),
        (SurpriseGate, {"release": 0}, ValueError),
        (SurpriseGate, {"alpha": "1"}, TypeError),
        (ChronosJitter, {"jitter": 1.0}, ValueError),
        (ChronosJitter, {"seed": 0.5}, TypeError),
    ],
)
def test_parts_refuse_by_their_own_name(part, settings, error):
    with pytest.raises(error, match=f"{part.__name__}: {next(iter(settings))} must"):
        part(**settings)
