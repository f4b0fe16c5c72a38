"""Files: written whole or not at all, locked, and known by their digest."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import FileLock

LOCK_FILE = ".lock"


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``target`` when the block ends well: the old file or the new, never a part.

    The block may make a folder there instead, where there is none or an empty one.

    The path is in a private folder beside the target, of one name: a block that is killed leaves that folder and nothing else,
    and the next one for the same target removes it. The new file has the old one's mode or, where there is none, that of any
    new file, whatever a library that writes it thinks.

    Raises:
        OSError: the folder cannot be written to, or has no room; it names ``target``.
    """
    folder = target.with_name(f".{target.name}.part")
    try:
        remove_part(folder)
        folder.mkdir()
        probe = folder / "mode"
        probe.touch()
        mode = (target if target.exists() else probe).stat().st_mode & 0o777
        part = folder / target.name
        yield part
        if not part.is_dir():
            part.chmod(mode)
            with part.open("rb") as file:
                os.fsync(file.fileno())
        part.replace(target)
    except OSError as error:
        if error.filename is not None and not Path(os.fsdecode(error.filename)).is_relative_to(folder):
            raise  # about another file, which the block read
        raise OSError(error.errno, error.strerror or str(error), str(target)) from error
    finally:
        remove_part(folder)


def write_text(target: Path, text: str) -> None:
    """Write a text file with :func:`replacing`, in UTF-8."""
    with replacing(target) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """A file's digest, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def remove_part(path: Path) -> None:
    """Remove what a killed block left: the folder of :func:`replacing`, or the file that earlier versions wrote to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.unlink()


def lock(path: Path, *, shared: bool = False) -> FileLock:
    """Lock a file, which is made if absent, until the lock is released, collected, or its process ends, however it ends.

    On a file system without locks nothing is locked.

    Args:
        shared: with others of this process that ask for the same, who get the same lock.

    Raises:
        BlockingIOError: another has the lock. OSError: the file cannot be written to.
    """
    from filelock import FileLock, Timeout  # here, because imm --help is quick without

    own = FileLock(path, is_singleton=shared, thread_local=False, fallback_to_soft=False)
    if not path.exists():  # a lock that is shared may be of a file that is gone
        own.release(force=True)
    path.touch()
    try:
        own.acquire(blocking=False)
    except Timeout as error:
        raise BlockingIOError(str(error)) from error
    except OSError:
        pass  # a file system without locks
    return own


def lock_folder(folder: Path, *, shared: bool = False) -> FileLock:
    """Lock a folder, which is made if absent, by a file in it, which names the process: see :func:`lock`.

    Raises:
        ValueError: another has the lock, or the folder cannot be written to.
    """
    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = lock(path, shared=shared)
        path.write_text(f"{os.getpid()}\n")
    except BlockingIOError as error:
        who = path.read_text(errors="replace").strip()
        raise ValueError(
            f"out: expected a folder that no other run writes to, got {folder}, where process {who} does"
        ) from error
    except OSError as error:
        raise ValueError(f"out: expected a folder that can be written to, got {folder}: {error}") from error
    return own
