"""Pictures of a training: what the controller saw and did, and where a model's importance is.

They need matplotlib, and return its figures: ``figure.savefig("history.png")``. This module is not
imported with the package.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ars.adam import ARSAdam
from ars.wrapper import ARSOptimizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["History", "plot_history", "plot_importance"]

_PANELS = {
    "surprise": "surprise: loss,\nor gradient norm",
    "phi": "Phi, times\nthe learning rate",
    "rho": "rho, alternating\nbelow 0",
    "penalty": "penalty",
}
_OPEN = 0.999  # a gate above is drawn as open


class History:
    """The diagnostics of every step from now on, kept on the device: nothing waits for it.

    80 bytes a step. The replay of a captured graph runs no hooks: call :meth:`record` after it.

    Args:
        optimizer: An :class:`ars.ARSAdamW`, :class:`ars.ARSAdam` or :class:`ars.ARSOptimizer`.

    Raises:
        TypeError: It is another optimizer.

    Example:
        >>> import torch
        >>> from ars import ARSAdamW
        >>> from ars.plot import History
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> opt = ARSAdamW([weight], lr=0.1)
        >>> history = History(opt)
        >>> for loss in (2.0, 1.0):
        ...     weight.grad = torch.ones(2)
        ...     opt.step(loss=loss)
        >>> history.values()["surprise"]
        [2.0, 1.0]
    """

    def __init__(self, optimizer: ARSAdam | ARSOptimizer) -> None:
        if not isinstance(optimizer, (ARSAdam, ARSOptimizer)):
            raise TypeError(
                f"a History is of an ARSAdamW, ARSAdam or ARSOptimizer, got "
                f"{type(optimizer).__name__}"
            )
        self._optimizer = optimizer
        self._names = list(optimizer.diagnostics)
        self._rows: list[Tensor] = []
        self._handle = optimizer.register_step_post_hook(lambda *_: self.record())

    def record(self) -> None:
        """Keep what the last step saw and did."""
        self._rows.append(torch.stack(list(self._optimizer.diagnostics.values())))

    def stop(self) -> None:
        """Keep no further steps."""
        self._handle.remove()

    def values(self) -> dict[str, list[float]]:
        """Return each diagnostic of all steps by name; waits for the device."""
        if not self._rows:
            return {name: [] for name in self._names}
        table = torch.stack([row.to("cpu", torch.float64) for row in self._rows])
        return dict(zip(self._names, table.T.tolist(), strict=True))


def plot_history(history: History) -> "Figure":
    """Draw what the controller saw and did against the steps; where it braked is shaded.

    Args:
        history: Of at least one step.

    Returns:
        A figure with a panel for each of surprise, Phi, rho, and the penalty if there is one.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is no step yet.
    """
    values = history.values()
    steps = range(1, len(values["phi"]) + 1)
    if not steps:
        raise ValueError("the History has no step yet: make it before the training begins")
    shown = [name for name in _PANELS if any(v == v and v for v in values.get(name, ()))]  # no NaN
    shown = [name for name in _PANELS if name in shown or name in ("surprise", "phi")]
    figure = _figure(7.0, 1.6 * len(shown) + 0.4)
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for name, panel in zip(shown, panels, strict=True):
        panel.plot(steps, values[name], linewidth=1.0)
        panel.set_ylabel(_PANELS[name], fontsize=8)
        panel.margins(x=0.01)
        if name == "phi":
            panel.set_ylim(0.0, 1.05)
        elif min(values[name]) > 0 and max(values[name]) > 100 * min(values[name]):
            panel.set_yscale("log")
        for first, last in _braked(values["phi"]):
            panel.axvspan(first - 0.5, last + 0.5, color="tab:red", alpha=0.15, linewidth=0)
    panels[-1].set_xlabel("step (shaded: the gate brakes)")
    return figure


def plot_importance(fisher: Any, top: int = 40) -> "Figure":
    """Draw the importance of each parameter: its mean, and the range of the middle 98 %.

    Args:
        fisher: A fitted :class:`~ars.regularizers.DiagonalFisher`, or a mapping from parameter name
            to importance.
        top: Show that many parameters, those of the largest mean, >= 1; in the model's order.

    Returns:
        A figure with a row a parameter, on a logarithmic axis. What is 0 throughout has no bar.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is no importance, or ``top`` is not positive.
    """
    importance: Mapping[str, Tensor] = getattr(fisher, "importance", fisher)
    if not importance or top < 1:
        raise ValueError("plot_importance needs at least one importance, and top >= 1")
    means = {name: float(value.double().mean()) for name, value in importance.items()}
    largest = sorted(means, key=lambda name: -means[name])[:top]
    names = [name for name in importance if name in largest]
    figure = _figure(7.0, 0.22 * len(names) + 1.0)
    panel = figure.subplots()
    for row, name in enumerate(names):
        if means[name] == 0.0:
            continue
        low, high = _middle(importance[name])
        panel.plot([low, high], [row, row], color="tab:blue", linewidth=4, alpha=0.35)
        panel.plot([means[name]], [row], "o", color="tab:blue", markersize=4)
    panel.set_xscale("log")
    panel.set_yticks(range(len(names)), names, fontsize=7)
    panel.set_ylim(len(names) - 0.5, -0.5)
    left = "" if len(names) == len(importance) else f", {len(names)} of {len(importance)}"
    panel.set_xlabel(f"importance of a weight: mean (dot) and the middle 98 % (bar){left}")
    return figure


def _braked(phi: list[float]) -> list[tuple[int, int]]:
    """First and last step, from 1 on, of each stretch in which the gate was not open."""
    spans: list[tuple[int, int]] = []
    for step, value in enumerate(phi, 1):
        if value < _OPEN and spans and spans[-1][1] == step - 1:
            spans[-1] = (spans[-1][0], step)
        elif value < _OPEN:
            spans.append((step, step))
    return spans


def _middle(values: Tensor) -> tuple[float, float]:
    """The 1st and the 99th percentile of what is not 0."""
    positive = values[values > 0].double().flatten()
    if positive.numel() > 1_000_000:  # quantile takes no more than 16 million
        positive = positive[:: positive.numel() // 1_000_000]
    low, high = positive.quantile(
        torch.tensor([0.01, 0.99], dtype=torch.float64).to(positive.device)
    )
    return float(low), float(high)


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("ars.plot needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=120)
