"""How the arms look in every figure: colour and marker by method, line by controller."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from analysis.pairings import read_arm, without_strengths
from trainer.arms import Arm

__all__ = ["Style", "legend_beside", "png", "polish", "styles_of"]

# Okabe and Ito's colours, which colour-blind readers can tell apart; the baseline is black.
_METHODS = {
    "scratch": ("#000000", "o"),
    "scratch+muon": ("#8A8A8A", "s"),
    "grown": ("#D55E00", "^"),
    "grown+ewc": ("#0072B2", "D"),
    "grown+subspace": ("#E69F00", "<"),
    "grown+ewc+subspace": ("#009E73", "v"),
    "grown+distill": ("#CC79A7", "P"),
}
_OTHERS = (("#56B4E9", "X"), ("#F0E442", ">"), ("#882255", "h"), ("#44AA99", "p"))
_LINES = {None: "-", "ars": "--", "paper": ":"}
_DPI = 130


@dataclass(frozen=True)
class Style:
    """Looks of one arm.

    Args:
        colour: of lines and markers.
        marker: of its models.
        line: matplotlib's line style.
        filled: whether the marker is; it is not with a controller.
        label: for the legend, without the strengths of the penalties.
    """

    colour: str
    marker: str
    line: str
    filled: bool
    label: str

    @property
    def face(self) -> str:
        """Colour inside the marker."""
        return self.colour if self.filled else "white"


def styles_of(arms: Sequence[str]) -> dict[str, Style]:
    """The looks of each arm, the same wherever the same arms are drawn.

    Args:
        arms: in the order of the records.
    """
    others: dict[str, tuple[str, str]] = {}
    styles = {}
    for word in arms:
        label = without_strengths(word)
        arm = read_arm(label)
        controller = None if arm is None else arm.controller
        method = label if arm is None else Arm(arm.grown, arm.parts, None).name
        if method in _METHODS:
            colour, marker = _METHODS[method]
        else:
            colour, marker = others.setdefault(method, _OTHERS[len(others) % len(_OTHERS)])
        line = _LINES[controller]
        styles[word] = Style(colour, marker, line, controller is None, label)
    return styles


def polish(axes: Axes) -> None:
    """A light grid behind everything, and numbers on logarithmic axes that do not collide."""
    if axes.get_xscale() == "log":
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", labelsize=8)
    axes.grid(visible=True, which="major", linewidth=0.4, color="#dddddd")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def legend_beside(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend for all panels, to their right, an entry a label."""
    entries: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(
            handles=list(entries.values()),
            labels=list(entries),
            loc="outside right center",
            frameon=False,
            fontsize=8,
            handlelength=3.2,
        )


def png(figure: Figure) -> bytes:
    """The figure as a PNG; equal figures are equal files."""
    content = io.BytesIO()
    # The name of the program and its version would differ from machine to machine.
    figure.savefig(content, format="png", dpi=_DPI, metadata={"Software": None})
    return content.getvalue()


def _power(value: float) -> str:
    digit, exponent = f"{value:.0e}".split("e")
    return f"{digit}e{int(exponent)}" if abs(int(exponent)) > 2 else f"{value:g}"
