"""Writing a data set: a zip or a folder of PNGs with ``dataset.json``, an npz file, or an npz file of latents.

The same images give the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from imm.data.images import to_float
from imm.data.pictures import TRANSFORMS, Picture, encode
from imm.data.sources import LABELS_FILE, Source
from imm.latents import encode as encode_latents


def check_request(dest: str, resolution: int | None, transform: str, source: str | None = None) -> None:
    """Refuse a request that cannot be met before anything is read.

    Raises:
        ValueError: a destination that cannot be written, is the source, or is a folder with something in it; a transform that
            is unknown or lacks its resolution.
    """
    path = Path(dest)
    if source is not None and path.resolve() == Path(source).resolve():
        raise ValueError(f"dest: expected another place than the source, got {dest}")
    if _is_folder(path):
        if path.suffix:
            raise ValueError(f"dest: expected a .zip or .npz file or a folder without an ending, got {dest}")
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise ValueError(f"dest: expected a new or an empty folder, got {dest}")
    elif path.is_dir():
        raise ValueError(f"dest: expected a file, got the folder {dest}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"dest: expected a folder that can be written to, got {path.parent}")
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
    dest: str,
    *,
    resolution: int | None = None,
    transform: str = "none",
    numbers: list[int] | None = None,
    on_image: Callable[[int], object] | None = None,
) -> None:
    """Write images and labels to ``dest``, atomically: afterwards it is whole, or as it was.

    Args:
        source: from :func:`imm.data.sources.open_source`.
        dest: ``*.npz``: arrays ``images`` ``[N, H, W, C]`` uint8 and, with labels, ``labels`` ``[N]`` int64. ``*.zip``: PNGs
            ``00000/img00000000.png``, ..., a thousand a folder, stored, and ``dataset.json``. Otherwise a folder of the same.
        resolution, transform: see :func:`imm.data.pictures.fit`.
        numbers: of the images to write; all by default. on_image: called with 1 after each.

    Raises:
        ValueError: see :func:`check_request`, and what reading raises.
    """
    path = Path(dest)
    check_request(dest, resolution, transform)
    chosen = list(range(source.count)) if numbers is None else numbers
    labels = None if source.labels is None else source.labels[chosen]

    def pictures() -> Iterator[Picture]:
        for picture in source.pictures(resolution, transform, chosen):
            yield picture
            if on_image is not None:
                on_image(1)

    try:
        with _replacing(path) as part:
            if path.suffix == ".npz":
                _write_npz(part, pictures(), len(chosen), labels)
            elif path.suffix == ".zip":
                with zipfile.ZipFile(part, "w") as archive:
                    _write_files(pictures(), labels, lambda name, content: archive.writestr(_member(name), content))
            else:
                _write_files(pictures(), labels, lambda name, content: _write_file(part / name, content))
    except OSError as error:
        raise ValueError(f"dest: cannot write {dest}: {error}") from error


def write_latents(
    source: Source,
    dest: str,
    vae: Any,
    *,
    resolution: int | None = None,
    transform: str = "none",
    numbers: list[int] | None = None,
    batch: int = 8,
    on_image: Callable[[int], object] | None = None,
) -> None:
    """Write the posteriors of images' latents to ``dest``, atomically.

    Args:
        dest: ``*.npz``: arrays ``latents_mean`` and ``latents_std`` ``[N, C, h, h]`` float16, scaled as
            :func:`imm.latents.encode` does, and, with labels, ``labels`` ``[N]`` int64. All of it is in memory until the end.
        vae: from :func:`imm.latents.load_vae`. batch: images encoded at a time. The rest: as for :func:`write`.

    Raises:
        ValueError: see :func:`check_request`, and what reading and encoding raise; latents that float16 does not hold.
    """
    path = Path(dest)
    check_request(dest, resolution, transform)
    if path.suffix != ".npz":
        raise ValueError(f"dest: expected an .npz file for latents, got {dest}")
    chosen = list(range(source.count)) if numbers is None else numbers
    arrays: list[np.ndarray] = []  # means and deviations
    done = 0
    pictures = source.pictures(resolution, transform, chosen)
    while part := list(islice(pictures, batch)):
        images = to_float(torch.from_numpy(np.stack(part)).permute(0, 3, 1, 2))
        posteriors = [values.cpu().numpy().astype(np.float16) for values in encode_latents(images, vae, batch)]
        if not all(np.isfinite(values).all() for values in posteriors):
            raise ValueError(
                f"vae: expected latents that float16 holds, got others for images {done} to {done + len(part) - 1}"
            )
        arrays = arrays or [np.empty((len(chosen), *values.shape[1:]), np.float16) for values in posteriors]
        for array, values in zip(arrays, posteriors, strict=True):
            array[done : done + len(part)] = values
        done += len(part)
        if on_image is not None:
            on_image(len(part))
    named = dict(zip(("latents_mean", "latents_std"), arrays, strict=True))
    if source.labels is not None:
        named["labels"] = source.labels[chosen]
    try:
        with _replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
            for name, array in named.items():
                with archive.open(_member(f"{name}.npy"), "w", force_zip64=True) as member:
                    _write_header(member, array.shape, array.dtype.newbyteorder("<").str)
                    for row in array:
                        member.write(row.astype(row.dtype.newbyteorder("<"), copy=False).tobytes())
    except OSError as error:
        raise ValueError(f"dest: cannot write {dest}: {error}") from error


def _is_folder(path: Path) -> bool:
    return path.suffix not in (".zip", ".npz")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file or folder beside ``path`` that takes its place at the end, or goes away."""
    part = path.with_name(f".{path.name}.part")  # one name: what a killed run left is overwritten by the next
    shutil.rmtree(part, ignore_errors=True)
    try:
        if _is_folder(path):
            part.mkdir()
        yield part
        if not _is_folder(path):
            with open(part, "rb") as file:
                os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)


def _write_files(pictures: Iterator[Picture], labels: np.ndarray | None, write: Callable[[str, bytes], None]) -> None:
    rows: list[list[str | int]] = []
    for number, picture in enumerate(pictures):
        name = f"{number // 1000:05d}/img{number:08d}.png"
        write(name, encode(picture))
        if labels is not None:
            rows.append([name, int(labels[number])])
    write(LABELS_FILE, json.dumps({"labels": None if labels is None else rows}).encode())


def _write_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


def _member(name: str) -> zipfile.ZipInfo:
    """A stored member without a trace of the time or the system that it was written on."""
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.create_system, info.external_attr = 3, 0o644 << 16
    return info


def _write_npz(path: Path, pictures: Iterator[Picture], count: int, labels: np.ndarray | None) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open(_member("images.npy"), "w", force_zip64=True) as file:
            for number, picture in enumerate(pictures):
                if number == 0:
                    _write_header(file, (count, *picture.shape), "|u1")
                file.write(picture.tobytes())
        if labels is not None:
            with archive.open(_member("labels.npy"), "w") as file:
                _write_header(file, labels.shape, "<i8")
                file.write(labels.astype("<i8").tobytes())


def _write_header(file: IO[bytes], shape: tuple[int, ...], dtype: str) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
