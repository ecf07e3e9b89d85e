"""The controller in the control kernel against the reference, over trajectories of surprises."""

import math

import pytest
import torch
from controller_cases import CONTROLLERS, observe
from fused_oracle import SIGNAL_TOLERANCE, assert_diagnostics
from fused_problem import Problem, make_problem

from ars.csrc_triton import controller as kernel
from ars.csrc_triton.layout import Diagnostic
from ars.csrc_triton.step import FusedAdam
from ars.reference import controller as definition
from ars.reference import philox_uniform

SIGNALS = (Diagnostic.RHO, Diagnostic.PSI, Diagnostic.PHI, Diagnostic.CHI)


def make(device: str, name: str, window: int = 20) -> tuple[Problem, FusedAdam]:
    problem = make_problem(device, shapes=[(1,)], controller=name, window=window, history=0)
    return problem, problem.fused()


def take(fused: FusedAdam, surprise: float, device: str) -> list[float]:
    """Let the kernel observe one surprise; return rho, psi, phi and chi."""
    loss = torch.tensor(surprise, dtype=torch.float64, device=device)
    fused.step([torch.ones(1, device=device)], loss=loss, clip=False)
    return fused.diagnostics[list(SIGNALS)].tolist()


def surprises(count: int) -> list[float]:
    """A falling, noisy loss; then resonance, spikes, losses that are no numbers, and a plateau."""
    t = torch.arange(count, dtype=torch.float64)
    values = 2 * torch.exp(-t / 40) + 0.05 * torch.randn(count, dtype=torch.float64)
    values += torch.where((t > 50) & (t < 90), 0.5 * torch.cos(math.pi * t), 0.0)
    values[30] = values[95] = 5.0
    values[[35, 97, 98]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)
    values[110:140] = 0.7
    return values.tolist()


@pytest.mark.parametrize("name", ["paper", "conditioned", "resonant", "default"])
def test_trajectory_equals_the_reference(name: str, device: str) -> None:
    problem, fused = make(device, name)
    controller = problem.clone().controller
    assert controller is not None
    assert problem.controller is not None
    seen = set()
    for surprise in surprises(160):
        signals = observe(controller, torch.tensor(surprise, dtype=torch.float64, device=device))
        found = take(fused, surprise, device)
        expected = [float(signal) for signal in signals[1:]]
        assert found == pytest.approx(expected, rel=SIGNAL_TOLERANCE, abs=1e-12)
        assert torch.equal(problem.controller.window, controller.window)
        assert torch.equal(problem.controller.counts, controller.counts)
        assert float(problem.controller.gate_state[0]) == found[2]
        seen |= {(expected[0] > 0.1) - (expected[0] < -0.1), expected[2] < 0.9}
    # The trajectory has positive, no and negative correlation, and the gate opens and closes.
    assert seen >= {-1, 0, 1}
    assert int(controller.counts[0]) == 157
    assert int(controller.counts[1]) == 160


@pytest.mark.parametrize("window", [1, 2, 3, 4, 33])
@pytest.mark.parametrize("name", CONTROLLERS)
def test_windows_of_any_length_wrap_around(name: str, window: int, device: str) -> None:
    problem, fused = make(device, name, window)
    controller = problem.clone().controller
    assert controller is not None
    for surprise in torch.randn(8 if window < 9 else 40).tolist():
        signals = observe(controller, torch.tensor(surprise, dtype=torch.float64, device=device))
        expected = [float(signal) for signal in signals[1:]]
        assert take(fused, surprise, device) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", [0, 2**64 - 1, -7, 0x0123456789ABCDEF])
@pytest.mark.parametrize("start", [0, 2**31 + 7, 2**32 - 4, 2**40 + 12345])
def test_jitter_is_the_references_bit_by_bit(seed: int, start: int, device: str) -> None:
    problem = make_problem(device, shapes=[(1,)], controller="paper", window=4, history=0)
    assert problem.controller is not None
    problem.controller = problem.controller._replace(seed=seed)
    problem.controller.counts[1] = start
    fused = problem.fused()
    psi = float(problem.controller.config[2])  # an alternating surprise is full resonance
    for count in range(5):
        rho, found_psi, _, chi = take(fused, count % 2, device)
        if count >= 3:
            assert (rho, found_psi) == (pytest.approx(-1, abs=1e-12), psi)
            uniform = philox_uniform(seed, (start + count) & 0xFFFFFFFF)
            assert chi == 0.1 * (2 * uniform - 1) * (1 - psi)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["paper", "conditioned"])
