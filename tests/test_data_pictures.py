"""One picture: what its mode decides, orientation, depth, alpha, and one line with its name for every failure."""

from __future__ import annotations

import io
import warnings
from unittest.mock import Mock

import numpy as np
import pytest
from fuzz_pictures import ODD_ENTRIES, broken, exif, saved, whole
from PIL import Image, ImageOps

from imm.pictures import decode, read_picture, with_channels

RANDOM = np.random.default_rng(0)
COLOUR = Image.fromarray(RANDOM.integers(0, 256, (6, 9, 3), dtype=np.uint8))
GREY = Image.fromarray(RANDOM.integers(0, 256, (6, 9), dtype=np.uint8))


def check_fuzz(count: int, seed: int, monkeypatch) -> int:
    """Pictures, or one line with the name; the number of pictures."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    good = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for content in broken(count, seed):
            try:
                picture = decode(content, "some/where.png")
            except ValueError as error:
                text = str(error)
                assert text.startswith("data: expected an image")
                assert "got some/where.png: " in text
                assert "\n" not in text
                assert " at 0x" not in text
            else:
                assert picture.dtype == np.uint8
                assert picture.ndim == 3
                assert picture.shape[2] in (1, 3)
                good += 1
    return good


def test_broken_pictures_are_pictures_or_one_line(monkeypatch) -> None:
    assert 20 < check_fuzz(600, 0, monkeypatch) < 580


@pytest.mark.full
def test_a_hundred_thousand_broken_pictures(monkeypatch) -> None:
    check_fuzz(100_000, 1, monkeypatch)


def test_whole_pictures() -> None:
    taken = whole()[:-4]
    assert all(decode(content, "x").size for content in taken)
    for content in whole()[-4:]:
        with pytest.raises(ValueError, match=r"got d/x\.png: more than 8 bits a channel"):
            decode(content, "d/x.png")


@pytest.mark.parametrize("error", [TypeError("odd"), AttributeError(), ZeroDivisionError("a\nb"), RecursionError("deep")])
def test_any_error_of_pillow_is_one_line_with_the_name(error, monkeypatch) -> None:
    monkeypatch.setattr(Image, "open", failing := Mock(side_effect=error))
    with pytest.raises(ValueError, match=rf"^data: expected an image, got d/x\.png: {type(error).__name__}") as found:
        decode(b"any", "d/x.png")
    assert "\n" not in str(found.value)
    for stop in (MemoryError, KeyboardInterrupt):
        failing.side_effect = stop
        with pytest.raises(stop):
            decode(b"any", "d/x.png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_the_tags_whatever_stands_beside_it(kind) -> None:
    for orientation in range(10):
        content = saved(COLOUR, kind, exif=exif(orientation=orientation))
        expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
        np.testing.assert_array_equal(decode(content, "x"), expected)
        for entry in ODD_ENTRIES:
            odd = saved(COLOUR, kind, exif=exif(entry, orientation=orientation))
            np.testing.assert_array_equal(decode(odd, "x"), expected)
    assert decode(saved(GREY, "PNG", exif=exif()), "x").shape == (9, 6, 1)


def palette(image: Image.Image, *colours: int) -> Image.Image:
    out = Image.new("P", image.size, 0)
    out.putpalette(colours)
    return out


@pytest.mark.parametrize(
    ("content", "grey", "alpha"),
    [
        (saved(GREY, "PNG"), True, False),
        (saved(GREY, "JPEG"), True, False),
        (saved(GREY, "BMP"), True, False),
        (saved(GREY.convert("1"), "PNG"), True, False),
        (saved(GREY.convert("LA"), "PNG"), True, True),
        (saved(GREY, "PNG", transparency=3), True, True),
        (saved(GREY.convert("P"), "PNG"), None, False),
        (saved(palette(GREY, 70, 70, 70, 255, 0, 0), "PNG"), None, False),  # of which red is not used
        (saved(palette(GREY, 70, 70, 70), "PNG", transparency=0), None, True),
        (saved(palette(GREY, 70, 70, 75), "PNG"), False, False),
        (saved(GREY, "WEBP"), None, False),
        (saved(GREY, "WEBP", lossless=True), None, False),
        (saved(COLOUR, "WEBP"), False, False),
        (saved(GREY.convert("RGB"), "PNG"), False, False),  # said to be in colour by a format that can say otherwise
        (saved(COLOUR.convert("RGBA"), "PNG"), False, True),
        (saved(COLOUR.convert("CMYK"), "JPEG"), False, False),
    ],
)
def test_what_the_mode_decides(content, grey, alpha) -> None:
    found = read_picture(content, "x")
    assert (found.grey, found.alpha) == (grey, alpha)
    assert decode(content, "x").shape == (6, 9, 3 if grey is False else 1)


def test_grey_becomes_colour_and_colour_becomes_luma() -> None:
    picture = np.array(COLOUR)
    np.testing.assert_array_equal(with_channels(picture, 1)[:, :, 0], np.array(COLOUR.convert("L")))
    grey = np.array(GREY)[:, :, None]
    assert with_channels(picture, 3) is picture
    assert (with_channels(grey, 3) == grey).all()
    np.testing.assert_array_equal(with_channels(with_channels(grey, 3), 1), grey)
    np.testing.assert_array_equal(decode(saved(GREY.convert("LA"), "PNG"), "x"), grey)
    np.testing.assert_array_equal(decode(saved(GREY.convert("P"), "PNG"), "x"), grey)


def test_files_that_are_no_pictures_are_called_what_they_are() -> None:
    for content, text in (
        (b"", "an empty file"),
        (b"GIF89a" + bytes(50), "no BMP, JPEG, PNG or WebP file, but a GIF"),
        (saved(COLOUR, "TIFF"), "no BMP, JPEG, PNG or WebP file, but a TIFF"),
        (bytes(50), "no BMP, JPEG, PNG or WebP file, but nothing but zeros"),
        (b"\n<!DOCTYPE html><p>Not found", "no BMP, JPEG, PNG or WebP file, but an HTML page"),
        (b"whatever", "no BMP, JPEG, PNG or WebP file"),
    ):
        with pytest.raises(ValueError, match=f"^data: expected an image, got d/a.png: {text}$"):
            decode(content, "d/a.png")
    with pytest.raises(ValueError, match=r"got d/a.png: .*truncated"):
        decode(saved(COLOUR, "PNG")[:80], "d/a.png")
