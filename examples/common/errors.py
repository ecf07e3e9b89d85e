"""The ways a program ends early, each reported to the user as one line."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "DamagedError", "DivergedError", "RunInterruptedError", "UsageError", "one_line",
    "understanding",
]  # fmt: skip

_NO_MEMORY = ("can't allocate memory", "out of memory")  # torch raises a plain RuntimeError


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


@contextmanager
def understanding(label: str, remedy: str, verdict: str = "damaged") -> Iterator[None]:
    """Say in one line what is wrong with a file whose content is read or used.

    Args:
        label: names the file.
        remedy: what the user should do; ends the message.
        verdict: what the file is if its content is wrong.

    Raises:
        DamagedError: the content is not what it should be.
        UsageError: the file cannot be read, which says nothing about what is in it.
    """
    try:
        yield
    except (UsageError, RunInterruptedError):
        raise
    except OSError as error:
        raise UsageError(f"{label} cannot be read ({error.strerror or error}): {remedy}") from None
    except Exception as error:  # of a damaged file's parts, nearly anything can be asked in vain
        if isinstance(error, MemoryError) or any(word in str(error) for word in _NO_MEMORY):
            raise UsageError(f"{label} cannot be read (out of memory): free some") from None
        raise DamagedError(f"{label} is {verdict} ({one_line(error)}): {remedy}") from None


def one_line(error: Exception) -> str:
    """What an error says, short and on one line."""
    said = " ".join(str(error).split())
    if isinstance(error, KeyError):
        said = f"it lacks {said}"
    elif not isinstance(error, ValueError):
        said = f"{type(error).__name__}: {said}"
    return said if len(said) <= 200 else f"{said[:200]}..."
