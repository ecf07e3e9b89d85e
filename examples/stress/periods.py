r"""Does resonance of any period show a run that momentum destroys, and nothing else?

The controller looks at one lag. With r_k the autocorrelation at lag k of a window's residuals about
its line, three signs are compared, each in its standard errors:

.. math::
    \text{alternation} &:\quad -r_1 \sqrt{W}                       \\
    \text{peak}        &:\quad \max_{k \le W/2} |r_k| \sqrt{W - k} \\
    \text{period}      &:\quad \max_{p \le W/2} \min(-r_{p/2}, r_p) \sqrt{W - p}, \quad
                               p \text{ even}

The first is the controller's. The second is the largest autocorrelation. The third is what an
oscillation of period p leaves: opposite after half of it, alike after the whole. Their thresholds
have one nominal chance level on white noise, with r_k normal of variance 1 / (W - k): the second
counts as 2 (W/2) trials, the third as W/4, each of two independent values.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ars import ARSConfig, reference
from common.plain_files import write_atomically
from common.tables import markdown
from stress.compared_optimizers import Step
from stress.networks import NETWORKS
from stress.oscillation import oscillate
from stress.scenarios import SIZES, Stream, load_standard_library

__all__ = [
    "SIGNS", "Losses", "autocorrelations", "brakes_at", "measured", "strengths", "thresholds",
    "write_periods",
]  # fmt: skip

WINDOW = ARSConfig().window
SIGNS = ("alternation", "peak", "period")
_EVEN = torch.arange(2, WINDOW // 2 + 1, 2)
_STEPS = 300  # of a run
_RUNS = 100
_WHITE, _FALLING, _SINES = 100_000, 20_000, 1_000  # windows
_GPT_RUNS, _GPT_STEPS = 12, 1_000  # 11,412 windows
_LOST_RUNS = 6
_AT_A_TIME = 50_000  # windows


def brakes_at(config: ARSConfig) -> float:
    """The r_1 from which alternation alone closes the gate below 0.9, by its own definition.

    Args:
        config: whose gate it is.

    Example:
        >>> round(brakes_at(ARSConfig()), 3)
        -0.628
    """
    grid = torch.linspace(-1, 0, 100_001, dtype=torch.float64)
    rho = reference.controller.shrink(grid, config.window, config.significance)
    psi = reference.entropy_guard(rho, config.eps, config.alternating)
    phi = reference.surprise_gate(0.0, psi, config.alpha, config.phi_min, config.resonance)
    return float(grid[torch.as_tensor(phi) < 0.9].max())


def thresholds(level: float | None = None) -> Tensor:
    """Standard errors above which each of `SIGNS` is an alarm, (3,).

    Args:
        level: nominal chance of an alarm in a window of white noise; ``None`` for that of the
            default's gate, 4.5e-6.
    """
    normal = NormalDist()
    if level is None:
        level = normal.cdf(brakes_at(ARSConfig()) * math.sqrt(WINDOW))
    each = (level, level / (2 * (WINDOW // 2)), math.sqrt(level / len(_EVEN)))
    return torch.tensor([-normal.inv_cdf(share) for share in each], dtype=torch.float64)


def autocorrelations(windows: Tensor) -> Tensor:
    """Pearson's correlation of a window's residuals about its line with those k later.

    Args:
        windows: (N, W) float64.

    Returns:
        (N, W // 2), of the lags 1 to W // 2; the first is the controller's rho.
    """
    size = windows.shape[1]
    age = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    shifted = windows - windows.mean(1, keepdim=True)
    residuals = shifted - (shifted @ age / age.dot(age))[:, None] * age
    found = []
    for lag in range(1, size // 2 + 1):
        x, y = residuals[:, :-lag], residuals[:, lag:]
        x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
        found.append((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1)).clamp(min=1e-300))
    return torch.stack(found, 1)


def strengths(windows: Tensor) -> tuple[Tensor, Tensor]:
    """The signs of each window, in standard errors, and the period of the third.

    Args:
        windows: (N, W) float64.

    Returns:
        (N, 3), NaN where a loss is not finite, and (N,) int64.
    """
    r = autocorrelations(windows)
    lags = torch.arange(1, WINDOW // 2 + 1)
    peak = (r.abs() * (WINDOW - lags).sqrt()).amax(1)
    both = torch.minimum(-r[:, _EVEN // 2 - 1], r[:, _EVEN - 1]) * (WINDOW - _EVEN).sqrt()
    best = both.max(1)
    return torch.stack((-r[:, 0] * math.sqrt(WINDOW), peak, best.values), 1), _EVEN[best.indices]


@dataclass(frozen=True)
class Losses:
    """Losses of one kind.

    Args:
        kind: in the table.
        values: (runs, steps) float64.
        single: whether each window counts by itself, and not each run.
    """

    kind: str
    values: Tensor
    single: bool = False


def measured(losses: Losses) -> dict[str, float | int | str]:
    """What the signs say of them.

    Args:
        losses: of one kind.

    Returns:
        ``losses``, the kind; ``count``, of windows or runs; for each of `SIGNS` how many of them
        have an alarm; ``usual period`` where the third has one, its median, else NaN; ``strongest
        period``, the median over them of the third's largest value; ``late / first loss``, the
        median over the runs of the last 20 losses against the first, infinite where one is not
        finite, NaN for windows.
    """
    limits = thresholds()
    rows_at_a_time = max(1, _AT_A_TIME // (losses.values.shape[1] - WINDOW + 1))
    alarms, largest, periods = [], [], []
    for part in losses.values.split(rows_at_a_time):
        windows = part.unfold(1, WINDOW, 1)  # (runs, windows of a run, W)
        found, period = strengths(windows.flatten(0, 1))
        over = found > limits  # false where a loss is not finite
        periods.append(period[over[:, 2]])
        shape = (-1, 1) if losses.single else windows.shape[:2]
        alarms.append(over.view(*shape, 3).any(1))
        largest.append(found[:, 2].nan_to_num(-math.inf).view(shape).amax(1))
    over, seen = torch.cat(alarms), torch.cat(periods).double()
    late = losses.values[:, -20:].mean(1) / losses.values[:, 0]
    return {
        "losses": losses.kind,
        "count": len(over),
        **{sign: int(over[:, at].sum()) for at, sign in enumerate(SIGNS)},
        "usual period": float(seen.median()) if len(seen) else math.nan,
        "strongest period": float(torch.cat(largest).median()),
        "late / first loss": math.nan
        if losses.single
        else float(late.nan_to_num(math.inf).median()),
    }


# ------------------------------------------------------------------------------- losses


def _normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _uniform(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def _falling(count: int) -> Tensor:
    """Windows of (1 + t / tau)^-1/2: tau from 1 to 300 steps, noise 1e-4 to 1 of the fall."""
    tau, noise = _uniform(2, count, 1, seed=0)
    loss = (1 + torch.arange(WINDOW, dtype=torch.float64) / 300**tau) ** -0.5
    fall = loss[:, :1] - loss[:, -1:]
    return loss + fall * 1e-4 ** (1 - noise) * _normal(count, WINDOW, seed=1)


def _sines(period: int, count: int) -> Tensor:
    """Windows of a sine of amplitude 1 and any phase, with noise of deviation 0.5."""
    angle = 2 * math.pi * torch.arange(WINDOW, dtype=torch.float64) / period
    phase = 2 * math.pi * _uniform(count, 1, seed=0)
    return (angle + phase).sin() + 0.5 * _normal(count, WINDOW, seed=1)


def _gpt(runs: int, steps: int, rate: float) -> Tensor:
    """Training of the GPT of size "tiny" by AdamW, at a multiple of its best rate."""
    size, corpus = SIZES["tiny"], load_standard_library()
    losses = torch.empty(runs, steps, dtype=torch.float64)
    for seed in range(runs):
        model: Any = NETWORKS["gpt"].make(size, torch.Generator().manual_seed(seed))
        stream, step = Stream("ordinary", seed, size, corpus.train), Step("adamw", model, rate, {})
        for index in range(steps):
            inputs, targets = stream.training(index, model)
            loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            step(loss, stream.rate(index))
            losses[seed, index] = loss.item()
    return losses


_Rule = Callable[[list[Tensor], float], torch.optim.Optimizer]
# Both work on each element alone, so all runs are one tensor and do not mix.
_RULES: dict[str, _Rule] = {
    "heavy ball": lambda weights, rate: torch.optim.SGD(weights, rate, momentum=0.9),
    "Adam": lambda weights, rate: torch.optim.Adam(weights, rate, betas=(0.9, 0.95)),
}


def _quadratic(rule: str, rate: float, noise: float = 0.1) -> Tensor:
    """16 directions of curvature 0.01 to 1, from 1; the gradient has noise."""
    curvature = torch.logspace(-2, 0, 16, dtype=torch.float64)
    x = nn.Parameter(1 + 0.1 * _normal(_RUNS, 16, seed=1))
    optimizer = _RULES[rule]([x], rate)
    disturbance = noise * _normal(_STEPS, _RUNS, 16, seed=2)
    losses = []
    for step in range(_STEPS):
        losses.append((curvature * x.detach() ** 2).sum(1) / 2)
        x.grad = curvature * x.detach() + disturbance[step]
        optimizer.step()
    return torch.stack(losses, 1)


def _network(rule: str, rate: float) -> Tensor:
    """Tanh networks of 16 hidden units learn sin(3 x) from 32 points, all at every step."""
    x = torch.linspace(-1, 1, 32, dtype=torch.float64)[None, :, None]
    scales = (((1, 16), 2.0), ((1, 16), 1.0), ((16, 1), 0.25))
    weights = [
        nn.Parameter(scale * _normal(_RUNS, *shape, seed=seed))
        for seed, (shape, scale) in enumerate(scales)
    ]
    optimizer = _RULES[rule]([*weights], rate)
    losses = []
    for _ in range(_STEPS):
        optimizer.zero_grad()
        error = (x @ weights[0] + weights[1]).tanh() @ weights[2] - (3 * x).sin()
        loss = (error * error).mean((1, 2))
        loss.sum().backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses, 1)


def _logistic(rate: float) -> Tensor:
    """The self-oscillation of `stress.oscillation` with momentum; rates in units of its edge."""
    found = [oscillate("momentum", rate, seed, _STEPS).losses for seed in range(10)]
    return torch.tensor(found, dtype=torch.float64)


def _all_losses() -> Iterator[Losses]:
    yield Losses("white noise", _normal(_WHITE, WINDOW, seed=0), single=True)
    yield Losses("a falling loss", _falling(_FALLING), single=True)
    yield Losses("ordinary training of a GPT", _gpt(_GPT_RUNS, _GPT_STEPS, 1.0), single=True)
    for period in (2, 3, 4, 6, 10, 20):
        yield Losses(f"a sine of period {period}", _sines(period, _SINES), single=True)
    edge = 3.8  # of the heavy ball: 2 (1 + 0.9) over the largest curvature
    for share in (0.1, 0.5, 0.9, 1.001, 1.02):
        yield Losses(
            f"quadratic, heavy ball, {share:g} edge", _quadratic("heavy ball", share * edge)
        )
    for rate in (0.03, 0.3, 1.0):
        yield Losses(f"quadratic, Adam, rate {rate:g}", _quadratic("Adam", rate))
    for rule, rates in (("heavy ball", (0.01, 0.1, 0.3)), ("Adam", (0.01, 0.1, 1.0))):
        for rate in rates:
            yield Losses(f"network, {rule}, rate {rate:g}", _network(rule, rate))
    for rate in (10.0, 100.0):
        yield Losses(f"GPT, rate x {rate:g}", _gpt(_LOST_RUNS, _STEPS, rate))
    for share in (0.5, 4.0, 16.0, 64.0):
        yield Losses(f"logistic, heavy ball, {share:g} edges", _logistic(share))


def write_periods(folder: Path) -> str:
    """Measure the signs on all losses; write ``periods.csv``.

    Args:
        folder: output folder, which exists.

    Returns:
        The table.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the sums depend on it
    try:
        rows = [measured(losses) for losses in _all_losses()]
    finally:
        torch.set_num_threads(threads)
    frame = pd.DataFrame(rows)
    write_atomically(folder / "periods.csv", frame.to_csv(index=False, lineterminator="\n"))
    cells = [[*frame.columns], *(list(map(_cell, row.values())) for row in rows)]
    return markdown(cells, "lr") + "\n"


def _cell(value: float | str) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3g}"
    return str(value)
