r"""Where AdamW is stable on a quadratic, what the gate does to it, and what jitter does to a lock.

    python examples/stability.py             # writes out/stability/stability.png
    python examples/stability.py --out DIR
    python examples/stability.py --periods   # signs of resonance compared: two minutes of one core

On one direction of curvature h, with a second moment that stands still, AdamW is linear in the
error x and the first moment m (docs/stability.md derives it):

    m' = b m + (1 - b) h x,    x' = (1 - a w) x - a m' / s,    s = sqrt(v) + eps

with b = beta_1, a the learning rate and w the weight decay.

Exit status: 0 done; 2 the command line or the output folder is wrong.
"""

import cmath
import math
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.command_line import CommandLine
from common.program import exit_status, missing_module

__all__ = ["descend", "eigenvalues", "growth_rate", "main", "stable_rate", "update_matrix"]

_GATES = (1.0, 0.5, 0.1)


def update_matrix(
    sharpness: float, beta: float, decay: float = 0.0
) -> tuple[tuple[float, float], tuple[float, float]]:
    """The linear map of (x, m / h) in one step.

    Args:
        sharpness: k = a h / s, the curvature in units of the inverse step.
        beta: b, decay of the first moment, in [0, 1).
        decay: a w, the share of x that weight decay takes in a step.

    Returns:
        The rows of the 2 x 2 matrix.
    """
    return (1 - decay - sharpness * (1 - beta), -sharpness * beta), (1 - beta, beta)


def eigenvalues(sharpness: float, beta: float, decay: float = 0.0) -> tuple[complex, complex]:
    """Eigenvalues of `update_matrix`, the larger in magnitude first.

    The roots of z^2 - (1 - a w + b - k (1 - b)) z + b (1 - a w).

    Example:
        >>> [abs(z) for z in eigenvalues(2.0, 0.0)]  # gradient descent at its edge
        [1.0, 0.0]
    """
    trace = 1 - decay + beta - sharpness * (1 - beta)
    root = cmath.sqrt(trace * trace - 4 * beta * (1 - decay))
    first, second = (trace + root) / 2, (trace - root) / 2
    return (first, second) if abs(first) >= abs(second) else (second, first)


def stable_rate(
    beta: float, gate: float, on: str, curvature: float = 1.0, decay: float = 0.0
) -> float:
    """The learning rate a beyond which the error grows: a Phi (h (1-b)/s + w (1+b)) = 2 (1+b).

    Args:
        beta: b, decay of the first moment, in [0, 1).
        gate: Phi, in (0, 1].
        on: what Phi multiplies, ``betas`` (b becomes b Phi, and no Phi beside a), ``lr``, or
            ``grad``, which s follows, so that nothing changes.
        curvature: h / s.
        decay: w.

    Example:
        >>> round(stable_rate(0.9, 1.0, "lr"), 9), round(stable_rate(0.9, 0.1, "lr"), 9)
        (38.0, 380.0)
        >>> round(stable_rate(0.9, 0.1, "betas"), 3)
        2.396
    """
    if on == "betas":
        beta *= gate
    edge = 2 * (1 + beta) / ((1 - beta) * curvature + decay * (1 + beta))
    return edge / gate if on == "lr" else edge


def growth_rate(sharpness: float, jitter: float) -> float:
    r"""Mean growth of log|x| in a step of gradient descent whose rate is jittered.

    :math:`E \ln |1 - k (1 + \chi)|` with chi uniform in (-j, j), in closed form.

    Args:
        sharpness: k, not 0.
        jitter: j >= 0.

    Example:
        >>> growth_rate(2.0, 0.0), round(growth_rate(2.0, 0.1), 4)  # about -2 j^2 / 3
        (0.0, -0.0067)
    """
    if jitter == 0:
        return math.log(abs(1 - sharpness))
    width = sharpness * jitter
    low, high = 1 - sharpness - width, 1 - sharpness + width

    def integral(z: float) -> float:
        return z * math.log(abs(z)) - z if z else 0.0

    return (integral(high) - integral(low)) / (high - low)


