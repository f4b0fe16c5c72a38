"""What a conversion has done so far, beside its destination, so that the next run resumes.

Two files: ``.NAME.part.zip``, a zip that lacks its end, with a member for each picture; and ``.NAME.part.jsonl``, the journal,
with a line for the request and then one for each picture, done or left out. What a run finds there counts as far as the members
are whole and the lines are those of the pictures that it would write itself; the rest is cut off.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from imm.data.sources import Source
from imm.files import lock, remove_part

_HEADER = struct.Struct("<4s5H3I2H")


class Parts:
    """The pictures done, in order. Made by :func:`open_parts`.

    Attributes:
        kept: numbers of the pictures done. left_out: those left out, with what is wrong. todo: the others.
    """

    def __init__(
        self,
        out: Path,
        request: Mapping[str, Any],
        source: Source,
        numbers: Sequence[int],
        skip_broken: bool,
        multiple: int,
        fits: Callable[[bytes], bool],
        on_image: Callable[[int], object],
    ) -> None:
        self.path, self.journal_path = (out.with_name(f".{out.name}.part.{ending}") for ending in ("zip", "jsonl"))
        self._source, self._total, self._on_image = source, len(numbers), on_image
        self.kept: list[int] = []
        self.left_out: dict[int, str] = {}
        try:
            self._lock = lock(self.journal_path)
        except BlockingIOError as error:
            raise ValueError(f"out: expected a place that no other run writes to, got {out}") from error
        remove_part(self.path.with_suffix(""))  # of an earlier version
        self._journal = self.journal_path.open("r+b")
        self._members: list[zipfile.ZipInfo] = []
        try:
            self.path.touch()
            self._file = self.path.open("r+b")
            self._take_up(request, numbers, skip_broken, multiple)
            if self._members and not fits(self.read(0)):
                self._journal.seek(0)
                self._journal.truncate()
                self.kept, self._members = [], []
                self._take_up(request, numbers, skip_broken, multiple)
        except BaseException:
            with suppress(OSError):
                self._journal.close()
            self._lock.release()
            raise
        self.todo = numbers[len(self.kept) + len(self.left_out) :]

    def _row(self, number: int) -> list[Any]:
        labels = self._source.labels
        label = None if labels is None else int(labels[number])
        return [self._source.name(number), label, self._source.stamp(number)]

    def _take_up(self, request: Mapping[str, Any], numbers: Sequence[int], skip_broken: bool, multiple: int) -> None:
        """Find how far an earlier run came, to a ``multiple`` of pictures done, and cut the files there."""
        head = _head(request)
        journal_end, left_out = len(head), 0
        self._journal.seek(0)
        # What was done before --channels was given stays, if it has as many: see fits.
        known = head, _head({**request, "channels": None})
        whole = _whole_members(self._file) if self._journal.readline() in known else iter(())
        for number in numbers:
            try:
                line = json.loads(self._journal.readline())
                if line[:3] != self._row(number) or (line[3] is not None and not skip_broken):
                    break
            except (ValueError, TypeError, IndexError):
                break
            if line[3] is not None:
                self.left_out[number] = line[3]
                continue
            member = next(whole, None)
            if member is None or member.filename.partition(".")[0] != _stem(len(self._members)):
                break
            self.kept.append(number)
            self._members.append(member)
            if len(self.kept) % multiple == 0:
                journal_end, left_out = self._journal.tell(), len(self.left_out)
        del self.kept[len(self.kept) - len(self.kept) % multiple :]
        del self._members[len(self.kept) :]
        self.left_out = dict(islice(self.left_out.items(), left_out))
        self._journal.seek(0)
        self._journal.write(head)
        self._journal.truncate(journal_end)
        self._journal.seek(journal_end)
        self._file.truncate(self._end())

    def _end(self) -> int:
        return _end_of(self._members[-1]) if self._members else 0

    def append(self, number: int, content: bytes, ending: str) -> None:
        """Keep a picture's bytes as the next member."""
        info = member(_stem(len(self._members)) + ending)
        info.header_offset = self._file.seek(self._end())
        info.CRC, info.compress_size, info.file_size = zlib.crc32(content), len(content), len(content)
        self._file.write(info.FileHeader(zip64=False) + content)
        self._file.flush()
        self._write_line(number, None)
        self._members.append(info)
        self.kept.append(number)
        self._on_image(1)

    def leave_out(self, number: int, text: str) -> None:
        """Keep that a picture is broken."""
        self._write_line(number, text)
        self.left_out[number] = text
        self._on_image(1)

    def _write_line(self, number: int, text: str | None) -> None:
        self._journal.write(json.dumps([*self._row(number), text]).encode() + b"\n")
        self._journal.flush()

    def names(self) -> list[str]:
        """Of the members."""
        return [info.filename for info in self._members]

    def read(self, index: int) -> bytes:
        """The bytes of a member."""
        info = self._members[index]
        self._file.seek(_end_of(info) - info.file_size)
        return self._file.read(info.file_size)

    def finish(self, name: str, content: bytes) -> None:
        """Write another member and the zip's end, which makes the file whole."""
        self._file.seek(self._end())
        with zipfile.ZipFile(self._file, "w") as archive:
            archive.filelist.extend(self._members)
            archive.NameToInfo.update({info.filename: info for info in self._members})
            archive.writestr(member(name), content)
        self._file.flush()
        os.fsync(self._file.fileno())

    def how_far(self) -> str:
        """In words; empty where nothing is done."""
        done = len(self.kept) + len(self.left_out)
        return f"{done} of {self._total} images are done and kept; the same command resumes" if self.kept else ""

    def close(self, keep: bool) -> None:
        """Let go of the files, and remove them unless there is something to ``keep``."""
        with suppress(OSError):  # a full disk fails here once more
            self._file.close()
        if not (keep and self.kept):
            self.path.unlink(missing_ok=True)
            self.journal_path.unlink(missing_ok=True)
        with suppress(OSError):
            self._journal.close()
        self._lock.release()


