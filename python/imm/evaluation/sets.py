"""The sets of pictures that are compared, as eight-bit values, with all that is known of how they came about."""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imm.data import ImageData, digest, lazy, load
from imm.data.arrays import MOMENTS
from imm.data.listing import open_files
from imm.data.sources import NoSplitsError, array_notes
from imm.evaluation.statistics import FeatureStatistics, read_moments
from imm.pictures import decode, to_uint8
from imm.seeds import parse_integers

#: What the sampler writes beside its images; the fields that are read are in docs/howto/evaluation.md.
GENERATION_FILE = "generation.json"
GRID_FILE = "grid.png"
#: How a set's values became eight bits, for the protocol.
STORED = "uint8: as stored, or floor(127.5 x + 128) clipped to 0..255"
DECODED = "uint8: of decoded latents, floor(127.5 x + 127.5) clipped to 0..255"


@dataclass(frozen=True)
class PictureSet:
    """Pictures to evaluate, or to compare with.

    Attributes:
        pixels: ``[N, 1 or 3, H, W]`` uint8, of large sets mapped or decoded as they are read (:class:`imm.data.ImageData`).
        labels: ``[N]`` int64 or None. num_classes: 0 without labels. source: where they come from, in words.
        moments: Inception statistics that the file has beside its images (``mu``, ``sigma``), which are the FID's, or None.
        quantisation: how floats became eight bits, in words.
        resize: how they were resized, in words, or None.
        seeds: of generated images in the order of ``pixels``, or None. generation: what the sampler wrote of them, or None.
        notes, left_out: see :class:`imm.data.ImageData`.
    """

    pixels: Any
    labels: Tensor | None
    num_classes: int
    source: str
    resize: str | None = None
    seeds: tuple[int, ...] | None = None
    generation: dict[str, Any] | None = None
    quantisation: str = STORED
    moments: FeatureStatistics | None = None
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    @functools.cached_property
    def digest(self) -> str:
        """:func:`imm.data.digest` of pixels and labels, which reads all of them."""
        return digest(self.pixels, self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one picture."""
        return tuple(self.pixels.shape[1:])


def picture_set(images: Any, labels: Tensor | None = None, source: str = "a tensor", *, decoded: bool = False) -> PictureSet:
    """A set from images.

    Args:
        images: ``[N, 1 or 3, H, W]``, uint8, or floating in [-1, 1], which is quantised as :func:`to_uint8` does.
        labels: ``[N]`` integers >= 0, or None. source: in words. decoded: floats come from latents (:func:`to_uint8`).

    Raises:
        ValueError: shapes, no images, values that are not finite.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"images: expected [N, 1 or 3, H, W], got {list(images.shape)}")
    if images.is_floating_point() and not bool(torch.isfinite(images).all()):
        raise ValueError("images: expected finite values in [-1, 1], got NaN or infinity")
    if not images.is_floating_point() and images.dtype != torch.uint8:
        raise ValueError(f"images: expected uint8 or floating values in [-1, 1], got {images.dtype}")
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(f"labels: expected [{len(images)}], got {list(labels.shape)}")
    pixels = to_uint8(images, decoded=decoded).cpu() if images.is_floating_point() else images
    pixels = pixels.cpu() if isinstance(pixels, Tensor) else pixels
    labels = None if labels is None else labels.cpu().long()
    classes = 0 if labels is None else int(labels.max()) + 1
    rule = DECODED if decoded and images.is_floating_point() else STORED
    return PictureSet(pixels, labels, classes, source, quantisation=rule)


def load_set(
    source: str,
    resolution: int | None = None,
    split: str | None = None,
    *,
    transform: str = "none",
    channels: int | None = None,
    skip_broken: bool = False,
) -> PictureSet:
    """Pictures from what ``imm sample`` wrote, or from any source of :func:`imm.data.load`.

    A folder with the sampler's generation.json is read in the order of the seeds, with or without sub-folders of a thousand;
    its picture of all (grid.png) is left out. Any other folder is a source of ``--data``, however its pictures are named.

    Args:
        source: the folder, or a source of ``--data``. resolution: side to resize to, antialiased; never of generated images.
        split: which one of a source that has several; of another it only says what the images are.
        transform, channels, skip_broken: see :func:`imm.data.load`; not for generated images, which are taken as they are.

    Raises:
        ValueError, FileNotFoundError: with what was expected and what came.
    """
    folder = Path(source)
    if (folder / GENERATION_FILE).is_file():
        return _generated(folder, seed_files(folder), resolution)
    load_as = partial(load, source, resolution, transform=transform, channels=channels, skip_broken=skip_broken)
    try:
        data = load_as(split=split)
    except NoSplitsError:
        data = load_as()
    out = set_of(data, resolution, transform, channels)
    moments = read_moments(folder) if folder.is_file() and folder.suffix == ".npz" else None
    return out if moments is None else replace(out, notes=_notes_with_moments(data.notes), moments=moments)


