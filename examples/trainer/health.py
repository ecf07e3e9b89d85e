"""Warning signs while a model is trained, each said once."""

import warnings

from ars.regularizers import PenaltyMonitor
from trainer.state import TrainingState
from trainer.step import Update

__all__ = ["Health"]


class Health:
    """Looks at the parts of the loss now and then.

    A penalty above the task's loss, a subspace part above half of it and a penalty that is
    identically 0 are warned of; an importance that has collapsed was, when it was made.

    Args:
        state: whose list of warnings grows.
    """

    def __init__(self, state: TrainingState) -> None:
        self._monitor = PenaltyMonitor()
        self._said = set(state.warnings)

    def look(self, state: TrainingState, update: Update) -> list[str]:
        """Compare the parts; return what has not been said of this model before.

        Args:
            state: of the model.
            update: of its last step.
        """
        kept = state.inheritance
        if kept.penalty is None and update.distillation is None:
            return []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            penalty = 0.0 if update.distillation is None else float(update.distillation)
            if kept.penalty is not None:
                penalty += float(state.optimizer.shown()["penalty"])
            self._monitor.observe(update.loss, penalty, kept.subspace_value())
        found = [str(warning.message) for warning in caught]
        new = [text for text in found if text not in self._said]
        self._said.update(new)
        state.warnings += new
        return new