def test_a_surprise_that_is_no_number_closes_the_gate_and_is_forgotten(
    loss: float, name: str, device: str
) -> None:
    problem, fused = make(device, name)
    assert problem.controller is not None
    for surprise in (0.1, 0.3, 0.2):
        take(fused, surprise, device)
    window = problem.controller.window.clone()
    _, _, phi, _ = take(fused, loss, device)
    assert phi == float(problem.controller.gate_state[0]) == CONTROLLERS[name]["phi_min"]
    assert torch.equal(problem.controller.window, window)
    assert problem.controller.counts.tolist() == [3, 4]
    assert not problem.params[0].isnan().any()


@pytest.mark.parametrize(("count", "is_open"), [(9, True), (10, False), (11, False)])
def test_a_spike_closes_the_gate_once_there_is_history(
    count: int, is_open: bool, device: str
) -> None:
    _, fused = make(device, "conditioned")
    for surprise in torch.rand(count).tolist():
        take(fused, surprise, device)
    _, _, phi, _ = take(fused, 50.0, device)
    assert (phi == 1.0) == is_open


@pytest.mark.parametrize("name", ["paper", "conditioned"])
def test_a_constant_surprise_is_no_resonance(name: str, device: str) -> None:
    _, fused = make(device, name)
    for _ in range(25):
        rho, psi, phi, chi = take(fused, 0.3333, device)
        assert (rho, psi, chi) == (0.0, 1.0, 0.0)
    assert phi == pytest.approx(1.0 if name == "conditioned" else 0.1 + 0.9 * math.exp(-0.3333))


# NumPy, which the interpreter computes with, warns of what a GPU does without a word.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("level", [1e155, 1e160, 1e170])
def test_squares_that_overflow_are_no_resonance(level: float, device: str) -> None:
    problem, fused = make(device, "paper")
    assert problem.controller is not None
    controller = problem.clone().controller
    assert controller is not None
    for count in range(8):
        surprise = level * (1 + count % 2)
        signals = observe(controller, torch.tensor(surprise, dtype=torch.float64, device=device))
        rho, _, phi, _ = take(fused, surprise, device)
        assert (rho, phi) == (float(signals.rho), float(signals.phi)) == (0.0, 0.1)


@pytest.mark.parametrize("level", [1.0, -3e5])
def test_a_signal_that_varies_by_rounding_is_no_resonance(level: float, device: str) -> None:
    _, fused = make(device, "paper")
    for count in range(12):
        rho, *_ = take(fused, level * (1 + count % 2 * 2.0**-50), device)
    assert rho == 0.0


def test_a_straight_line_leaves_no_residuals_but_rounding(device: str) -> None:
    _, fused = make(device, "conditioned")
    for count in range(20):
        rho, *_ = take(fused, (count - 19) * 54321.9876, device)
    assert rho == 0.0


# NumPy, which the interpreter computes with, warns of what a GPU does without a word.
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_a_norm_that_overflows_closes_the_gate(device: str) -> None:
    problem, fused = make(device, "paper")
    fused.step([torch.full((1,), math.inf, device=device)], loss=None, clip=False)
    assert float(fused.diagnostics[Diagnostic.PHI]) == CONTROLLERS["paper"]["phi_min"]
    assert problem.controller is not None
    assert problem.controller.counts.tolist() == [0, 1]


def test_a_clipped_gradient_that_is_no_number_stays_one(device: str) -> None:
    """As in torch: a coefficient of NaN must not turn into a step on an unclipped gradient."""
    problem = make_problem(device, shapes=[(2,)], max_norm=1.0)
    problem.fused().step([torch.tensor([1.0, math.nan], device=device)], loss=None, clip=True)
    assert problem.params[0].isnan().all()


def test_constants_are_the_references() -> None:
    assert kernel.RELATIVE_NOISE_FLOOR.value == definition.RELATIVE_NOISE_FLOOR
    assert kernel.MIN_HISTORY.value == definition.MIN_HISTORY
    assert kernel.ERROR_FLOOR.value == definition.ERROR_FLOOR
    for name in ("AVERAGED", "RISE", "CLOSED_BY", "OPEN"):
        assert getattr(kernel, name).value == getattr(definition, name)


def test_reports_are_neutral_before_the_first_step(device: str) -> None:
    nan = math.nan
    _, fused = make(device, "paper")
    expected = torch.tensor([nan, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, nan, 0.0]).double()
    assert_diagnostics(fused.diagnostics, expected)
