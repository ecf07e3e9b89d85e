"""How an example starts and ends: one line and an exit status for whatever stops it.

Only the standard library is imported, so that a missing package is reported like any mistake.
"""

import errno
import io
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from trainer.errors import DivergedError, RunInterruptedError, UsageError

__all__ = ["command", "exit_status", "missing_module", "quit_on_signals"]


_DIVERGED = 3
_GONE = "it was removed or replaced meanwhile, run the same command again"
_CLOSED = "make it writable and run the same command again, or name another folder with --out"
_FULL = "make room there and run the same command again, or name another folder with --out"
_REMEDIES = {
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ESTALE), _GONE),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _CLOSED),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
}


def quit_on_signals(message: str = "interrupted before training: nothing was written") -> None:
    """End at once on SIGINT and SIGTERM, until a run can be stopped in good order.

    Args:
        message: what to say then.
    """

    def leave(signum: int, _frame: FrameType | None) -> None:
        # Not an exception: during the import of an extension module it could end as a traceback.
        os.write(2, f"{message}\n".encode())
        os._exit(128 + signum)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)


def missing_module(error: ModuleNotFoundError, *own: str) -> int:
    """Say which package to install and return the exit status.

    Args:
        error: what an import raised.
        own: packages of this project, whose absence is a defect and is raised again.
    """
    ours = ("ars", "common", "corpus", "trainer", *own)
    if error.name is None or error.name.split(".")[0] in ours:
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
