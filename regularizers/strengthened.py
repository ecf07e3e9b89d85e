"""The strength of a penalty as an attribute that is checked whenever it is set."""

from torch import Tensor

from ars.regularizers.checks import checked_strength

__all__ = ["Strengthened"]


class Strengthened:
    """Gives a penalty its ``strength``."""

    @property
    def strength(self) -> float | Tensor:
        """The strength, in [0, 1e38]; a 0-d tensor is read at every step, where it is."""
        return self._strength

    @strength.setter
    def strength(self, value: float | Tensor) -> None:
        self._strength = checked_strength(value)