@contextmanager
def open_parts(
    out: Path,
    request: Mapping[str, Any],
    source: Source,
    numbers: Sequence[int],
    *,
    skip_broken: bool,
    multiple: int = 1,
    fits: Callable[[bytes], bool] = lambda content: True,
    on_image: Callable[[int], object] | None = None,
    say: Callable[[str], object] | None = None,
) -> Iterator[Parts]:
    """What was done of a conversion to ``out`` by the same ``request``; kept where this one fails, and gone after it.

    Args:
        numbers: of the source's pictures, in the order of writing. skip_broken: whether pictures may be left out.
        multiple: resume after a multiple of so many pictures. fits: whether this run would write the first picture done.
        on_image: called with the number of images done. say: gets a line where there was something.

    Raises:
        ValueError: what fails within, with how far it came; another process writes to ``out``.
    """
    try:
        tell = on_image or (lambda count: None)
        parts = Parts(out, request, source, numbers, skip_broken, multiple, fits, tell)
    except OSError as error:
        raise ValueError(f"out: cannot write {out}: {error}") from error
    failed = True
    try:
        if say is not None and parts.kept:
            say(f"resuming after {len(parts.kept) + len(parts.left_out)} of {len(numbers)} images that are done")
        tell(len(numbers) - len(parts.todo))
        yield parts
        failed = False
    except (OSError, ValueError) as error:
        text = f"out: cannot write {out}: {error}" if isinstance(error, OSError) else str(error)
        raise ValueError("; ".join(filter(None, (text, parts.how_far())))) from error
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(parts.how_far()) from error
    finally:
        parts.close(keep=failed)


def member(name: str) -> zipfile.ZipInfo:
    """A stored member without a trace of the time or the system that it was written on."""
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.create_system, info.external_attr = 3, 0o644 << 16
    return info


def _head(request: Mapping[str, Any]) -> bytes:
    """The journal's first line; of one length, so that it can be replaced."""
    return json.dumps(request).encode().ljust(1000) + b"\n"


def _stem(number: int) -> str:
    """The name of a member, a thousand a folder."""
    return f"{number // 1000:05d}/img{number:08d}"


def _end_of(info: zipfile.ZipInfo) -> int:
    return info.header_offset + _HEADER.size + len(info.filename) + info.file_size


def _whole_members(file: Any) -> Iterator[zipfile.ZipInfo]:
    """The members from the file's beginning to the first that is not whole."""
    offset = 0
    while True:
        file.seek(offset)
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size:
            return
        mark, _, _, method, _, _, crc, size, length, name_size, extra = _HEADER.unpack(head)
        if mark != b"PK\3\4" or method or extra or size != length:
            return
        info = member(file.read(name_size).decode("ascii", "replace"))
        content = file.read(size)
        if len(content) != size or zlib.crc32(content) != crc:
            return
        info.header_offset, info.CRC, info.compress_size, info.file_size = offset, crc, size, size
        offset = file.tell()
        yield info
