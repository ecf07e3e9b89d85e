"""The ways to train a model of the series, each a word that says what it is made of.

    scratch[+muon][+ars | +paper]
    grown[+muon][+ewc[=S]][+subspace[=S]][+distill[=S]][+ars | +paper]

``scratch`` begins with random weights, ``grown`` out of the model before it, function-preserving,
with its whole training state. ``muon`` takes torch's Muon for the matrices of the blocks, and AdamW
for the embedding and the head; ``ewc`` and ``subspace`` are penalties in AdamW's step, ``distill``
one on the predictions, each with a strength S of its own or the run's; ``ars`` and ``paper`` are
this package's controller and the proposal's.

What an arm adds to the operations of a training step is counted from its formulas.

    ewc        5 a parameter     difference, product, gradient, value
    subspace   4 a parameter     difference, mask, gradient, value
    distill    a third of the parent's training operations (its forward pass) on the same tokens
    muon       5 iterations of X <- a X + (b A + c A A) X, A = X X^T, for X of m x n, m <= n:
               5 (4 m^2 n + 2 m^3) a matrix, whatever the batch

AdamW itself, the controller and clipping are left out everywhere: some 20 operations a parameter.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches

from common.command_line import OptionError, number, shortened
from common.errors import UsageError

__all__ = ["GROWTH_OPERATIONS", "Arm", "Shape", "parse_arm", "step_overhead"]

_SCRATCH = ("muon",)
_GROWN = ("muon", "ewc", "subspace", "distill")
_PENALTIES = ("ewc", "subspace")  # of AdamW's step, which beside Muon has no matrix of a block
_CONTROLLERS = ("ars", "paper")
_STRONGEST = 1e12
# Growing multiplies each weight, its two moments and its Fisher information by one factor each.
GROWTH_OPERATIONS = 4
_EWC_OPERATIONS = 5
_SUBSPACE_OPERATIONS = 4
_MUON_ITERATIONS = 5


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        grown: out of the model before it, where there is one.
        parts: what is added, in the order of this module's first lines, and its strength where
            the word names one.
        controller: "ars", "paper" or ``None``.
    """

    grown: bool
    parts: tuple[tuple[str, float | None], ...]
    controller: str | None

    @property
    def name(self) -> str:
        """Its word, such as ``grown+ewc=0.5+ars``."""
        words = ["grown" if self.grown else "scratch"]
        words += [
            part if value is None else f"{part}={_digits(value)}" for part, value in self.parts
        ]
        return "+".join(words if self.controller is None else [*words, self.controller])

    @property
    def root(self) -> "Arm":
        """How the first model of its chain is trained, which has nothing to grow out of."""
        kept = tuple(part for part in self.parts if part[0] in _SCRATCH)
        return Arm(False, kept, self.controller) if self.grown else self

    def has(self, part: str) -> bool:
        """Whether it contains a part."""
        return any(part == name for name, _ in self.parts)

    def strength(self, part: str, default: float) -> float:
        """Strength of a part.

        Args:
            part: that it contains.
            default: the run's.
        """
        own = dict(self.parts)[part]
        return default if own is None else own


def parse_arm(word: str) -> Arm:
    """Read an arm; the order of its parts does not matter.

    Args:
        word: such as ``"grown+ewc+ars"``.

    Raises:
        UsageError: it is none; the message names the nearest part that exists.

    Example:
        >>> parse_arm("grown+ars+subspace+ewc=0.50").name
        'grown+ewc=0.5+subspace+ars'
    """
    first, *words = re.split(r"(?<![\d.][eE])\+", word.strip())  # that of 1e+12 belongs to it
    _check_known(word, first, ("scratch", "grown"))
    allowed = _GROWN if first == "grown" else _SCRATCH
    found: dict[str, float | None] = {}
    for text in words:
        part, _, value = text.partition("=")
        if part in _GROWN and part not in allowed:
            raise UsageError(f"--arms {word}: {part} goes with grown only, not with {first}")
        _check_known(word, part, (*allowed, *_CONTROLLERS))
        if part in found:
            raise UsageError(f"--arms {word}: {part} stands there twice; name it once")
        found[part] = _strength(word, part, value) if "=" in text else None
    without = next((part for part in _PENALTIES if part in found), None)
    if "muon" in found and without is not None:
        raise UsageError(
            f"--arms {word}: {without} is a penalty of AdamW's step, which leaves the blocks to "
            "muon; drop one"
        )
    controllers = [part for part in found if part in _CONTROLLERS]
    if len(controllers) > 1:
        raise UsageError(f"--arms {word}: one controller at a time; drop {controllers[-1]}")
    parts = tuple((part, found[part]) for part in allowed if part in found)
    return Arm(first == "grown", parts, controllers[0] if controllers else None)


def _check_known(word: str, part: str, choices: tuple[str, ...]) -> None:
    if part not in choices:
        near = get_close_matches(part, choices, 1)
        hint = f"did you mean {near[0]}?" if near else f"use {', '.join(choices)}"
        raise UsageError(f"--arms {word}: there is no {part!r}; {hint}")


def _digits(value: float) -> str:
    short = f"{value:g}"
    return (short if float(short) == value else repr(value)).replace("e+", "e")


def _strength(word: str, part: str, text: str) -> float:
    if part not in _GROWN or part in _SCRATCH:
        raise UsageError(f"--arms {word}: {part} takes none, not {shortened(text)}")
    try:
        return number(0, _STRONGEST)(text)
    except OptionError:
        raise UsageError(
            f"--arms {word}: {part} takes a strength from 0 to {_STRONGEST:g}, not "
            f"{shortened(text)}"
        ) from None


@dataclass(frozen=True)
class Shape:
    """Sizes and operations of a model.

    Args:
        params: number of all parameters.
        scaling_params: in matrix products, all but the embedding table.
        flops_per_token: of a training step.
        matrices: (rows, columns) of the matrices inside the blocks.
    """

    params: int
    scaling_params: int
    flops_per_token: int
    matrices: tuple[tuple[int, int], ...]


def step_overhead(
    arm: Arm, shape: Shape, parent: Shape | None, batch_tokens: int, ewc_strength: float
) -> int:
    """Operations a step beyond forward and backward.

    Args:
        arm: how the model is trained.
        shape: of the model.
        parent: of the model it was grown out of, ``None`` for none.
        batch_tokens: tokens a step.
        ewc_strength: the run's; an EWC penalty of strength 0 is not built.

    Example:
        >>> from trainer.arms import parse_arm
        >>> shape = Shape(params=100, scaling_params=80, flops_per_token=480, matrices=((4, 8),))
        >>> step_overhead(parse_arm("scratch+muon"), shape, None, 10, ewc_strength=1.0)
        3200
    """
    total = 0
    if arm.has("ewc") and arm.strength("ewc", ewc_strength) > 0:
        total += _EWC_OPERATIONS * shape.params
    if arm.has("subspace"):
        total += _SUBSPACE_OPERATIONS * shape.params
    if arm.has("distill") and parent is not None:
        total += parent.flops_per_token * batch_tokens // 3
    if arm.has("muon"):
        for rows, columns in shape.matrices:
            m, n = sorted((rows, columns))
            total += _MUON_ITERATIONS * (4 * m * m * n + 2 * m**3)
    return total
