"""Pictures, ``[H, W, 1 or 3]`` uint8: read, cropped, resized, made of what networks generate, and written as PNG."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imm.files import replacing

if TYPE_CHECKING:
    from PIL import Image

Picture = NDArray[np.uint8]

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
TRANSFORMS = ("none", "center-crop", "center-crop-dhariwal")
#: How values in [-1, 1] become eight bits, as published: of networks of pictures, and of decoded latents.
QUANTISATION, QUANTISATION_DECODED = "127.5 x + 128, clipped", "127.5 x + 127.5, clipped"
#: What the first bytes of other files say they are, for the message.
_FOREIGN = (
    (b"GIF8", "a GIF"),
    (rb"II\*\0", "a TIFF"),
    (rb"MM\0\*", "a TIFF"),
    (b"....ftypavi", "an AVIF"),
    (b"....ftyp(hei|hev|mif)", "a HEIF"),
    (rb"\s*<(!doctype html|html)", "an HTML page"),
    (rb"\s*(<\?xml|<svg)", "an SVG or XML file"),
    (b"\0+$", "nothing but zeros"),
)
#: Orientation, the only EXIF tag that is looked at, and how many quarter turns (anticlockwise) and whether mirrored after.
_ORIENTATION = 0x0112
_TURNS = {2: (0, True), 3: (2, False), 4: (2, True), 5: (3, True), 6: (3, False), 7: (1, True), 8: (1, False)}


@dataclass(frozen=True)
class Decoded:
    """A picture as its file has it.

    Attributes:
        pixels: ``[H, W, 1 or 3]`` uint8, upright.
        grey: True for a file with one channel (and perhaps alpha), False for one in colour. None for one that fits beside both:
            its mode has no grey (a palette, WebP), and its pixels have no colour.
        alpha: whether it had transparency, which is left out. animated: whether more frames followed the first.
    """

    pixels: Picture
    grey: bool | None
    alpha: bool = False
    animated: bool = False


def decode(content: bytes, name: str) -> Picture:
    """An image file's bytes as a picture, upright as the camera noted it: grey with one channel, colour with three.

    Raises:
        ValueError: not a whole BMP, JPEG, PNG or WebP file, more than 8 bits a channel, or larger than pillow takes.
    """
    found = read_picture(content, name)
    return found.pixels if found.grey is False else with_channels(found.pixels, 1)


def read_picture(content: bytes, name: str) -> Decoded:
    """:func:`decode`, with what else the file says of the picture."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; the pixels are whole or an error
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=("BMP", "JPEG", "PNG", "WEBP")) as file:
                # Modes of 16 or 32 bits, which pillow would clip; it opens a PNG in colour of 16 bits as one of 8.
                if file.mode[0] in "IF" or (file.format == "PNG" and content[content.find(b"IHDR") + 12] > 8):
                    raise ValueError("more than 8 bits a channel")
                single = file.mode in ("1", "L", "LA")
                alpha = file.mode in ("LA", "PA", "RGBA") or "transparency" in file.info
                animated = bool(getattr(file, "is_animated", False))
                pixels = np.array(file.convert("L" if single else "RGB"))
                colourless = file.mode in ("P", "PA") or file.format == "WEBP"
                turns, mirrored = _TURNS.get(_orientation(file), (0, False))
    except MemoryError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"data: expected an image of at most {Image.MAX_IMAGE_PIXELS} pixels, got {name}: {error}") from error
    except Exception as error:  # pillow raises struct.error, TypeError, AttributeError and others for broken files
        raise ValueError(f"data: expected an image, got {name}: {_why(error, content)}") from error
    pixels = np.rot90(pixels, turns)
    pixels = np.ascontiguousarray(pixels[:, ::-1] if mirrored else pixels)
    if single:
        return Decoded(pixels[:, :, None], True, alpha, animated)
    # A lossy WebP rounds green apart from red and blue.
    grey = None if colourless and int((pixels.max(2) - pixels.min(2)).max()) <= 1 else False
    return Decoded(pixels, grey, alpha, animated)


def _orientation(file: Image.Image) -> int:
    """What EXIF (or XMP) says; 0 where it cannot be read, for the pixels are whole."""
    try:
        found = file.getexif().get(_ORIENTATION)
    except MemoryError:
        raise
    except Exception:
        return 0
    return found if isinstance(found, int) else 0


def _why(error: Exception, content: bytes) -> str:
    """One line for an error of pillow's, which may be empty, of many lines, or name an object in memory."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        known = next((what for mark, what in _FOREIGN if re.match(mark, content[:1000], re.DOTALL | re.IGNORECASE)), "")
        return f"no BMP, JPEG, PNG or WebP file{f', but {known}' if known else ''}" if content else "an empty file"
    text = re.sub(r" ?<[\w.]+ object at 0x\w+>", "", " ".join(str(error).split()))
    return text if isinstance(error, OSError | ValueError) and text else f"{type(error).__name__} {text}".rstrip()


def with_channels(picture: Picture, channels: int) -> Picture:
    """The picture with one channel or three: grey is repeated, colour becomes luma (ITU-R 601, as pillow rounds it)."""
    if picture.shape[2] == channels:
        return picture
    if channels == 3:
        return np.repeat(picture, 3, axis=2)
    red, green, blue = np.moveaxis(picture.astype(np.uint32), 2, 0)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)[:, :, None]


def encode(picture: Picture) -> bytes:
    """The picture as PNG, not compressed: the same bytes with every zlib, and quick to read."""
    out = io.BytesIO()
    to_pillow(picture).save(out, format="PNG", compress_level=0)
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

    image = to_pillow(picture)
    while min(image.size) // 2 >= resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return _centre(np.array(image).reshape(image.height, image.width, -1), resolution)


def to_pillow(picture: Picture) -> Image.Image:
    """The picture as one of pillow's."""
    from PIL import Image

    return Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)


def to_uint8(images: Tensor, *, decoded: bool = False) -> Tensor:
    """[-1, 1] floating -> 0..255 uint8, same shape: floor(127.5 x + 128), clipped; ``decoded`` from latents:
    floor(127.5 x + 127.5)."""
    return (images.float() * 127.5 + (127.5 if decoded else 128.0)).clamp(0, 255).to(torch.uint8)


def to_picture(image: Tensor, *, decoded: bool = False) -> Picture:
    """``[1 or 3, H, W]`` in [-1, 1] -> a picture; ``decoded`` as in :func:`to_uint8`."""
    return to_uint8(image, decoded=decoded).cpu().permute(1, 2, 0).numpy()


def save_picture(picture: Picture, path: Path) -> None:
    """Write a PNG, atomically, and to the disk itself."""
    with replacing(path) as part:
        to_pillow(picture).save(part, format="PNG")


def grid(rows: Sequence[tuple[str, Tensor]], cell: int = 48, gap: int = 4) -> Picture:
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
            enlarged = to_pillow(to_picture(image)).resize((width * factor, height * factor), Image.Resampling.NEAREST)
            canvas.paste(enlarged.convert("RGB"), (margin + gap + x * step_x, top))
    return np.array(canvas)
