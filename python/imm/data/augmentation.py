"""Geometric augmentation of images, with labels for the network (Karras et al. 2022, appendix F.2), as the paper's on CIFAR-10.

An image is mirrored, scaled, turned, stretched and moved by eight numbers, each group of them 0 unless drawn; nine functions of
these go to the network, so that what it learns of augmented images does not leak into samples, which are made with nine zeros.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

#: Numbers of an image's augmentation that the network is given.
LABELS = 9
#: Smallest height and width: the margins are mirrored from inside.
SMALLEST = 8
#: log2 of the scale and of the stretch at one standard deviation, and the shift in image sides there.
_SCALE, _STRETCH, _SHIFT = 0.2, 0.2, 1 / 8
#: The symlet of 12 taps, an orthonormal low-pass: filtering up to twice the resolution and back gives the image again.
_FILTER = (
    0.0154041093270425,
    0.0034907120842147,
    -0.1179901111485177,
    -0.0483117425856638,
    0.4910559419280138,
    0.7876411410286458,
    0.3379294217281288,
    -0.0726375227863961,
    -0.0210602925123707,
    0.0447249017707803,
    0.0017677118642508,
    -0.0078007083250334,
)
#: Where in the filter's output a pixel's centre lies: its first moment.
_CENTRE = sum(i * h for i, h in enumerate(_FILTER)) / sum(_FILTER)
#: Pixels past the edges that are read as they lie, which the way back needs of an image that does not move; and those mirrored
#: at each edge for that and for the filter's taps.
_REACH, _MARGIN = 3, 6
#: Images that are resampled at once; each takes some 20 times its own memory.
_AT_A_TIME = 256


def augment(images: Tensor, probability: float, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Images transformed at random, and what to tell the network.

    Args:
        images: ``[B, C, H, W]``, floating, H and W at least 8.
        probability: of each transformation but mirroring: left to right is one half, top to bottom half of ``probability``.
        generator: on the images' device; None for torch's default one.

    Returns:
        images of the same shape and dtype, and ``[B, 9]`` float32 (see :func:`labels`).

    Raises:
        ValueError: images of another shape or dtype, a probability outside [0, 1].
    """
    transforms = draw(len(images), probability, images.device, generator)
    return transform(images, transforms), labels(transforms)


