"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``target`` when the block ends well: the old file or the new, never a part.

    The path is in a private folder beside the target, of one name: a block that is killed leaves that folder and nothing else,
    and the next one for the same target removes it. The new file has the old one's mode or, where there is none, that of any
    new file, whatever a library that writes it thinks.

    Raises:
        OSError: the folder cannot be written to, or has no room; it names ``target``.
    """
    folder = target.with_name(f".{target.name}.part")
    try:
        _remove(folder)
        folder.mkdir()
        probe = folder / "mode"
        probe.touch()
        mode = (target if target.exists() else probe).stat().st_mode & 0o777
        part = folder / target.name
        yield part
        part.chmod(mode)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(target)) from error
    finally:
        _remove(folder)


def _remove(path: Path) -> None:
    """What an earlier block left: this one's folder, or the file that earlier versions wrote to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.unlink()
