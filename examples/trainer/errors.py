"""The ways a run ends early, each reported to the user as one line."""

__all__ = ["DamagedError", "DivergedError", "RunInterruptedError", "UsageError"]


class UsageError(Exception):
    """Something the user can put right: the message is one line that says how."""


class DamagedError(UsageError):
    """A file is not what was saved."""


class DivergedError(UsageError):
    """The loss of a model is not a number: the run has ended, and its results say so."""


class RunInterruptedError(Exception):
    """A signal asked the run to stop, and everything needed to resume it is on disk.

    Args:
        signum: number of the signal; the exit status is ``128 + signum``.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum
