"""What a data set holds, in numbers, and the digest that names it."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imm.data.images import ImageData
from imm.data.lazy import LazyPixels

_PART = 1000  # images at a time


def digest(data: ImageData | Tensor | NDArray[np.uint8], labels: Tensor | NDArray[np.integer] | None = None) -> str:
    """A sha256 of decoded pixels and labels, in their order: the same for the same images in any layout, file or storage.

    Hashed are the line ``imm-data 1 DTYPE N C H W`` (of sequences ``N T D``), the values (the last index runs fastest), the
    line ``labels`` or ``no labels``, and the labels as int64; numbers are little-endian. An ImageData with deviations has the
    line ``deviations`` and these before the labels.

    Args:
        data: an ImageData, or images ``[N, C, H, W]`` (uint8 with C = 1 or 3, or floating).
        labels: ``[N]`` integers or None; an ImageData brings its own.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: other shapes or dtypes, or labels beside an ImageData.
    """
    if isinstance(data, ImageData):
        if labels is not None:
            raise ValueError("labels: expected none beside an ImageData, which has its own")
        return _digest(data.pixels, data.deviations, data.labels)
    return _digest(data, None, labels)


def _digest(
    data: Tensor | NDArray[np.uint8] | LazyPixels, deviations: Tensor | None, labels: Tensor | NDArray[np.integer] | None
) -> str:
    pixels: Any = data if isinstance(data, LazyPixels) else torch.as_tensor(data)
    is_bytes = pixels.dtype == torch.uint8
    sequences = pixels.dim() == 3 and pixels.is_floating_point()
    pictures = pixels.dim() == 4 and (pixels.is_floating_point() or (is_bytes and pixels.shape[1] in (1, 3)))
    if not (sequences or pictures):
        raise ValueError(f"data: expected images [N, C, H, W] of uint8 or floating, got {list(pixels.shape)} of {pixels.dtype}")
    dtype = str(pixels.dtype).removeprefix("torch.")
    out = hashlib.sha256(f"imm-data 1 {dtype} {' '.join(map(str, pixels.shape))}\n".encode())
    _update(out, pixels)
    if deviations is not None:
        out.update(b"deviations\n")
        _update(out, deviations)
    if labels is None:
        out.update(b"no labels\n")
        return out.hexdigest()
    numbers = torch.as_tensor(labels)
    if numbers.shape != pixels.shape[:1] or numbers.is_floating_point():
        raise ValueError(f"labels: expected [{len(pixels)}] integers, got {list(numbers.shape)} of {numbers.dtype}")
    out.update(b"labels\n")
    out.update(_little_endian(numbers.long()))
    return out.hexdigest()


def _update(out: hashlib._Hash, values: Tensor | LazyPixels) -> None:
    for part in values.split(_PART):
        out.update(_little_endian(part.view(torch.int16) if part.dtype == torch.bfloat16 else part))


def _little_endian(values: Tensor) -> bytes:
    array = values.detach().cpu().contiguous().numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def summarize(data: ImageData) -> dict[str, Any]:
    """Count, shape, classes, moments and digest of uint8 images.

    Returns:
        What JSON can hold: ``source``, ``count``, ``shape`` (channels, height, width), ``classes``, ``class_names`` (or None),
        ``per_class`` (number in each, or None), ``mean`` and ``std`` (of each channel over all its pixels, on 0..255; the
        population's),
        ``min``, ``max``, ``sha256`` (see :func:`digest`).

    Raises:
        ValueError: images that are not uint8.
    """
    if data.pixels.dtype != torch.uint8 or not len(data):
        raise ValueError(f"data: expected uint8 images, got {len(data)} of {data.pixels.dtype}")
    channels = data.shape[0]
    counts = torch.zeros(channels, 256, dtype=torch.int64)  # exact, whatever the number of pixels
    for part in data.pixels.split(_PART):
        for channel in range(channels):
            counts[channel] += torch.bincount(part[:, channel].flatten(), minlength=256)
    levels = torch.arange(256, dtype=torch.float64)
    total = counts.sum(1)
    mean = (counts * levels).sum(1) / total
    std = ((counts * (levels - mean[:, None]) ** 2).sum(1) / total).sqrt()
    seen = counts.sum(0).nonzero()
    return {
        "source": data.source,
        "count": len(data),
        "shape": list(data.shape),
        "classes": data.num_classes,
        "class_names": None if data.class_names is None else list(data.class_names),
        "per_class": None if data.labels is None else torch.bincount(data.labels, minlength=data.num_classes).tolist(),
        "mean": mean.tolist(),
        "std": std.tolist(),
        "min": int(seen.min()),
        "max": int(seen.max()),
        "sha256": digest(data),
    }
