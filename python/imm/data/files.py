"""The files of a data set by name: a folder, a zip or a tar. Nothing is unpacked to disk, and what is read is bounded."""

from __future__ import annotations

import gzip
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Files:
    """Files of ``path`` by their names below it (sorted, with "/" between), hidden ones left out.

    ``read`` gives the bytes of one and raises ValueError for one that is broken or too large.
    """

    path: Path
    names: list[str]
    read: Callable[[str], bytes]


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
    found = (p.relative_to(path) for p in path.rglob("*") if p.is_file())

    def read(name: str) -> bytes:
        file = path / name
        try:
            _check_size(file.stat().st_size, str(file))
            return file.read_bytes()
        except OSError as error:
            raise ValueError(f"data: expected a file that can be read, got {file}: {error}") from error

    return Files(path, sorted(p.as_posix() for p in found if not _hidden(p.as_posix())), read)


def _zip(path: Path) -> Iterator[Files]:
    try:
        archive = zipfile.ZipFile(path)
    except _BROKEN as error:
        raise ValueError(f"data: expected a whole zip file, got {path}: {error}") from error
    with archive:
        members: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            if not info.is_dir():
                _add(members, info.filename, info, path)

        def read(name: str) -> bytes:
            info = members[name]
            _check_size(info.file_size, f"{name} of {path}")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
                raise ValueError(f"data: expected stored or deflated files without a password in {path}, got {name}")
            try:
                return archive.read(info)
            except (*_BROKEN, NotImplementedError) as error:
                raise ValueError(f"data: expected a whole zip file, got {path}: {name}: {error}") from error

        yield Files(path, sorted(members), read)


class _BoundedGzip(gzip.GzipFile):
    """Refuses to unpack a large part at once, which a header of a hostile tar may ask for."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_FILE:
            raise tarfile.ReadError(f"a part of {size} bytes")
        return super().read(size)


def _tar(path: Path) -> Iterator[Files]:
    with open(path, "rb") if path.suffix == ".tar" else _BoundedGzip(path) as stream:
        members: dict[str, tarfile.TarInfo] = {}
        total = 0
        try:
            archive = tarfile.open(fileobj=stream, mode="r:")  # noqa: SIM115  (holds nothing but the stream)
            for count, member in enumerate(archive):
                if member.isreg():
                    _add(members, member.name, member, path)
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
                file = archive.extractfile(members[name])
                assert file is not None  # only regular files are kept
                content = file.read()
            except _BROKEN as error:
                raise ValueError(f"data: expected a whole tar file, got {path}: {name}: {error}") from error
            if len(content) != members[name].size:
                raise ValueError(f"data: expected a whole tar file, got {path}: {name} ends early")
            return content

        yield Files(path, sorted(members), read)


def _add(members: dict[str, _Member], name: str, member: _Member, path: Path) -> None:
    parts = PurePosixPath(name).parts  # without "./"
    if not parts or parts[0].startswith("/") or ".." in parts or "\\" in name:
        raise ValueError(f"data: expected names below {path}, got {name!r}")
    plain = "/".join(parts)
    if plain in members:
        raise ValueError(f"data: expected every name once in {path}, got {plain!r} twice")
    if not _hidden(plain):
        members[plain] = member


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _check_size(size: int, name: str) -> None:
    if size > MAX_FILE:
        raise ValueError(f"data: expected files of at most {MAX_FILE} bytes, got {size} in {name}")
