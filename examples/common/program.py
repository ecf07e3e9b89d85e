"""How an example starts, stops and ends: one line and an exit status for whatever stops it.

Only the standard library is imported, so that a missing package is reported like any mistake.
"""

import errno
import io
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import NoReturn

from common.errors import DivergedError, RunInterruptedError, UsageError

__all__ = [
    "QUIET_SECONDS", "Begun", "StopRequest", "command", "drawing_interval", "exit_status",
    "missing_module", "program", "quit_on_signals",
]  # fmt: skip

# The output folder, `None` where the standard output is all that is written to, and the work.
Begun = tuple[Path | None, Callable[[], None]]

QUIET_SECONDS = 1.0  # what takes less, and is no training, is not worth a progress bar
_TERMINAL_SECONDS = 0.2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_OURS = (
    "analysis", "ars", "common", "continual", "corpus", "experiment", "protection", "stress",
    "trainer",
)  # fmt: skip

_DIVERGED = 3
_GONE = "it was removed or replaced meanwhile, run the same command again"
_CLOSED = "make it writable and run the same command again, or name another folder with --out"
_FULL = "make room there and run the same command again, or name another folder with --out"
_REMEDIES = {
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ESTALE), _GONE),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _CLOSED),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
}


def program(begin: Callable[[Sequence[str] | None], Begun]) -> Callable[..., int]:
    """Make the main function of an example: from its imports to its exit status.

    Args:
        begin: imports what the example needs, so that a signal or a missing package in the
            meantime is one line too; reads the words after the program's name, ``None`` for those
            of this process.

    Returns:
        A function of the words, ``None`` without any, that returns the exit status.

    Example:
        >>> @program
        ... def main(argv):
        ...     return None, lambda: print(*argv)
        >>> main(["the", "work"])
        the work
        0
    """

    @wraps(begin)
    def main(argv: Sequence[str] | None = None) -> int:
        quit_on_signals()
        try:
            out, work = begin(argv)
        except ModuleNotFoundError as error:
            return missing_module(error)
        return exit_status(out, work)

    return main


def quit_on_signals(message: str = "interrupted before training: nothing was written") -> None:
    """End at once on SIGINT and SIGTERM, until a run can be stopped in good order.

    Args:
        message: what to say then.
    """

    def leave(signum: int, _frame: FrameType | None) -> None:
        # Not an exception: during the import of an extension module it could end as a traceback.
        os.write(2, f"{message}\n".encode())
        os._exit(128 + signum)

    for number in _SIGNALS:
        signal.signal(number, leave)


def missing_module(error: ModuleNotFoundError) -> int:
    """Say which package to install and return the exit status.

    Args:
        error: what an import raised; one of this project's own is a defect and is raised again.
    """
    if error.name is None or error.name.split(".")[0] in _OURS:
        raise error
    print(
        f"error: the module {error.name} is missing: pip install 'ars-triton[examples]'",
        file=sys.stderr,
    )
    return 2


def command() -> str:
    """Return the command line of this process."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def exit_status(out: Path | None, work: Callable[[], None]) -> int:
    """Do the work and return the exit status.

    Args:
        out: the output folder; ``None`` where the standard output is all that is written to.
        work: what there is to do.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # it may not know every character of a name
            stream.reconfigure(errors="backslashreplace")
    try:
        work()
    except DivergedError as error:
        return _refuse(str(error), _DIVERGED)
    except UsageError as error:
        return _refuse(str(error))
    except OSError as error:
        where = error.filename or out or "the standard output"
        remedy = _REMEDIES.get(error.errno or 0, "mend that and run the same command again")
        return _refuse(f"writing to {where} failed ({error.strerror or error}): {remedy}")
    except RunInterruptedError as stopped:
        # What torchrun was given is not known to the processes that it starts.
        again = "repeat the command" if "WORLD_SIZE" in os.environ else f"run `{command()}` again"
        print(f"interrupted: {again} to resume", file=sys.stderr)
        return 128 + stopped.signum
    return 0


def _refuse(message: str, status: int = 2) -> int:
    print(f"error: {message}".replace("\n", "\\n"), file=sys.stderr)  # also of a name with one
    return status


class StopRequest:
    """Context manager that turns SIGINT and SIGTERM into a question asked at safe points.

    Example:
        >>> with StopRequest() as stop:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     print(stop.requested)
        True
    """

    def __init__(self) -> None:
        self._signum: int | None = None
        self._previous: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self._signum is not None

    def check(self) -> None:
        """Leave the run if a signal has arrived.

        Raises:
            RunInterruptedError: a signal has arrived.
        """
        if self._signum is not None:
            self.leave()

    def leave(self) -> NoReturn:
        """Leave the run, also for a signal that another process of it has got.

        Raises:
            RunInterruptedError: always.
        """
        raise RunInterruptedError(self._signum or signal.SIGTERM)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self._signum is not None:
            os._exit(128 + signum)  # asked twice: the last checkpoint on disk is whole
        self._signum = signum

    def __enter__(self) -> "StopRequest":
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def drawing_interval(in_file: float = 15.0) -> float:
    """Seconds between two drawings.

    Args:
        in_file: the same where standard error is no terminal: in a log file every drawing stays.
    """
    return _TERMINAL_SECONDS if sys.stderr.isatty() else in_file
