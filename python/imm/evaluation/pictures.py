"""Pictures of images: single files and labelled grids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from imm.files import replacing

if TYPE_CHECKING:
    from PIL.Image import Image


#: How values in [-1, 1] become eight bits, as published: of networks of pictures, and of decoded latents.
QUANTISATION, QUANTISATION_DECODED = "127.5 x + 128, clipped", "127.5 x + 127.5, clipped"


def to_uint8(images: Tensor, *, decoded: bool = False) -> Tensor:
    """[-1, 1] floating -> 0..255 uint8, same shape: floor(127.5 x + 128), clipped; ``decoded`` from latents:
    floor(127.5 x + 127.5)."""
    return (images.float() * 127.5 + (127.5 if decoded else 128.0)).clamp(0, 255).to(torch.uint8)


def to_picture(image: Tensor, *, decoded: bool = False) -> Image:
    """``[1 or 3, H, W]`` in [-1, 1] -> a pillow image; ``decoded`` as in :func:`to_uint8`."""
    from PIL import Image

    pixels = to_uint8(image, decoded=decoded).cpu().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def save_picture(picture: Image, path: Path) -> None:
    """Write a PNG, atomically, and to the disk itself."""
    with replacing(path) as part:
        picture.save(part, format="PNG")


def grid(rows: Sequence[tuple[str, Tensor]], cell: int = 48, gap: int = 4) -> Image:
    """Rows of images with a label to the left of each.

    Args:
        rows: (label, ``[N, 1 or 3, H, W]`` in [-1, 1]); an empty label in every row leaves no margin.
        cell: least side of an image in the picture, in pixels; images are enlarged by a whole factor.
        gap: between images, in pixels.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = rows[0][1].shape[2:]
    factor = max(1, -(-cell // max(height, width)))
    step_x, step_y = width * factor + gap, height * factor + gap
    font = ImageFont.load_default(size=14)
    measure = ImageDraw.Draw(Image.new("L", (1, 1)))
    margin = max(int(measure.textlength(label, font=font)) for label, _ in rows)
    margin += 2 * gap if margin else 0
    columns = max(len(images) for _, images in rows)
    canvas = Image.new("RGB", (margin + columns * step_x + gap, len(rows) * step_y + gap), (90, 90, 90))
    draw = ImageDraw.Draw(canvas)
    for y, (label, images) in enumerate(rows):
        top = gap + y * step_y
        draw.text((gap, top + (step_y - gap) // 2), label, fill=(255, 255, 255), font=font, anchor="lm")
        for x, image in enumerate(images):
            picture = to_picture(image).resize((width * factor, height * factor), Image.Resampling.NEAREST)
            canvas.paste(picture.convert("RGB"), (margin + gap + x * step_x, top))
    return canvas
