"""The files of a data set by name: a folder, a zip or a tar. Nothing is unpacked to disk, and what is read is bounded.

What cannot be listed (a folder without permission, a broken link) is an error that names it: classes are numbered by what is
there, so that a file left out without a word would change the others' numbers.
"""

from __future__ import annotations

import gzip
import lzma
import os
import stat
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeVar

#: Bytes of one file inside, unpacked, and of a whole array or archive: far above any real one, far below a machine's memory.
MAX_FILE = 2**30
MAX_ARRAY = 2**34
#: Classes of a set: far above any real one; a network has a vector for each.
MAX_CLASSES = 1_000_000
_MAX_TAR_MEMBERS = 10_000
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_Member = TypeVar("_Member", zipfile.ZipInfo, tarfile.TarInfo)
_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError)


#: What systems leave in folders, beside names that begin with a dot: of no use to anyone here.
_JUNK = ("__MACOSX", "@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information", "lost+found")
_JUNK_FILES = ("thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Files:
    """Files of ``path`` by their names below it (sorted, with "/" between), hidden ones left out.

    ``read`` gives the bytes of one and raises ValueError for one that is broken or too large; ``stamp`` what tells whether it
    is still the same file. ``folders`` are the names of all folders, ``notes`` lines on what was left out.
    """

    path: Path
    names: list[str]
    read: Callable[[str], bytes]
    stamp: Callable[[str], str] = lambda name: ""
    folders: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def below(self, folder: str) -> Files:
        """The files in a folder of these."""
        start = f"{folder}/"
        names, folders = (
            [name.removeprefix(start) for name in names if name.startswith(start)] for names in (self.names, self.folders)
        )
        return Files(
            self.path / folder,
            names,
            lambda name: self.read(start + name),
            lambda name: self.stamp(start + name),
            folders,
            self.notes,
        )


@contextmanager
def open_files(path: Path) -> Iterator[Files]:
    """Open a folder, a ``.zip`` or a ``.tar``, ``.tar.gz`` or ``.tgz``.

    Raises:
        ValueError: a broken archive, a name in it twice, or one that leads out of it.
    """
    if path.is_dir():
        yield _folder(path)
    elif path.name.lower().endswith(TAR_SUFFIXES):
        yield from _tar(path)
    else:
        yield from _zip(path)


def gunzip(content: bytes, limit: int, name: str) -> bytes:
    """The content unpacked where it is gzip, as it is otherwise; ValueError where it is broken or above ``limit`` bytes."""
    if content[:2] != b"\x1f\x8b":
        return content
    unpacker = zlib.decompressobj(wbits=31)
    try:
        out = unpacker.decompress(content, limit + 1)
    except zlib.error as error:
        raise ValueError(f"data: expected a whole gzip file, got {name}: {error}") from error
    if len(out) > limit:
        raise ValueError(f"data: expected at most {limit} bytes in {name}, got more")
    if not unpacker.eof:
        raise ValueError(f"data: expected a whole gzip file, got {name}, which ends early")
    return out


def _folder(path: Path) -> Files:
    names, folders, notes = _walk(path)

    def read(name: str) -> bytes:
        file = path / name
        try:
            _check_size(file.stat().st_size, str(file))
            return file.read_bytes()
        except OSError as error:
            raise ValueError(f"data: expected a file that can be read, got {file}: {error.strerror}") from error

    def stamp(name: str) -> str:
        try:
            found = (path / name).stat()
        except OSError:
            return ""
        return f"{found.st_size} {found.st_mtime_ns}"

    return Files(path, sorted(names), read, stamp, sorted(folders), notes)


def _walk(root: Path) -> tuple[list[str], list[str], list[str]]:
    """Names of files and of folders, links followed, and lines on links that lead back to a folder around them.

    Raises:
        ValueError: a folder that cannot be listed, a broken link, or what is neither a file nor a folder.
    """
    names: list[str] = []
    folders: list[str] = []
    back: list[str] = []
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = []
    place = root
    try:
        around = [os.stat(place) for place in (root, *root.resolve().parents)]
        waiting.append(("", frozenset((found.st_dev, found.st_ino) for found in around)))
        while waiting:
            start, above = waiting.pop()
            place = root / start
            with os.scandir(place) as listing:
                entries = list(listing)
            for entry in entries:
                name, place = start + entry.name, root / start / entry.name
                if _hidden(entry.name):
                    continue
                if entry.is_dir():
                    found = entry.stat()
                    own = found.st_dev, found.st_ino
                    if own in above:
                        back.append(name)
                        continue
                    folders.append(name)
                    waiting.append((f"{name}/", above | {own}))
                elif entry.is_file():
                    names.append(name)
                elif entry.is_symlink():
                    raise ValueError(f"data: expected links to files and folders, got the broken link {place}")
                else:
                    raise ValueError(f"data: expected files and folders, got {place}, which is neither")
    except OSError as error:
        raise ValueError(f"data: expected a folder that can be listed, got {place}: {error.strerror}") from error
    notes = [f"not followed: {len(back)} links to a folder around them, such as {root / min(back)}"] if back else []
    return names, folders, notes


def _zip(path: Path) -> Iterator[Files]:
    try:
        archive = zipfile.ZipFile(path)
    except _BROKEN as error:
        raise ValueError(f"data: expected a whole zip file, got {path}: {error}") from error
    with archive:
        members: dict[str, zipfile.ZipInfo] = {}
        folders: set[str] = set()
        for info in archive.infolist():
            name = _plain(info.filename, path)
            if name is None:
                continue
            if info.is_dir():
                folders.add(name)
            elif stat.S_ISLNK(info.external_attr >> 16):
                raise _link(name, path)
            else:
                _add(members, name, info, path)

        def read(name: str) -> bytes:
            info = members[name]
            _check_size(info.file_size, f"{name} of {path}")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
                raise ValueError(f"data: expected stored or deflated files without a password in {path}, got {name}")
            try:
                return archive.read(info)
            except (*_BROKEN, NotImplementedError) as error:
                raise ValueError(f"data: expected a whole zip file, got {path}: {name}: {error}") from error

        def stamp(name: str) -> str:
            return f"{members[name].file_size} {members[name].CRC}"

        yield Files(path, sorted(members), read, stamp, _with_parents(folders, members))


class _BoundedGzip(gzip.GzipFile):
    """Refuses to unpack a large part at once, which a header of a hostile tar may ask for."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_FILE:
            raise tarfile.ReadError(f"a part of {size} bytes")
        return super().read(size)


def _tar(path: Path) -> Iterator[Files]:
    with open(path, "rb") if path.suffix.lower() == ".tar" else _BoundedGzip(path) as stream:
        members: dict[str, tarfile.TarInfo] = {}
        originals: dict[str, tarfile.TarInfo] = {}  # of hard links, hidden ones too
        folders: set[str] = set()
        total, one_at_a_time = 0, threading.Lock()
        try:
            archive = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115  (holds nothing but the stream)
            for count, member in enumerate(archive):
                name = _plain(member.name, path)
                original = member if member.isreg() else None
                if member.islnk():
                    original = originals.get(PurePosixPath(member.linkname).as_posix())
                if original is not None:
                    originals[PurePosixPath(member.name).as_posix()] = original
                if name is not None and member.isdir():
                    folders.add(name)
                elif name is not None and original is not None:
                    _add(members, name, original, path)
                elif name is not None:
                    raise _link(name, path)
                total += member.size
                if total > MAX_ARRAY or count >= _MAX_TAR_MEMBERS:
                    raise ValueError(
                        f"data: expected at most {MAX_ARRAY} bytes in {_MAX_TAR_MEMBERS} files, got more in {path}"
                    )
            while part := stream.read(2**20):  # to the end, where gzip's checksum is
                total += len(part)
                if total > MAX_ARRAY:
                    raise ValueError(f"data: expected at most {MAX_ARRAY} bytes, got more in {path}")
        except _BROKEN as error:
            raise ValueError(f"data: expected a whole tar file, got {path}: {error}") from error

        def read(name: str) -> bytes:
            _check_size(members[name].size, f"{name} of {path}")
            try:
                with one_at_a_time:  # they share the stream
                    file = archive.extractfile(members[name])
                    assert file is not None  # only regular files are kept
                    content = file.read()
            except _BROKEN as error:
                raise ValueError(f"data: expected a whole tar file, got {path}: {name}: {error}") from error
            if len(content) != members[name].size:
                raise ValueError(f"data: expected a whole tar file, got {path}: {name} ends early")
            return content

        def stamp(name: str) -> str:
            return f"{members[name].size} {members[name].mtime}"

        yield Files(path, sorted(members), read, stamp, _with_parents(folders, members))


def _plain(name: str, path: Path) -> str | None:
    """A member's name without "./"; None for one that is hidden, or the top itself."""
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or (not parts and not name.startswith(".")):
        raise ValueError(f"data: expected names below {path}, got {name!r}")
    plain = "/".join(parts)
    return plain if parts and not _hidden(plain) else None


def _add(members: dict[str, _Member], name: str, member: _Member, path: Path) -> None:
    if name in members:
        raise ValueError(f"data: expected every name once in {path}, got {name!r} twice")
    members[name] = member


def _link(name: str, path: Path) -> ValueError:
    return ValueError(
        f"data: expected files and folders in {path}, got {name}, a link or a device; pack it again with the files that links "
        "point to (tar --dereference, zip without -y)"
    )


def _with_parents(folders: set[str], names: Iterable[str]) -> list[str]:
    """All folders: archives need not list the ones that hold something."""
    parents = {str(parent) for name in {*folders, *names} for parent in PurePosixPath(name).parents}
    return sorted((folders | parents) - {"."})


def _hidden(name: str) -> bool:
    parts = name.split("/")
    return any(part.startswith(".") or part in _JUNK for part in parts) or parts[-1].lower() in _JUNK_FILES


def _check_size(size: int, name: str) -> None:
    if size > MAX_FILE:
        raise ValueError(f"data: expected files of at most {MAX_FILE} bytes, got {size} in {name}")
