"""How often the device is waited for.

Each wait costs speed, and a report, a signal and a checkpoint that is due all wait for one.
"""

from trainer.parallel import Parallel
from trainer.plan import ModelPlan
from trainer.state import TrainingState

__all__ = ["Pace"]

_MOST_STEPS = 20
_SECONDS = 2.0  # a stretch that took longer is halved: torchrun kills 30 s after a signal


class Pace:
    """Chooses the steps after which the device is waited for, the same in every process.

    On the CPU nothing runs ahead, so that is every step.

    Args:
        state: where training begins.
        plan: of the model, whose last step is waited for.
        parallel: the processes, which agree on the steps.
    """

    def __init__(self, state: TrainingState, plan: ModelPlan, parallel: Parallel) -> None:
        self._last = plan.steps
        self._parallel = parallel
        self._most = 1 if parallel.device.type == "cpu" else _MOST_STEPS
        self._stretch = 1
        self._begun = state.step, state.seconds

    def is_due(self, step: int) -> bool:
        """Whether to wait after this step."""
        return step >= self._begun[0] + self._stretch or step == self._last

    def waited(self, state: TrainingState) -> None:
        """Begin the next stretch, half as long as one that took long and else twice as long.

        Args:
            state: after a step that was waited for, the same step in every process.
        """
        step, seconds = self._begun
        done = state.step - step
        if self._most > 1:
            slow = self._parallel.any(state.seconds - seconds > _SECONDS)
            self._stretch = max(1, done // 2) if slow else min(2 * done, self._most)
        self._begun = state.step, state.seconds
