"""Warning signs while a model is trained, each said once."""

import math
import re
import warnings

from ars.regularizers import PenaltyMonitor
from trainer.state import TrainingState
from trainer.step import Update

__all__ = ["Health", "numbers_apart"]

_NUMBER = re.compile(r"(?<![\w.])-?(?:\d+(?:\.\d+)?(?:e[-+]?\d+)?|inf|nan)(?!\w)")


def numbers_apart(text: str) -> tuple[str, tuple[str, ...]]:
    """A warning's kind, which is its text without numbers, and the numbers.

    Example:
        >>> numbers_apart("the penalty, 5.2, exceeds the task loss, 1e-03")
        ('the penalty, …, exceeds the task loss, …', ('5.2', '1e-03'))
    """
    return _NUMBER.sub("…", text), tuple(_NUMBER.findall(text))


class Health:
    """Looks at the loss and its parts now and then.

    A loss that is no longer a number, a penalty above the task's loss, a subspace part above half
    of it and a penalty that is identically 0 are warned of; an importance that has collapsed was,
    when it was made. Each look sees other numbers, so a warning is known by its kind.

    Args:
        state: whose list of warnings grows, and which takes along what has been seen.
    """

    def __init__(self, state: TrainingState) -> None:
        self._monitor = PenaltyMonitor()
        if state.seen is not None:
            self._monitor.load_state_dict(state.seen)
        self._said = {numbers_apart(text)[0] for text in state.warnings}

    def look(self, state: TrainingState, update: Update, measured: float) -> list[str]:
        """Compare the parts; return what has not been said of this model before.

        Args:
            state: of the model.
            update: of its last step.
            measured: validation bits per byte after it.
        """
        if not math.isfinite(measured):
            return self._new(state, [f"diverged: at step {state.step} its loss is not a number"])
        kept = state.inheritance
        if kept.penalty is None and update.distillation is None:
            return []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            penalty = 0.0 if update.distillation is None else float(update.distillation)
            if kept.penalty is not None:
                penalty += float(state.optimizer.shown()["penalty"])
            self._monitor.observe(update.loss, penalty, kept.subspace_value())
        state.seen = self._monitor.state_dict()
        return self._new(state, [str(w.message) for w in caught])

    def _new(self, state: TrainingState, texts: list[str]) -> list[str]:
        found = {numbers_apart(text)[0]: text for text in texts}
        new = [text for kind, text in found.items() if kind not in self._said]
        self._said |= found.keys()
        state.warnings += new
        return new
