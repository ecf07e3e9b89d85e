"""The eigenvalues in docs/stability.md against numerical ones, and against the optimizer itself."""

import cmath
import itertools
import math
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from program_helpers import Refused

import stability
from ars import ARSAdamW, ARSConfig
from stability import descend, eigenvalues, growth_rate, stable_rate, update_matrix

CASES = [
    (k, b, d)
    for k in (0.01, 0.3, 2.0, 37.9, 38.1, 400.0)
    for b in (0.0, 0.09, 0.9, 0.99)
    for d in (0.0, 0.05)
]


@pytest.mark.parametrize(("sharpness", "beta", "decay"), CASES)
def test_eigenvalues_are_those_of_the_matrix(sharpness: float, beta: float, decay: float) -> None:
    matrix = np.array(update_matrix(sharpness, beta, decay))
    expected = sorted(np.linalg.eigvals(matrix).astype(complex), key=lambda z: (abs(z), z.imag))
    found = sorted(eigenvalues(sharpness, beta, decay), key=lambda z: (abs(z), z.imag))
    assert np.allclose(found, expected, rtol=1e-6, atol=1e-7)
    first, second = eigenvalues(sharpness, beta, decay)
    assert abs(first) >= abs(second)
    assert cmath.isclose(first * second, beta * (1 - decay), rel_tol=1e-9, abs_tol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("gate", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("on", ["betas", "lr", "grad"])
@pytest.mark.parametrize(("curvature", "weight_decay"), [(1.0, 0.0), (30.0, 0.1)])
def test_the_edge_is_where_the_largest_eigenvalue_crosses_one(
    beta: float, gate: float, on: str, curvature: float, weight_decay: float
) -> None:
    edge = stable_rate(beta, gate, on, curvature, weight_decay)
    effective_beta = beta * gate if on == "betas" else beta
    for factor, stable in ((0.999, True), (1.001, False)):
        rate = edge * factor * (gate if on == "lr" else 1.0)
        radius = abs(eigenvalues(rate * curvature, effective_beta, rate * weight_decay)[0])
        assert (radius < 1) == stable
    if beta > 0 and gate < 1:
        whole = stable_rate(beta, 1.0, on, curvature, weight_decay)
        assert {"lr": edge > whole, "betas": edge < whole, "grad": edge == whole}[on]


@pytest.mark.parametrize(("factor", "stable"), [(0.98, True), (1.02, False)])
@pytest.mark.parametrize(("gate", "phi"), [("lr", 0.5), ("betas", 0.5), ("lr", 1.0)])
def test_the_optimizer_has_the_edge_of_its_linearisation(
    factor: float, stable: bool, gate: str, phi: float
) -> None:
    """AMSGrad's maximum, set far above every gradient, is a second moment that stands still."""
    beta, scale = 0.9, 1e20
    decay = 0.05 / scale  # about as much of the edge as the curvature
    edge = stable_rate(beta, phi, gate, curvature=1 / scale, decay=decay)
    weight = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = ARSAdamW(
        [weight],
        lr=edge * factor,
        betas=(beta, 0.0),
        eps=0.0,
        weight_decay=decay,
        amsgrad=True,
        ars=ARSConfig.paper(phi_min=0.0, gate=(gate,), jitter=0.0),
    )
    optimizer.param_groups[0]["lr"] = 0.0
    sizes = []
    for _ in range(80):
        weight.grad = weight.detach().clone()
        optimizer.step(loss=-math.log(phi))  # Phi = exp(-S), as Psi = 1 for a constant S
        optimizer.state[weight]["max_exp_avg_sq"].fill_(scale**2)
        optimizer.param_groups[0]["lr"] = edge * factor
        sizes.append(abs(weight.item()))
    assert float(optimizer.diagnostics["phi"]) == pytest.approx(phi)
    assert max(sizes) < scale / 10, "the gradient is no longer far below the second moment"
    late, early = max(sizes[-10:]), max(sizes[30:40])
    assert late < early / 2 if stable else late > 2 * early


def test_jitter_shrinks_what_is_at_the_edge_by_two_thirds_of_its_square() -> None:
    generator = np.random.default_rng(0)
    for sharpness, jitter in ((2.0, 0.1), (2.0, 0.3), (1.5, 0.2), (2.1, 0.1)):
        chi = generator.uniform(-jitter, jitter, 400_000)
        logs = np.log(np.abs(1 - sharpness * (1 + chi)))
        error = 4 * logs.std() / math.sqrt(logs.size)
        assert growth_rate(sharpness, jitter) == pytest.approx(logs.mean(), abs=error)
    assert growth_rate(2.0, 0.1) == pytest.approx(-2 * 0.1**2 / 3, rel=0.02)
    assert growth_rate(2.0, 0.0) == 0.0
    # It moves the edge by a share of j^2 / 3, and no further.
    assert growth_rate(2.0 * (1 + 0.9 * 0.1**2 / 3), 0.1) < 0
    assert growth_rate(2.0 * (1 + 1.2 * 0.1**2 / 3), 0.1) > 0


def test_locks_of_a_period_of_two() -> None:
    locked = descend(lambda x: x, 2.0, 0.0, 400)
    assert locked == [1.0, -1.0] * 200 + [1.0]
    ends = [abs(descend(lambda x: x, 2.0, 0.1, 1000, seed)[-1]) for seed in range(40)]
    mean = sum(map(math.log, ends)) / len(ends)
    assert mean == pytest.approx(1000 * growth_rate(2.0, 0.1), abs=3 * 1.9)  # sqrt(1000) 0.06 each
    # Beyond the edge the descent on log cosh is held in a cycle that jitter does not open.
    for seed in range(5):
        cycle = descend(math.tanh, 2.2, 0.1, 600, seed)[-200:]
        assert all(a * b < 0 for a, b in itertools.pairwise(cycle))
        assert min(map(abs, cycle)) > 0.1
    assert abs(descend(math.tanh, 1.1, 0.0, 600)[-1]) < 1e-12


def test_the_controller_sees_a_lock_only_where_the_loss_differs_between_its_two_ends() -> None:
    from ars import ARSController

    for tilt, guard in ((0.0, 1.0), (0.3, 0.05)):
        controller = ARSController(ARSConfig.paper())
        for x in descend(lambda x: x, 2.0, 0.0, 120):
            signals = controller.observe(0.5 * x * x + tilt * x)
        assert float(signals.psi) == pytest.approx(guard, abs=0.06)
        assert (float(signals.chi) != 0) == (tilt > 0)


def test_figure_and_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    assert stability.main(["--out", str(tmp_path / "a")]) == 0
    assert matplotlib.image.imread(tmp_path / "a" / "stability.png").shape[1] > 1000
    capsys.readouterr()
    (tmp_path / "b").write_text("")
    assert "b is a file" in refused(stability.main, ["--out", str(tmp_path / "b")])
    assert "unrecognized arguments: --nonsense" in refused(stability.main, ["--nonsense"])


def test_a_missing_module_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    expected = "error: the module matplotlib.figure is missing: pip install 'ars-triton[examples]'"
    assert refused(stability.main, ["--out", str(tmp_path / "a")]) == expected + "\n"


def test_examples() -> None:
    import doctest

    assert doctest.testmod(stability).failed == 0
