"""Pictures of every kind that is read, and broken copies of them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw

ORIENTATION = 0x0112


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def exif(*entries: tuple[int, int, int, bytes], orientation: int = 6) -> bytes:
    """A block with an orientation and (tag, type, count, value) entries; values longer than four bytes come after them."""
    rows = [(ORIENTATION, 3, 1, struct.pack("<H", orientation)), *entries]
    start = 8 + 2 + 12 * len(rows) + 4
    table, after = struct.pack("<H", len(rows)), b""
    for tag, kind, count, value in rows:
        if len(value) > 4:
            table += struct.pack("<HHII", tag, kind, count, start + len(after))
            after += value
        else:
            table += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
    return b"Exif\0\0II*\0\x08\0\0\0" + table + struct.pack("<I", 0) + after


#: Whole pictures with entries that pillow cannot write again: text, no values, a ratio over 0, a tag of a type that is unknown.
ODD_ENTRIES = (
    (0x011A, 2, 3, b"72\0"),
    (0x0128, 2, 2, b"2\0"),
    (0x0100, 2, 4, b"abc\0"),
    (0x011A, 5, 1, struct.pack("<II", 1, 0)),
    (0x8769, 4, 1, struct.pack("<I", 0xFFFFFF)),
    (0x8825, 2, 4, b"gps\0"),
    (0x9286, 7, 9, b"ASCII\0\0\0x"),
    (0x9999, 77, 3, b"abc"),
    (0x010E, 2, 0, b""),
    (0x0201, 4, 1, struct.pack("<I", 12)),
)


def png16(colour: int, channels: int) -> bytes:
    """A PNG of 16 bits a channel of PNG's own colour type."""
    values = np.full((4, 4, channels), 0x80FF, ">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in values)
    head = struct.pack(">IIBBBBB", 4, 4, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", head), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    )


def whole() -> list[bytes]:
    """Whole pictures of all formats and modes."""
    random = np.random.default_rng(0)
    colour = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    ImageDraw.Draw(colour).rectangle((2, 2, 7, 6), fill=(200, 30, 90))
    grey = colour.convert("L")
    out = [saved(colour, kind, exif=exif(entry)) for kind in ("JPEG", "PNG", "WEBP") for entry in ODD_ENTRIES]
    out += [saved(image.convert(mode), "PNG") for image, mode in ((grey, "1"), (grey, "LA"), (colour, "P"), (colour, "RGBA"))]
    out += [saved(image, kind) for image in (grey, colour) for kind in ("JPEG", "PNG", "BMP", "WEBP")]
    out += [saved(colour.convert("CMYK"), "JPEG"), saved(colour, "JPEG", progressive=True)]
    out += [saved(colour.convert("P"), "PNG", transparency=3), saved(colour.convert("P"), "BMP")]
    out += [saved(colour, "WEBP", lossless=True), saved(colour.convert("RGBA"), "WEBP")]
    out += [saved(colour, kind, save_all=True, append_images=[colour, colour]) for kind in ("PNG", "WEBP")]
    return [*out, png16(0, 1), png16(2, 3), png16(4, 2), png16(6, 4)]


def broken(count: int, seed: int = 0) -> Iterator[bytes]:
    """Copies of these with bytes changed, cut out, put in or cut off, most of them near the beginning."""
    random = np.random.default_rng(seed)
    kinds = whole()
    for number in range(count):
        content = bytearray(kinds[number % len(kinds)])
        for _ in range(random.integers(1, 6)):
            end = len(content) if random.random() < 0.4 else min(len(content), 200)
            place = int(random.integers(end)) if end else 0
            match int(random.integers(5)):
                case 0 | 1:
                    content[place : place + 1] = random.bytes(1)
                case 2:
                    content[place : place + 4] = struct.pack("<I", int(random.choice([0, 1, 2, 255, 2**16, 2**31, 2**32 - 1])))
                case 3:
                    del content[place : place + int(random.integers(1, 9))]
                case _:
                    content[place:place] = random.bytes(int(random.integers(1, 9)))
        if random.random() < 0.1:
            del content[int(random.integers(len(content) + 1)) :]
        if random.random() < 0.8:
            content = _with_sums(content)
        yield bytes(content)


def _with_sums(content: bytearray) -> bytearray:
    """A PNG's chunks with the right sums, so that their contents are looked at."""
    place = 8
    while content[:4] == b"\x89PNG" and place + 12 <= len(content):
        end = place + 8 + int.from_bytes(content[place : place + 4], "big")
        if end + 4 > len(content):
            break
        content[end : end + 4] = struct.pack(">I", zlib.crc32(content[place + 4 : end]))
        place = end + 4
    return content
