"""The folder a program writes to: made, held against others meanwhile, and watched.

Only the standard library and filelock are imported, so that a program is refused at once.
"""

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from common.errors import UsageError

__all__ = ["LOCK_FILE", "OutputFolder", "check_writable", "put_aside"]

LOCK_FILE = ".lock"  # of a running program, or of one that was killed, which no longer holds it

# What file systems without locks say to one, such as some that lie on another machine.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


class OutputFolder:
    """A folder that one program at a time writes to.

    A context manager: its end lets go of the folder, and of a folder that has nothing in it, but
    was made by `hold`, nothing is left. The operating system lets go where a program is killed.

    Args:
        path: may or may not exist.

    Example:
        >>> with OutputFolder(Path("out/doctest")) as output:
        ...     output.hold()
        ...     output.check()
        >>> Path("out/doctest").exists()
        False
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: FileLock | None = None
        self._identity: tuple[int, int] | None = None
        self._made: list[Path] = []

    def hold(self) -> None:
        """Make the folder, and let no other program hold it until the end.

        Raises:
            UsageError: another program holds it, or it cannot be made or written to.
        """
        check_writable(self.path)
        self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        # Not of one thread: the interpreter may close it from another.
        lock = FileLock(self.path / LOCK_FILE, thread_local=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise UsageError(
                f"--out {self.path} is being written to by another run: wait for it to end, or "
                "name another folder"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(
                f"warning: {self.path} is on a file system without locks: let no other run write "
                "to it meanwhile",
                file=sys.stderr,
            )
            return
        self._lock, self._identity = lock, _identity(self.path / LOCK_FILE)

    def check(self) -> None:
        """See whether the folder is still the one that is held, if one is.

        Raises:
            UsageError: it was removed, or another is in its place.
        """
        if self._identity is not None and _identity(self.path / LOCK_FILE) != self._identity:
            raise UsageError(
                f"{self.path} was removed or replaced while it was written to: what was in it is "
                "lost; run the same command again"
            )

    def __enter__(self) -> "OutputFolder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            # Before the lock is let go of: who opened the file meanwhile finds it gone and retries.
            if _identity(self.path / LOCK_FILE) == self._identity:
                (self.path / LOCK_FILE).unlink()
            self._lock.release()
            self._lock = self._identity = None
        with suppress(OSError):  # what is not empty stays
            for path in self._made:
                path.rmdir()


def check_writable(folder: Path, option: str = "--out") -> None:
    """Check that a folder exists or can be created, and may be written to.

    Args:
        folder: nothing is written to it.
        option: that named it.

    Raises:
        UsageError: it cannot be.
    """
    try:
        os.fsencode(folder)
        named = "\0" not in str(folder)
    except UnicodeEncodeError:
        named = False
    if not named:
        raise UsageError(f"{option} {str(folder)!r} is a name that no folder can have: use another")
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UsageError(
            f"{option} {folder} cannot be created, {existing} is a file: name a folder"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {folder} is not writable: name a folder you may write to")


def put_aside(path: Path) -> Path:
    """Give a damaged file a name of its own, which is returned: nothing is overwritten."""
    number = 0
    while True:
        aside = path.with_name(f"{path.name}.damaged{number or ''}")
        if not aside.exists():
            os.replace(path, aside)
            return aside
        number += 1


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from all others that there are; ``None`` if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