def set_of(data: ImageData, resolution: int | None, transform: str, channels: int | None) -> PictureSet:
    """The set of images that were loaded with these arguments of :func:`imm.data.load`. Raises ValueError for latents."""
    out = picture_set(data.pixels, data.labels, data.source)
    resize = _resize(resolution, transform, channels)
    return replace(out, num_classes=data.num_classes, resize=resize, notes=data.notes, left_out=data.left_out)


def _notes_with_moments(notes: tuple[str, ...]) -> tuple[str, ...]:
    """The notes on reading a file whose ``mu`` and ``sigma`` are read as well."""
    head = array_notes(["x"])[0][:-1]
    out: list[str] = []
    for note in notes:
        unread = note.removeprefix(head).split(", ") if note.startswith(head) else None
        out += [note] if unread is None else array_notes([name for name in unread if name not in MOMENTS])
    return tuple(out)


def _resize(resolution: int | None, transform: str, channels: int | None) -> str | None:
    """What was done to the pictures, in words, or None."""
    what = [] if transform == "none" else [transform]
    if resolution is not None:
        by = "" if transform == "center-crop-dhariwal" else "bilinear, antialiased, "
        what.append(f"{by}to {resolution}x{resolution} where of another size")
    if channels is not None:
        what.append(f"to {channels} channel{'s' if channels > 1 else ''}")
    return ", ".join(what) or None


def seed_files(folder: Path) -> dict[int, Path]:
    """PNG files by seed: SEED.png, or THOUSANDS/SEED.png, of six digits or more. Raises ValueError for others and for none."""
    out: dict[int, Path] = {}
    with open_files(folder) as files:
        names = files.names
    for name in names:
        path = folder / name
        if path.suffix != ".png" or name == GRID_FILE:
            continue
        seed = int(path.stem) if re.fullmatch(r"\d{6,}", path.stem) else -1
        if seed < 0 or name.split("/")[:-1] not in ([], [f"{seed - seed % 1000:06d}"]) or seed in out:
            raise ValueError(f"images: expected PNG files named by their seeds beside {GENERATION_FILE}, got {path}")
        out[seed] = path
    if not out and any(name.endswith(".npy") for name in names):
        raise ValueError(
            f"images: expected pictures in {folder}, got latents; imm sample once more with --vae=PATH decodes them"
        )
    if not out:
        raise ValueError(f"images: expected PNG files named by their seeds beside {GENERATION_FILE} in {folder}, found none")
    return dict(sorted(out.items()))


def _generated(folder: Path, files: dict[int, Path], resolution: int | None) -> PictureSet:
    seeds = tuple(files)
    generation, labels = _read_generation(folder, seeds)
    paths = list(files.values())

    def picture_of(file: Path) -> np.ndarray[Any, Any]:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise ValueError(f"images: expected a file that can be read, got {file}: {error.strerror}") from error
        return decode(content, str(file)).transpose(2, 0, 1)

    def read(number: int) -> np.ndarray[Any, Any]:
        picture = picture_of(paths[number])
        if picture.shape != shape:
            raise ValueError(f"images: expected one size, got {list(shape)} and {list(picture.shape)} ({paths[number]})")
        return picture

    shape = picture_of(paths[0]).shape
    if resolution is not None and shape[1:] != (resolution, resolution):
        size = f"{shape[2]}x{shape[1]}"
        raise ValueError(f"resolution: expected that of the generated images, {size}, got {resolution}")
    pixels = lazy.LazyPixels(read, (len(paths), *shape), lambda number: paths[number].name)
    # 50,000 pictures of 256 x 256 are 10 GB, of which each process decodes its share.
    large = len(paths) * math.prod(shape) > lazy.LARGE
    out = picture_set(pixels if large else pixels[:], labels, f"{len(seeds)} images in {folder}")
    return replace(out, seeds=seeds, generation=generation)


def _read_generation(folder: Path, seeds: tuple[int, ...]) -> tuple[dict[str, Any] | None, Tensor | None]:
    """The sampler's record without its seeds, and the labels in the order of ``seeds``."""
    path = folder / GENERATION_FILE
    if not path.exists():
        return None, None
    try:
        record = json.loads(path.read_text())
        own = parse_integers(record.pop("seeds"), "seeds")
        text, classes = record.get("labels"), record.get("classes")
        # Repeated over the seeds in the order in which they were asked for.
        if text == "all in turn":
            labels = list(range(classes or 0))
        else:
            labels = parse_integers(text, "labels") if text is not None else []
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: expected what imm sample writes, got {type(error).__name__}: {error}") from error
    if sorted(own) != list(seeds):
        odd = sorted(set(own) ^ set(seeds)) or sorted(own)
        raise ValueError(
            f"{path}: expected the seeds of the {len(seeds)} images beside it, got {len(own)} seeds; "
            f"{odd[0]} is not in both, so the run is not finished, or not all images are of it"
        )
    if not labels:
        return record, None
    by_seed = {seed: labels[i % len(labels)] for i, seed in enumerate(own)}
    return record, torch.tensor([by_seed[seed] for seed in seeds])