def draw(
    count: int, probability: float, device: torch.device | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """``[count, 8]`` float32, a0 to a7 of the reference's table 6, 0 where a transformation is not drawn.

    a0, a1: mirrored left to right, top to bottom (0 or 1). a2: scaled by 2^(0.2 a2). a3: turned anticlockwise, in radians.
    a4, a5: stretched by 2^(0.2 a5) along the direction a4, anticlockwise from the right, and shrunk as much across it. a6, a7:
    moved right and down by eighths of the image's sides. a0 is 0 or 1 for every image alike; the others are drawn with
    ``probability``, a4 with a5 and a6 with a7, a1 then being 0 or 1 alike. Half of the stretches, whatever the probability,
    are along the axes: a4 = 0.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability: expected a number in [0, 1], got {probability}")

    def uniform(columns: int) -> Tensor:
        return torch.rand(count, columns, dtype=torch.float32, device=device, generator=generator)

    normal = torch.randn(count, 4, dtype=torch.float32, device=device, generator=generator)
    mirrored = (uniform(2) < 0.5).float()
    turned, direction = ((2 * uniform(2) - 1) * math.pi).unbind(1)
    scaled, stretched, right, down = normal.unbind(1)
    direction = torch.where(uniform(1)[:, 0] < 0.5, 0.0, direction)
    each = torch.stack([*mirrored.unbind(1), scaled, turned, direction, stretched, right, down], 1)
    drawn = uniform(5) < probability  # top to bottom, scale, turn, stretch, shift
    always = torch.ones_like(drawn[:, :1])
    # A list of columns would be copied to the device, which waits for it.
    return each * torch.cat([always, drawn[:, :3], drawn[:, 3:].repeat_interleave(2, 1, output_size=4)], 1)


def labels(transforms: Tensor) -> Tensor:
    """``[B, 9]``: a0, a1, a2, cos a3 - 1, sin a3, a5 cos a4, a5 sin a4, a6, a7; zeros for an image as it is."""
    a0, a1, a2, a3, a4, a5, a6, a7 = transforms.unbind(1)
    return torch.stack([a0, a1, a2, a3.cos() - 1, a3.sin(), a5 * a4.cos(), a5 * a4.sin(), a6, a7], 1)


def transform(images: Tensor, transforms: Tensor) -> Tensor:
    """``images`` ``[B, C, H, W]`` after ``transforms`` ``[B, 8]`` in their order; what comes in from outside is mirrored.

    Sampled bilinearly at twice the resolution between two passes of a low-pass filter, in float32 or wider; what is at most
    mirrored is exact.
    """
    if images.dim() != 4 or not images.is_floating_point() or min(images.shape[2:]) < SMALLEST:
        raise ValueError(
            f"images: expected a floating [B, C, H, W] with H and W of at least {SMALLEST}, "
            f"got {list(images.shape)} of {images.dtype}"
        )
    a0, a1, a2, a3, _, a5, a6, a7 = transforms[:, :, None, None, None].unbind(1)
    images = torch.where(a0.bool(), images.flip(3), images)
    images = torch.where(a1.bool(), images.flip(2), images)
    moved = (a2 != 0) | (a3 != 0) | (a5 != 0) | (a6 != 0) | (a7 != 0)
    parts = zip(images.split(_AT_A_TIME), transforms.split(_AT_A_TIME), strict=True)
    return torch.where(moved, torch.cat([_resampled(*part) for part in parts]), images)


def _resampled(images: Tensor, transforms: Tensor) -> Tensor:
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    dense = _upsampled(F.pad(wide, [_MARGIN] * 4, mode="reflect"))
    grid = _sources(transforms, images.shape[2], images.shape[3]).to(dense.dtype)
    return _downsampled(F.grid_sample(dense, grid, align_corners=True)).to(images.dtype)


def _sources(transforms: Tensor, height: int, width: int) -> Tensor:
    """``[B, 2 height + 10, 2 width + 10, 2]``: where :func:`_downsampled`'s input is in the upsampled, padded image (x, y)."""
    _, _, a2, a3, a4, a5, a6, a7 = (a[:, None, None] for a in transforms.unbind(1))

    def along(size: int) -> Tensor:  # pixels from the image's centre
        samples = torch.arange(2 * size + len(_FILTER) - 2, dtype=transforms.dtype, device=transforms.device)
        return (samples - _CENTRE) / 2 - (size - 1) / 2

    y, x = along(height)[None, :, None] - _SHIFT * height * a7, along(width)[None, None, :] - _SHIFT * width * a6
    # From the last transformation to the first, each backwards.
    along_direction, across = a4.cos() * x - a4.sin() * y, a4.cos() * y + a4.sin() * x  # y points down
    along_direction, across = along_direction * torch.exp2(-_STRETCH * a5), across * torch.exp2(_STRETCH * a5)
    x, y = a4.cos() * along_direction + a4.sin() * across, a4.cos() * across - a4.sin() * along_direction
    x, y = a3.cos() * x - a3.sin() * y, a3.sin() * x + a3.cos() * y
    shrink = torch.exp2(-_SCALE * a2)

    def place(offset: Tensor, size: int) -> Tensor:
        last = size - 1
        pixel = offset * shrink + last / 2
        inside = pixel.remainder(2 * last)
        inside = torch.minimum(inside, 2 * last - inside)  # mirrored at the centres of the outermost pixels
        pixel = torch.where((pixel + _REACH) * (last + _REACH - pixel) >= 0, pixel, inside)
        sample = 2 * (pixel + _MARGIN) + _CENTRE
        return 2 * sample / (2 * (size + 2 * _MARGIN) + len(_FILTER) - 3) - 1

    return torch.stack(torch.broadcast_tensors(place(x, width), place(y, height)), 3)


def _upsampled(images: Tensor) -> Tensor:
    """``[B, C, H, W]`` -> ``[B, C, 2 H + 10, 2 W + 10]``; pixel i is at 2 i + _CENTRE.

    Tap by tap: convolutions of a GPU might round to TF32.
    """
    for _ in range(2):
        size = images.shape[3]
        wide = images.new_zeros(*images.shape[:3], 2 * size + len(_FILTER) - 2)
        for i, tap in enumerate(_FILTER):
            wide[..., i : i + 2 * size : 2].add_(images, alpha=math.sqrt(2) * tap)
        images = wide.transpose(2, 3)
    return images


def _downsampled(images: Tensor) -> Tensor:
    """The inverse of :func:`_upsampled`, which is orthonormal but for a factor."""
    for _ in range(2):
        size = (images.shape[3] - len(_FILTER) + 2) // 2
        narrow = images.new_zeros(*images.shape[:3], size)
        for i, tap in enumerate(_FILTER):
            narrow.add_(images[..., i : i + 2 * size : 2], alpha=tap / math.sqrt(2))
        images = narrow.transpose(2, 3)
    return images
