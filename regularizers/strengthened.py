"""What the penalties have in common: a strength that is checked whenever it is set, a version."""

from torch import Tensor

from ars.regularizers.checks import checked_strength

__all__ = ["Strengthened"]


class Strengthened:
    """Gives a penalty its ``strength`` and its ``version``.

    Attributes:
        version: Another number whenever the penalty has got or lost a tensor: an optimizer that
            holds it then asks for its terms again.
    """

    version = 0

    @property
    def strength(self) -> float | Tensor:
        """The strength, in [0, 1e38]; a 0-d tensor is read at every step, where it is."""
        return self._strength

    @strength.setter
    def strength(self, value: float | Tensor) -> None:
        self._strength = checked_strength(value)
