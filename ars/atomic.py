"""Files that are whole or as they were, whenever the process that writes them is killed.

A file is written in a folder beside its place, ``.NAME.XXXX.unfinished``, flushed to the disk and
renamed. While it is written the folder is locked, and the lock goes with the process: folders of
killed processes are known by it, and removed by the next one.
"""

import errno
import os
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows: what a killed process has left stays
    fcntl = None  # type: ignore[assignment]

__all__ = ["drop_unfinished", "is_unfinished", "replacing"]

_SUFFIX = ".unfinished"
_LONGEST = 200  # bytes of a name that still leave room for what is added to it


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path to write to; what is there at the end of the block takes the place of ``path``.

    A symbolic link is followed: what it points to is replaced. A file that is replaced hands on its
    mode; a new one has that of any other new file (0666 less the umask). If the block raises, or
    the process is killed, what was at ``path`` is as it was.

    Args:
        path: A regular file, or nothing yet.

    Yields:
        Where the file is to be written.

    Raises:
        FileNotFoundError: The folder that ``path`` is in is missing.
        OSError: There is something else than a regular file at ``path``, or it cannot be written;
            nothing has been changed then.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder, "numbers.txt")) as unfinished:
        ...         _ = unfinished.write_text("1 2 3")
        ...     Path(folder, "numbers.txt").read_text()
        '1 2 3'
    """
    mode = _mode(path)
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        reason = f"cannot write there, as there is no folder {target.parent}"
        raise FileNotFoundError(errno.ENOENT, reason, os.fspath(path))
    drop_unfinished(target.parent, target.name)
    folder, lock = _locked_folder(target)
    try:
        unfinished = folder / "file"
        new = os.open(unfinished, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o666)
        usual = stat.S_IMODE(os.fstat(new).st_mode)
        os.close(new)
        yield unfinished
        with open(unfinished, "rb+") as file:
            # Without this a power cut can keep the rename and lose the bytes.
            os.fsync(file.fileno())
        wanted = usual if mode is None else mode
        if stat.S_IMODE(os.stat(unfinished).st_mode) != wanted:  # some libraries choose their own
            os.chmod(unfinished, wanted)
        os.replace(unfinished, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def drop_unfinished(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes have left of their writing.

    Args:
        folder: Where to look.
        name: Of the file that was to be written; None for any.
    """
    with os.scandir(folder) as entries:
        left = [entry.path for entry in entries if is_unfinished(entry.name, name)]
    for path in left:
        lock = _lock(path)
        if lock is None:  # it is being written, or cannot be known not to be
            continue
        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                os.unlink(path)
        os.close(lock)


def is_unfinished(entry: str, name: str | None = None) -> bool:
    """Whether an entry of a folder is what a file is written in.

    Args:
        entry: Its name.
        name: Of the file that is to be written; None for any.
    """
    prefix = "." if name is None else f".{_short(name)}."
    return entry.startswith(prefix) and entry.endswith(_SUFFIX)


def _mode(path: str | os.PathLike[str]) -> int | None:
    """Return the mode of the regular file at ``path``, None if there is nothing.

    Raises:
        IsADirectoryError: There is a folder.
        OSError: There is something else, or it cannot be looked at.
    """
    try:
        found = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found):
        raise IsADirectoryError(errno.EISDIR, "it is a folder: name a file in it", os.fspath(path))
    if not stat.S_ISREG(found):
        kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(found), "a device")
        reason = f"it is {kind}, which is not replaced: name a regular file"
        raise OSError(errno.EINVAL, reason, os.fspath(path))
    return stat.S_IMODE(found)


def _short(name: str) -> str:
    """Return a name itself, or what stands for one that is too long to be added to."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= _LONGEST else f"{zlib.crc32(encoded):08x}"


def _locked_folder(target: Path) -> tuple[Path, int | None]:
    """Make a folder beside ``target``, and lock it where that can be done."""
    while True:
        made = tempfile.mkdtemp(_SUFFIX, f".{_short(target.name)}.", target.parent)
        lock = _lock(made, wait=True)
        if os.path.isdir(made):
            return Path(made), lock
        if lock is not None:  # between the two it was taken for a killed process's, and removed
            os.close(lock)


def _lock(path: str, *, wait: bool = False) -> int | None:
    """Lock a file or folder until its descriptor is closed; None if that cannot be done."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
