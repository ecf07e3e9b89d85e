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


def training(count: int) -> list[float]:
    """A falling, noisy loss; then resonance, spikes, losses that are no numbers, and a plateau."""
    t = torch.arange(count, dtype=torch.float64)
    values = 2 * torch.exp(-t / 20) + 0.05 * torch.randn(count, dtype=torch.float64)
    values += torch.where((t > 25) & (t < 45), 0.5 * torch.cos(math.pi * t), 0.0)
    values[15] = values[48] = 5.0
    values[[18, 49, 50]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)
    values[55:70] = 0.7
    return values.tolist()


TRAJECTORIES: dict[str, list[float]] = {
    "noise": torch.randn(40, generator=torch.Generator().manual_seed(0)).tolist(),
    "constant": [0.3333] * 12,
    "all but constant": [-3e5 * (1 + count % 2 * 2.0**-50) for count in range(12)],
    "line": [(count - 19) * 54321.9876 for count in range(20)],
    "overflow": [1e155 * (1 + count % 2) for count in range(8)],
    "overflow of sums": [1e170 * (1 + count % 2) for count in range(8)],
    "spike after nine": [*(count % 4 / 5 for count in range(9)), 50.0],
    "spike after ten": [*(count % 4 / 5 for count in range(10)), 50.0],
    "nan first": [math.nan, 0.1, 0.3, 0.2, -math.inf, 0.2],
}
CASES = [
    *(("training", 20, name) for name in ("paper", "conditioned", "resonant", "default")),
    *(("noise", window, name) for window in (4, 33) for name in ("conditioned", "standardized")),
    *(("nan first", window, name) for window in (1, 2, 3) for name in ("conditioned", "paper")),
    *((kind, 20, name) for kind in TRAJECTORIES for name in ("paper", "conditioned")),
]


# NumPy, which the interpreter computes with, warns of what a GPU does without a word.
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize(("kind", "window", "name"), CASES)
def test_trajectory_equals_the_reference(kind: str, window: int, name: str, device: str) -> None:
    problem, fused = make(device, name, window)
    controller = problem.clone().controller
    assert controller is not None
    assert problem.controller is not None
    values = training(80) if kind == "training" else TRAJECTORIES[kind]
    seen = set()
    for surprise in values:
        signals = observe(controller, torch.tensor(surprise, dtype=torch.float64, device=device))
        found = take(fused, surprise, device)
        expected = [float(signal) for signal in signals[1:]]
        assert found == pytest.approx(expected, rel=SIGNAL_TOLERANCE, abs=1e-12)
        assert torch.equal(problem.controller.window, controller.window)
        assert torch.equal(problem.controller.counts, controller.counts)
        assert float(problem.controller.gate_state[0]) == found[2]
        seen |= {(expected[0] > 0.1) - (expected[0] < -0.1), expected[2] < 0.9}
    assert not problem.params[0].isnan().any()
    # Training has positive, no and negative correlation, and the gate opens and closes.
    assert seen >= {-1, 0, 1} or kind != "training"
    finite = sum(map(math.isfinite, values))
    assert controller.counts.tolist() == [finite, len(values)]


@pytest.mark.parametrize("seed", [2**64 - 1, 0x0123456789ABCDEF])
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
