"""One run writes to a folder at a time."""

from __future__ import annotations

import errno
import os
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where folders are not locked
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"


class FolderLock:
    """A lock on ``folder/.lock`` that the system releases when its process ends, however it ends.

    Trainers of one process share it, one after the other: :func:`lock_folder` gives them the same object, and the lock is
    released when the last of them has let go of it.
    """

    def __init__(self, descriptor: int) -> None:
        self._finalizer = weakref.finalize(self, os.close, descriptor)

    def release(self) -> None:
        """Let others in, now."""
        self._finalizer()

    @property
    def held(self) -> bool:
        return self._finalizer.alive


_held: weakref.WeakValueDictionary[tuple[int, int], FolderLock] = weakref.WeakValueDictionary()


def lock_folder(folder: Path, file: str | None = LOCK_FILE) -> FolderLock | None:
    """Lock a folder, which must exist, by a file in it; or by itself (None), also against this process. None without locks.

    Raises:
        ValueError: another process holds it. OSError: the folder cannot be written to.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY) if file is None else os.open(folder / file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        found = os.fstat(descriptor)
        mine = _held.get((found.st_dev, found.st_ino))
        if file is not None and mine is not None and mine.held:
            os.close(descriptor)
            return mine
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if file is not None:
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        who = "another process"
        if file is not None:
            who = f"process {os.pread(descriptor, 20, 0).decode(errors='replace').strip()}"
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise ValueError(f"out: expected a folder that no other run writes to, got {folder}, where {who} does") from error
        return None
    lock = FolderLock(descriptor)
    if file is not None:
        _held[found.st_dev, found.st_ino] = lock
    return lock
