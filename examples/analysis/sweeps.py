"""A setting that was tuned: the loss over its values, and whether the best lies inside them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.intervals import Estimate

__all__ = ["Sweep"]


@dataclass(frozen=True)
class Sweep:
    """One setting at one depth.

    Args:
        setting: what was varied, such as "AdamW learning rate".
        depth: of the models.
        values: tried, ascending.
        losses: bits per byte at each, over the seeds.
    """

    setting: str
    depth: int
    values: tuple[float, ...]
    losses: tuple[Estimate, ...]

    @classmethod
    def of(cls, setting: str, depth: int, found: Mapping[float, Sequence[float]]) -> "Sweep":
        """The sweep from the bits per byte of every seed at each value."""
        values = tuple(sorted(found))
        return cls(setting, depth, values, tuple(Estimate.of(found[v]) for v in values))

    @property
    def best(self) -> float:
        """The value of the least mean loss."""
        return min(zip(self.losses, self.values, strict=True), key=lambda pair: pair[0].mean)[1]

    @property
    def at_edge(self) -> bool:
        """Whether the best is the first or last value, so that a better one may lie beyond.

        Nothing lies beyond 0, which is to do without.
        """
        return self.best != 0 and self.best in (self.values[0], self.values[-1])

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps."""
        return {
            "setting": self.setting,
            "depth": self.depth,
            "values": list(self.values),
            "val_bpb": [loss.mean for loss in self.losses],
            "seeds": len(self.losses[0].values),
            "best": self.best,
            "at_edge": self.at_edge,
        }
