"""Writing a data set: a zip or a folder of PNGs with ``dataset.json``, an npz file, or an npz file of latents.

The same images give the same bytes, whether a run was stopped on the way or not.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from imm.data.images import check_channels, check_kept, to_float
from imm.data.parts import Parts, member, open_parts
from imm.data.sources import LABELS_FILE, Source
from imm.files import replacing
from imm.latents import encode as encode_latents
from imm.latents import fingerprint
from imm.pictures import TRANSFORMS, Picture, decode, encode
from imm.version import __version__

#: Bytes before a member's name, and of the extra field of one that may be large; what says that another is padding.
_LOCAL_HEADER, _ZIP64_EXTRA, _PADDING_ID = 30, 20, 0xD935


def check_request(out: str, resolution: int | None, transform: str, source: str | None = None) -> None:
    """Refuse a request that cannot be met before anything is read.

    Raises:
        ValueError: a destination that cannot be written, is the source, or is a folder with something in it; a transform that
            is unknown or lacks its resolution.
    """
    path = Path(out)
    if source is not None and path.resolve() == Path(source).resolve():
        raise ValueError(f"out: expected another place than the source, got {out}")
    if path.suffix not in (".zip", ".npz"):
        if path.suffix:
            raise ValueError(f"out: expected a .zip or .npz file or a folder without an ending, got {out}")
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise ValueError(f"out: expected a new or an empty folder, got {out}")
    elif path.is_dir():
        raise ValueError(f"out: expected a file, got the folder {out}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"out: expected a folder that can be written to, got {path.parent}")
    if transform not in TRANSFORMS:
        raise ValueError(f"transform: expected one of {', '.join(TRANSFORMS)}, got {transform!r}")
    if transform == "center-crop-dhariwal" and resolution is None:
        raise ValueError("transform: expected a resolution for center-crop-dhariwal, got none")


def spread(count: int, at_most: int | None) -> list[int]:
    """``at_most`` numbers of 0, ..., count - 1, evenly spaced, so that sorted classes all stay; all of them for None."""
    kept = count if at_most is None else min(count, at_most)
    return [index * count // kept for index in range(kept)]


def write(
    source: Source,
    out: str,
    *,
    resolution: int | None = None,
    transform: str = "none",
    channels: int | None = None,
    numbers: list[int] | None = None,
    skip_broken: bool = False,
    on_image: Callable[[int], object] | None = None,
    say: Callable[[str], object] | None = None,
) -> list[str]:
    """Write images, labels and class names to ``out``, atomically: afterwards it is whole, or as it was.

    What is done is kept beside it until then (see :mod:`imm.data.parts`): if this fails or is killed, the same call resumes.

    Args:
        source: from :func:`imm.data.sources.open_source`.
        out: ``*.npz``: arrays ``images`` ``[N, H, W, C]`` uint8 and, with labels, ``labels`` ``[N]`` int64 and perhaps
            ``class_names``. ``*.zip``: PNGs ``00000/img00000000.png``, ..., a thousand a folder, stored, and ``dataset.json``.
            Otherwise a folder of the same.
        resolution, transform, channels: see :meth:`imm.data.sources.Source.pictures`.
        numbers: of the images to write; all by default. skip_broken: leave out pictures that cannot be read.
        on_image: called with the number of images done. say: called with a line where an earlier run had begun.

    Returns:
        The pictures left out, a line each.

    Raises:
        ValueError: see :func:`check_request`, and what reading raises, with how far it came.
    """
    path = Path(out)
    check_request(out, resolution, transform)
    check_channels(channels)
    chosen = list(range(source.count)) if numbers is None else numbers
    ending = ".npy" if path.suffix == ".npz" else ".png"
    request = {"ending": ending, "resolution": resolution, "transform": transform, "channels": channels, "imm": __version__}

    def picture_of(content: bytes) -> Picture:
        return decode(content, out) if ending == ".png" else _from_npy(content)

    def fits(content: bytes) -> bool:
        return channels in (None, picture_of(content).shape[2])

    with open_parts(path, request, source, chosen, skip_broken=skip_broken, fits=fits, on_image=on_image, say=say) as parts:
        like = picture_of(parts.read(0)) if parts.kept else None
        on_broken = parts.leave_out if skip_broken else None
        pictures = source.pictures(resolution, transform, parts.todo, channels=channels, like=like, on_broken=on_broken)
        for number, picture in pictures:
            parts.append(number, encode(picture) if ending == ".png" else _to_npy(picture), ending)
        check_kept(parts.kept, parts.left_out)
        labels = None if source.labels is None else source.labels[parts.kept]
        class_names = None if labels is None else source.class_names
        if ending == ".png":
            rows = None if labels is None else [list(row) for row in zip(parts.names(), labels.tolist(), strict=True)]
            table: dict[str, Any] = {"labels": rows}
            if class_names is not None:
                table["class_names"] = list(class_names)
            content = json.dumps(table).encode()
        if path.suffix == ".zip":
            parts.finish(LABELS_FILE, content)
            parts.path.replace(path)
        else:
            with replacing(path) as whole:
                if ending == ".npy":
                    _write_npz(whole, ("images",), parts, lambda index: [picture_of(parts.read(index))], labels, class_names)
                else:
                    for index, name in enumerate(parts.names()):
                        _write_file(whole / name, parts.read(index))
                    _write_file(whole / LABELS_FILE, content)
    return list(parts.left_out.values())


def write_latents(
    source: Source,
    out: str,
    vae: Any,
    *,
    resolution: int | None = None,
    transform: str = "none",
    numbers: list[int] | None = None,
    batch: int = 8,
    skip_broken: bool = False,
    on_image: Callable[[int], object] | None = None,
    say: Callable[[str], object] | None = None,
) -> list[str]:
    """Write the posteriors of images' latents to ``out``, atomically, and resume as :func:`write` does.

    Args:
        out: ``*.npz``: arrays ``latents_mean`` and ``latents_std`` ``[N, C, h, h]`` float16, scaled as
            :func:`imm.latents.encode` does, and, with labels, ``labels`` ``[N]`` int64 and perhaps ``class_names``.
        vae: from :func:`imm.integrations.autoencoder.load_vae`; it gets three channels, grey pictures' repeated.
        batch: images encoded at a time. The rest: as for :func:`write`.

    Raises:
        ValueError: see :func:`check_request`, and what reading and encoding raise; latents that float16 does not hold.
    """
    path = Path(out)
    check_request(out, resolution, transform)
    if path.suffix != ".npz":
        raise ValueError(f"out: expected an .npz file for latents, got {out}")
    chosen = list(range(source.count)) if numbers is None else numbers
    request = {"vae": fingerprint(vae), "batch": batch, "resolution": resolution, "transform": transform, "imm": __version__}
    # By whole batches, so that an image is encoded beside the same others as in a run that was not stopped.
    with open_parts(
        path, request, source, chosen, skip_broken=skip_broken, multiple=batch, on_image=on_image, say=say
    ) as parts:
        shape = _from_npy(parts.read(0)).shape if parts.kept else None
        on_broken = parts.leave_out if skip_broken else None
        pictures = source.pictures(resolution, transform, parts.todo, channels=3, on_broken=on_broken)
        while part := list(islice(pictures, batch)):
            images = to_float(torch.from_numpy(np.stack([picture for _, picture in part])).permute(0, 3, 1, 2))
            posteriors = np.stack([v.cpu().numpy().astype(np.float16) for v in encode_latents(images, vae, batch)], axis=1)
            if not np.isfinite(posteriors).all():
                names = [source.name(number) for number, _ in (part[0], part[-1])]
                raise ValueError(f"vae: expected latents that float16 holds, got others for {names[0]} to {names[1]}")
            for (number, _), values in zip(part, posteriors, strict=True):
                shape = shape or values.shape
                if values.shape != shape:
                    sizes = [list(one[1:]) for one in (shape, values.shape)]
                    raise ValueError(f"data: expected latents of {sizes[0]}, got {sizes[1]} ({source.name(number)})")
                parts.append(number, _to_npy(values), ".npy")
        check_kept(parts.kept, parts.left_out)
        labels = None if source.labels is None else source.labels[parts.kept]
        class_names = None if labels is None else source.class_names
        with replacing(path) as whole:
            names_of_arrays = ("latents_mean", "latents_std")
            _write_npz(whole, names_of_arrays, parts, lambda index: list(_from_npy(parts.read(index))), labels, class_names)
    return list(parts.left_out.values())


def _write_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _to_npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(array), (1, 0), allow_pickle=False)
    return out.getvalue()


def _from_npy(content: bytes) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)


def _write_npz(
    path: Path,
    names: Sequence[str],
    parts: Parts,
    rows: Callable[[int], Sequence[np.ndarray]],
    labels: np.ndarray | None,
    class_names: Sequence[str] | None,
) -> None:
    """Arrays of those names, of which ``rows`` gives the values of a picture; one after the other, nothing in memory."""
    with zipfile.ZipFile(path, "w") as archive:
        for position, name in enumerate(names):
            with archive.open(_aligned(f"{name}.npy", archive.start_dir), "w", force_zip64=True) as file:
                for index in range(len(parts.kept)):
                    row = rows(index)[position]
                    row = row.astype(row.dtype.newbyteorder("<"), copy=False)
                    if index == 0:
                        _write_header(file, (len(parts.kept), *row.shape), row.dtype.str)
                    file.write(row.tobytes())
        for name, values in (("labels", labels), ("class_names", class_names)):
            if values is not None:
                array = np.array(values, "<i8" if name == "labels" else "<U")
                with archive.open(member(f"{name}.npy"), "w") as file:
                    _write_header(file, array.shape, array.dtype.str)
                    file.write(array.tobytes())


def _aligned(name: str, offset: int) -> zipfile.ZipInfo:
    """A member at this offset whose bytes begin at a multiple of 64, as an array's do within them, so that it can be mapped."""
    info = member(name)
    padding = -(offset + _LOCAL_HEADER + len(name) + _ZIP64_EXTRA + 4) % 64
    info.extra = struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
    return info


def _write_header(file: IO[bytes], shape: tuple[int, ...], dtype: str) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
