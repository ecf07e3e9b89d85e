r"""A self-oscillation in which the surprise falls while the weights' norm explodes.

Logistic regression on separable data whose features are not centred, by gradient descent on all
of it beyond the stable edge a = 2 / h, with h a bound of the curvature:

.. math::
    L(w) = \frac1n \sum_i \ln(1 + e^{-y_i x_i w}), \qquad h = \frac{\|X\|_2^2}{4n}

The loss alternates between the two classes, around a mean that falls, while w grows by a share of
the learning rate at every step. Nothing surprises: the alternation is there from the first step.

References:
    Wu et al., "Large stepsize gradient descent for logistic loss: non-monotonicity of the loss
    improves optimization efficiency", COLT 2024, arXiv:2402.15926.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ars import ARSConfig, ARSOptimizer
from common.plain_files import write_atomically
from common.statistics import Estimate
from common.tables import markdown

__all__ = ["ARMS", "RATES", "Oscillation", "draw_oscillations", "oscillate", "write_oscillations"]

STEPS = 300
RATES = (0.5, 4.0, 16.0, 64.0)  # multiples of the edge
_SAMPLES, _FEATURES = 64, 16
_OFFSET, _MARGIN = 10.0, 0.05  # of every feature's mean; between the classes, beyond the noise
_LATE = 20  # steps whose loss is averaged at the end

ARMS: dict[str, tuple[str, ARSConfig | None]] = {
    "sgd": ("SGD", None),
    "sgd-surprise": ("SGD, default without resonance", ARSConfig(resonance=0.0)),
    "sgd-default": ("SGD, default", ARSConfig()),
    "momentum": ("SGD, momentum 0.9", None),
    "momentum-default": ("SGD, momentum 0.9, default", ARSConfig()),
}


@dataclass(frozen=True)
class Oscillation:
    """One run.

    Args:
        arm: a name of `ARMS`.
        rate: learning rate, as a multiple of the edge.
        seed: of data and weights.
        losses: of each step.
        norms: of the weights after each step.
        gates: Phi of each step.
    """

    arm: str
    rate: float
    seed: int
    losses: list[float]
    norms: list[float]
    gates: list[float]

    @property
    def metrics(self) -> dict[str, float | int | None]:
        """What the tables say of it; ``braked`` is the first step of a gate below 0.9."""
        return {
            "late_loss": sum(self.losses[-_LATE:]) / _LATE,
            "peak_norm": max(self.norms),
            "least_phi": min(self.gates),
            "braked": next((i for i, phi in enumerate(self.gates) if phi < 0.9), None),
        }


def _problem(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features (n, d), labels (n,) of -1 and 1, and weights (d,) to start from; float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    direction = normal(_FEATURES)
    direction -= direction.mean()  # across what all samples have in common
    direction /= direction.norm()
    features = normal(_SAMPLES, _FEATURES) + _OFFSET
    labels = torch.sign(features @ direction)
    features += _MARGIN * labels[:, None] * direction
    return features, labels, 0.01 * normal(_FEATURES)


def oscillate(arm: str, rate: float, seed: int, steps: int = STEPS) -> Oscillation:
    """Train.

    Args:
        arm: a name of `ARMS`.
        rate: learning rate, as a multiple of the edge, 2 / h, with momentum 3.8 / h.
        seed: of data and weights.
        steps: how many.
    """
    features, labels, start = _problem(seed)
    weights = nn.Parameter(start)
    momentum = 0.9 if arm.startswith("momentum") else 0.0
    curvature = float(torch.linalg.matrix_norm(features, 2)) ** 2 / (4 * len(labels))
    base = torch.optim.SGD([weights], lr=rate * 2 * (1 + momentum) / curvature, momentum=momentum)
    config = ARMS[arm][1]
    optimizer = base if config is None else ARSOptimizer(base, config)
    losses, norms, gates = [], [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.softplus(-labels * (features @ weights)).mean()
        loss.backward()
        if isinstance(optimizer, ARSOptimizer):
            optimizer.step(loss=loss.detach())
            gates.append(float(optimizer.diagnostics["phi"]))
        else:
            optimizer.step()
            gates.append(1.0)
        losses.append(loss.item())
        norms.append(float(weights.detach().norm()))
    return Oscillation(arm, rate, seed, losses, norms, gates)


def write_oscillations(folder: Path, seeds: Sequence[int]) -> str:
    """Run all arms and rates; write ``oscillation.csv``, ``tables.md`` and ``oscillation.png``.

    Args:
        folder: output folder, which exists.
        seeds: of the runs.

    Returns:
        The table.
    """
    runs = [oscillate(arm, rate, seed) for rate in RATES for arm in ARMS for seed in seeds]
    rows = [{"arm": r.arm, "rate": r.rate, "seed": r.seed, **r.metrics} for r in runs]
    frame = pd.DataFrame(rows).astype({"braked": "Int64"})  # whole numbers, and runs without one
    write_atomically(folder / "oscillation.csv", frame.to_csv(index=False, lineterminator="\n"))
    table = _table(runs)
    write_atomically(folder / "tables.md", table)
    draw_oscillations(folder / "oscillation.png", runs)
    return table


def _table(runs: Sequence[Oscillation]) -> str:
    rows = [
        ["learning rate / edge", "arm", "braked, of runs", "late loss", "peak norm", "least Phi"]
    ]
    for rate, arm in dict.fromkeys((run.rate, run.arm) for run in runs):
        found = [run.metrics for run in runs if (run.rate, run.arm) == (rate, arm)]
        braked = sum(metrics["braked"] is not None for metrics in found)
        cells = [f"{rate:g}", ARMS[arm][0], f"{braked} of {len(found)}"]
        for name in ("late_loss", "peak_norm", "least_phi"):
            values = [float(metrics[name] or 0.0) for metrics in found]
            cells.append(Estimate.of(values).plus_minus(".2f"))
        rows.append(cells)
    return markdown(rows, "rlr") + "\n"


def draw_oscillations(path: Path, runs: Sequence[Oscillation], rate: float = 16.0) -> None:
    """Draw loss, weight norm and gate of the first seed at one learning rate.

    Args:
        path: of the figure.
        runs: of which those without momentum are drawn.
        rate: learning rate, as a multiple of the edge.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seed = runs[0].seed
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    styles: dict[str, dict[str, Any]] = {
        "sgd": {"color": "0.6", "linewidth": 2.4}, "sgd-surprise": {"color": "C1"},
        "sgd-default": {"color": "C0"},
    }  # fmt: skip
    for run in runs:
        if run.arm in styles and (run.rate, run.seed) == (rate, seed):
            for ax, values in zip(axes, (run.losses, run.norms, run.gates), strict=True):
                ax.plot(values, label=ARMS[run.arm][0], **{"linewidth": 1.0} | styles[run.arm])
    for ax, label in zip(axes, ("loss", "weight norm", "gate Phi"), strict=True):
        ax.set_xlabel("step")
        ax.set_ylabel(label)
        ax.grid(visible=True, linewidth=0.3)
    axes[0].set_yscale("log")
    axes[2].set_ylim(0, 1.05)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Logistic regression by gradient descent at {rate:g} times the edge")
    figure.savefig(path, dpi=110)
    plt.close(figure)
