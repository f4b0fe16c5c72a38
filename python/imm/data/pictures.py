"""One picture: decoded, cropped, resized, and written as PNG. A picture is ``[H, W, 1 or 3]`` uint8."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

Picture = NDArray[np.uint8]

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
TRANSFORMS = ("none", "center-crop", "center-crop-dhariwal")


def decode(content: bytes, name: str) -> Picture:
    """An image file's bytes as a picture, upright as the camera noted it: grey stays grey, all else becomes RGB.

    Raises:
        ValueError: not a whole BMP, JPEG, PNG or WebP file, more than 8 bits a channel, or larger than pillow takes.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=("BMP", "JPEG", "PNG", "WEBP")) as file:
                if file.mode[0] in "IF":  # 16 or 32 bits; pillow would clip them
                    raise ValueError("more than 8 bits a channel")
                upright = ImageOps.exif_transpose(file)
                array = np.array(upright.convert("L" if upright.mode in ("1", "L") else "RGB"))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"data: expected an image of at most {Image.MAX_IMAGE_PIXELS} pixels, got {name}: {error}") from error
    except (OSError, ValueError, SyntaxError) as error:  # a SyntaxError is what pillow says to some broken PNGs
        raise ValueError(f"data: expected an image, got {name}: {error}") from error
    return array[:, :, None] if array.ndim == 2 else array


def encode(picture: Picture) -> bytes:
    """The picture as PNG, not compressed: the same bytes with every zlib, and quick to read."""
    out = io.BytesIO()
    _to_pillow(picture).save(out, format="PNG", compress_level=0)
    return out.getvalue()


def fit(picture: Picture, resolution: int | None, transform: str = "none") -> Picture:
    """The picture as a square of ``resolution`` pixels a side, or of its own size for None.

    Args:
        transform: "none" takes the whole picture, whatever its proportions; "center-crop" its largest central square;
            "center-crop-dhariwal" is the crop of the ADM reference sets (Dhariwal and Nichol, arXiv 2105.05233): halve by 2x2
            means while the short side is at least twice the resolution, bring it to the resolution by a bicubic filter, cut out
            the centre. It needs a resolution. The first two are resized by an antialiased bilinear filter.

    Raises:
        ValueError: an unknown transform, a resolution missing, or a picture that is not square without either.
    """
    if transform not in TRANSFORMS:
        raise ValueError(f"transform: expected one of {', '.join(TRANSFORMS)}, got {transform!r}")
    if transform == "center-crop":
        picture = _centre(picture, min(picture.shape[:2]))
    if transform == "center-crop-dhariwal":
        if resolution is None:
            raise ValueError("transform: expected a resolution for center-crop-dhariwal, got none")
        return _adm_crop(picture, resolution)
    if resolution is not None and picture.shape[:2] != (resolution, resolution):
        planes = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float()
        resized = torch.nn.functional.interpolate(planes, (resolution, resolution), mode="bilinear", antialias=True)
        picture = resized.round().clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).contiguous().numpy()
    if picture.shape[0] != picture.shape[1]:
        raise ValueError(f"data: expected square images or a resolution, got {picture.shape[1]}x{picture.shape[0]}")
    return picture


def _centre(picture: Picture, side: int) -> Picture:
    top, left = ((length - side) // 2 for length in picture.shape[:2])
    return picture[top : top + side, left : left + side]


def _adm_crop(picture: Picture, resolution: int) -> Picture:
    from PIL import Image

    image = _to_pillow(picture)
    while min(image.size) // 2 >= resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return _centre(np.array(image).reshape(image.height, image.width, -1), resolution)


def _to_pillow(picture: Picture) -> Image.Image:
    from PIL import Image

    return Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