def descend(
    gradient: Callable[[float], float], rate: float, jitter: float, steps: int, seed: int = 0
) -> list[float]:
    """Gradient descent from x = 1 with a rate of its own in every step.

    Args:
        gradient: of x.
        rate: the learning rate without jitter.
        jitter: its largest relative change.
        steps: how many.
        seed: of the jitter.

    Returns:
        x at the start and after each step.
    """
    uniform = random.Random(seed).uniform
    path = [1.0]
    for _ in range(steps):
        path.append(path[-1] - rate * (1 + uniform(-jitter, jitter)) * gradient(path[-1]))
    return path


def _draw() -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _draw_range(left)
    _draw_radius(middle)
    _draw_lock(right)
    for axes in (left, middle, right):
        axes.grid(visible=True, linewidth=0.3)
        axes.legend(frameon=False, fontsize=8)
    return figure


def _draw_range(axes: Any) -> None:
    betas = [i / 200 for i in range(198)]
    for number, gate in enumerate(_GATES):
        for on, line in (("lr", "-"), ("betas", "--")):
            if gate < 1 or on == "lr":
                label = f"Phi = {gate:g}" + (f" on {on}" if gate < 1 else "")
                rates = [stable_rate(beta, gate, on) for beta in betas]
                axes.plot(betas, rates, line, color=f"C{number}", label=label)
    axes.set_yscale("log")
    axes.set_xlabel("beta_1")
    axes.set_ylabel("largest stable learning rate, in s / h")
    axes.set_title("Stable range")


def _draw_radius(axes: Any) -> None:
    sharpnesses = [10 ** (i / 100 - 1) for i in range(380)]
    for number, gate in enumerate(_GATES):
        for on, line in (("lr", "-"), ("betas", "--")):
            if gate < 1 or on == "lr":
                step, beta = (gate, 0.9) if on == "lr" else (1.0, 0.9 * gate)
                radii = [abs(eigenvalues(step * k, beta)[0]) for k in sharpnesses]
                label = f"Phi = {gate:g}" + (f" on {on}" if gate < 1 else "")
                axes.plot(sharpnesses, radii, line, color=f"C{number}", label=label)
    axes.axhline(1.0, color="0.4", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_ylim(0.3, 2.0)
    axes.set_xlabel("a h / s")
    axes.set_ylabel("largest |eigenvalue|")
    axes.set_title("AdamW, beta_1 = 0.9")


def _draw_lock(axes: Any) -> None:
    runs = (
        ("quadratic, k = 2", lambda x: x, 2.0, 0.0),
        ("quadratic, k = 2, jitter 0.1", lambda x: x, 2.0, 0.1),
        ("log cosh, k = 2.2, jitter 0.1", math.tanh, 2.2, 0.1),
        ("log cosh, k = 2.2, Phi = 0.5 on lr", math.tanh, 1.1, 0.0),
    )
    for label, gradient, rate, jitter in runs:
        paths = [descend(gradient, rate, jitter, 600, seed) for seed in range(100 if jitter else 1)]
        logs = [[math.log(max(abs(x), 1e-4)) for x in path] for path in paths]
        means = [math.exp(sum(column) / len(column)) for column in zip(*logs, strict=True)]
        axes.plot(means, linewidth=1.2, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("|x|, geometric mean of 100 runs")
    axes.set_title("A period of two, gradient descent")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the figure and return the exit status.

    Args:
        argv: the words after the program's name; ``None`` for those of this process.
    """
    parser = CommandLine("stability.py", "Draw where AdamW is stable on a quadratic.")
    parser.add_argument(
        "--out", type=Path, default=Path("out/stability"), help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--periods",
        action="store_true",
        help="instead, compare signs of resonance on losses that alternate, oscillate and fall",
    )
    options = parser.parse_args(argv)
    out: Path = options.out
    try:
        from common.output_folder import OutputFolder

        if options.periods:
            from stress.periods import write_periods
        figure = None if options.periods else _draw()
    except ModuleNotFoundError as error:
        return missing_module(error)

    def write() -> None:
        with OutputFolder(out) as output:
            output.hold()
            if figure is None:
                shown = write_periods(out) + f"Results are in {out / 'periods.csv'}."
            else:
                figure.savefig(out / "stability.png", dpi=110)
                shown = str(out / "stability.png")
            output.check()
        print(shown)

    return exit_status(out, write)


if __name__ == "__main__":
    sys.exit(main())
